"""Networks with random data, by name: the cost of a step does not depend on what they show.

``mnist``, ``curves``, ``faces``: the autoencoders of the K-BFGS paper at batch 1000.
``width-N``: three dense layers N-N-N-N at batch 1000.
``batch-N``: the MNIST autoencoder at batch N.
``cnn``: a small VGG network on 28 x 28 images, batch 100.
``transformer``: 4 blocks of width 128 on sequences of 64, batch 32, embedding and attention left to
the fallback as docs/models.md advises; ``transformer-all``: with everything preconditioned.
``deep-N``: N blocks of width 256 under ``nn.scan``, batch 8, the embedding left to the fallback.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import kfqn_optax as kfqn

AUTOENCODERS = {
    "mnist": (784, 1000, 500, 250, 30, 250, 500, 1000, 784),
    "curves": (784, 400, 200, 100, 50, 25, 6, 25, 50, 100, 200, 400, 784),
    "faces": (625, 2000, 1000, 500, 30, 500, 1000, 2000, 625),
}
BATCH = 1000
SYMBOLS = 96


@dataclasses.dataclass(frozen=True)
class Problem:
    """A network, its loss and one batch.

    Attributes:
        name: as above.
        loss_fn: ``loss_fn(params, *batch)``, the mean loss of the batch.
        init: parameters from a key and an input.
        batch: what the loss takes, examples along the first axis; the network's input comes first.
        widths: of a network of dense layers alone, for the count by formula; else None.
        left_out: kinds of layers that go to the fallback.
    """

    name: str
    loss_fn: Callable[..., jax.Array]
    init: Callable[..., Any]
    batch: tuple[jax.Array, ...]
    widths: tuple[int, ...] | None = None
    left_out: tuple[str, ...] = ()

    @property
    def examples(self) -> int:
        return len(self.batch[0])

    def params(self) -> Any:
        """Initial parameters, made by one program."""
        return jax.jit(self.init)(jax.random.key(0), self.batch[0])

    def shapes(self) -> Any:
        """Shapes of the parameters."""
        return jax.eval_shape(self.init, jax.random.key(0), self.batch[0])

    def layers(self) -> tuple[kfqn.Layer, ...] | None:
        """What K-BFGS preconditions; None for all the layers of a dense network."""
        if self.widths:
            return None
        found = kfqn.find_layers(self.loss_fn, self.shapes(), *self.batch)
        return tuple(layer for layer in found if layer.kind not in self.left_out)


def make(name: str) -> Problem:
    """The problem of that name.

    Raises:
        ValueError: if there is none.
    """
    family, _, number = name.partition("-")
    if name in AUTOENCODERS:
        return _autoencoder(name, AUTOENCODERS[name], BATCH, binary=name != "faces")
    if family == "width" and number.isdigit():
        return _autoencoder(name, 4 * (int(number),), BATCH, linear=(3,))
    if family == "batch" and number.isdigit():
        return _autoencoder(name, AUTOENCODERS["mnist"], int(number))
    if name == "cnn":
        return _cnn()
    if family == "deep" and number.isdigit():
        return _deep(name, int(number))
    if family == "transformer" and number in ("", "all"):
        return _transformer(name, () if number else ("embed", "dense general"))
    raise ValueError(
        f"there is no problem {name!r}; there are {', '.join(AUTOENCODERS)}, width-N, batch-N, "
        "cnn, transformer, transformer-all and deep-N."
    )


class Dense(nn.Module):
    """Dense layers with relu after each but some.

    Attributes:
        widths: from the input to the output.
        linear: numbers of the layers without relu, counted from 1.
    """

    widths: tuple[int, ...]
    linear: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        for i, width in enumerate(self.widths[1:], start=1):
            x = nn.Dense(width)(x)
            x = x if i in self.linear else nn.relu(x)
        return x


def _autoencoder(name, widths, batch, binary=True, linear=None):
    depth = len(widths) - 1
    model = Dense(widths, linear or (depth // 2, depth))

    def loss_fn(params, x):
        output = model.apply(params, x)
        if binary:
            return jnp.mean(jnp.sum(optax.sigmoid_binary_cross_entropy(output, x), axis=-1))
        return 0.5 * jnp.mean(jnp.sum((output - x) ** 2, axis=-1))

    images = jax.random.uniform(jax.random.key(1), (batch, widths[0]))
    return Problem(name, loss_fn, model.init, (images,), widths)


class CNN(nn.Module):
    """Convolutions of 3 x 3 with group norm and relu, the image halved between stages."""

    stages: tuple[tuple[int, ...], ...] = ((32,), (64, 64), (128, 128))

    @nn.compact
    def __call__(self, x):
        for number, channels in enumerate(self.stages):
            x = nn.max_pool(x, (2, 2), (2, 2)) if number else x
            for channel in channels:
                x = nn.Conv(channel, (3, 3), use_bias=False)(x)
                x = nn.relu(nn.GroupNorm(num_groups=8)(x))
        return nn.Dense(10)(x.mean(axis=(1, 2)))


def _cnn():
    images = jax.random.normal(jax.random.key(1), (100, 28, 28, 1))
    labels = jax.random.randint(jax.random.key(2), (100,), 0, 10)
    return Problem("cnn", _classify(CNN()), CNN().init, (images, labels))


class Block(nn.Module):
    """Causal attention and a network four times as wide, each behind a layer norm."""

    heads: int = 4

    @nn.compact
    def __call__(self, x, mask):
        width = x.shape[-1]
        x = x + nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x), mask=mask)
        hidden = nn.gelu(nn.Dense(4 * width)(nn.LayerNorm()(x)))
        return x + nn.Dense(width)(hidden), None


class Transformer(nn.Module):
    """Blocks between an embedding and a dense layer; one after the other, or stacked."""

    depth: int = 4
    width: int = 128
    stacked: bool = False

    @nn.compact
    def __call__(self, symbols):
        x = nn.Embed(SYMBOLS, self.width)(symbols) * self.width**0.5
        mask = nn.make_causal_mask(symbols[:1])
        if self.stacked:
            stack = nn.scan(
                Block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=self.depth,
            )
            x, _ = stack()(x, mask)
        for _ in range(0 if self.stacked else self.depth):
            x, _ = Block()(x, mask)
        return nn.Dense(SYMBOLS)(nn.LayerNorm()(x))


def _transformer(name, left_out):
    text = jax.random.randint(jax.random.key(1), (32, 65), 0, SYMBOLS)
    model = Transformer()
    batch = text[:, :-1], text[:, 1:]
    return Problem(name, _classify(model), model.init, batch, left_out=left_out)


def _deep(name, depth):
    text = jax.random.randint(jax.random.key(1), (8, 65), 0, SYMBOLS)
    model = Transformer(depth, 256, stacked=True)
    batch = text[:, :-1], text[:, 1:]
    return Problem(name, _classify(model), model.init, batch, left_out=("embed",))


def _classify(model):
    def loss_fn(params, inputs, labels):
        logits = model.apply(params, inputs)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    return loss_fn
