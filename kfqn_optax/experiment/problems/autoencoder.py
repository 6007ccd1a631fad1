"""The autoencoder problems: a network and a loss each.

An autoencoder maps an image to itself through a narrow code. The networks and losses are those of
the K-BFGS paper (arXiv 2006.08877, section 5 and appendix): relu after every layer but the code and
the output, weights and biases uniform within 1 / sqrt(fan-in), which is PyTorch's default.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import kfqn_optax as kfqn
from kfqn_optax.experiment.problems.problem import LinenProblem, ModelState, Params


def uniform_within(bound: float) -> nn.initializers.Initializer:
    """Returns an initializer that draws uniformly from [-bound, bound)."""

    def init(key, shape, dtype=jnp.float32, **_):
        return jax.random.uniform(key, shape, dtype, minval=-bound, maxval=bound)

    return init


class Autoencoder(nn.Module):
    """A symmetric stack of dense layers in float32; the middle layer is the code.

    Attributes:
        widths: the number of units at every stage, from the input to the output.
    """

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images [batch, pixels] to outputs of that shape, before any sigmoid."""
        code, output = len(self.widths) // 2, len(self.widths) - 1
        x = images
        for stage in range(1, len(self.widths)):
            # The bias has its layer's fan-in too, not the fan-in of a vector.
            init = uniform_within(self.widths[stage - 1] ** -0.5)
            x = nn.Dense(
                self.widths[stage],
                kernel_init=init,
                bias_init=init,
                dtype=jnp.float32,
                param_dtype=jnp.float32,
            )(x)
            if stage not in (code, output):
                x = nn.relu(x)
        return x


@dataclasses.dataclass(frozen=True)
class AutoencoderProblem(LinenProblem):
    """A network and how its output is compared with the image. There is no model state.

    Attributes:
        widths: the autoencoder's widths, from the input to the output.
        binary: True for pixels in [0, 1] and binary cross-entropy with logits; False for pixels of
            any size and half the squared error. Both are summed over the pixels of an image.
    """

    widths: tuple[int, ...]
    binary: bool
    measure: ClassVar[str] = "mse"

    @property
    def network(self) -> str:
        """See `Problem`."""
        return "-".join(str(width) for width in self.widths)

    def model(self) -> Autoencoder:
        """Returns the network."""
        return Autoencoder(self.widths)

    def init(self, seed: int) -> tuple[Params, ModelState]:
        """Returns the initial parameters for a seed."""
        images = jnp.zeros((1, self.widths[0]), jnp.float32)
        # One program instead of one for every layer's shapes: 0.5 s instead of 6.
        return jax.jit(self.model().init)(jax.random.key(seed), images), ()

    def errors(
        self, params: Params, batch: jax.Array, model_state: ModelState = ()
    ) -> tuple[jax.Array, jax.Array]:
        """Measures each image's reconstruction.

        Args:
            params: parameters from `init`.
            batch: images, float32 [batch, pixels].
            model_state: empty.

        Returns:
            The losses [batch], summed over pixels, and the squared errors [batch], averaged over
            pixels. For binary problems the squared error is that of sigmoid(output).
        """
        del model_state
        outputs = self._outputs(params, batch)
        predicted = jax.nn.sigmoid(outputs) if self.binary else outputs
        return self._losses(outputs, batch), jnp.square(predicted - batch).mean(axis=-1)

    def loss(
        self,
        params: Params,
        batch: jax.Array,
        model_state: ModelState = (),
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, ModelState]:
        """See `Problem`."""
        outputs, targets = self._outputs(params, batch), batch
        if key is not None:
            draw = kfqn.sample_bernoulli if self.binary else kfqn.sample_normal
            targets = draw(key, outputs)
        return self._losses(outputs, targets).mean(), model_state

    def _outputs(self, params: Params, batch: jax.Array) -> jax.Array:
        return jnp.asarray(self.model().apply(params, batch))

    def _losses(self, outputs: jax.Array, targets: jax.Array) -> jax.Array:
        """The loss of each image, [batch]."""
        if self.binary:
            return optax.sigmoid_binary_cross_entropy(outputs, targets).sum(axis=-1)
        return 0.5 * jnp.square(outputs - targets).sum(axis=-1)

    def misfit(self, batch: jax.Array) -> str:
        """See `Problem`."""
        pixels = batch.shape[1]
        if pixels == self.widths[0]:
            return ""
        return (
            f"the images have {pixels} pixels, but the network of this problem takes "
            f"{self.widths[0]}."
        )


_MNIST = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)

AUTOENCODERS = {
    "curves": AutoencoderProblem(
        (784, 400, 200, 100, 50, 25, 6, 25, 50, 100, 200, 400, 784), binary=True
    ),
    "mnist": AutoencoderProblem(_MNIST, binary=True),
    "fashion_mnist": AutoencoderProblem(_MNIST, binary=True),
    "faces": AutoencoderProblem((625, 2000, 1000, 500, 30, 500, 1000, 2000, 625), binary=False),
}
