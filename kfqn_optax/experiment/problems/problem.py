"""What every problem offers, whichever framework its network is written in.

A problem is a network and a loss, as pure functions. What the network keeps beside its parameters,
running averages of batch norm and random keys, is its *model state*: a pass with the loss takes it
and returns the next one. The gradient pass of a step decides how it goes on; the passes that
measure curvature start from the same state, so they see the same dropout masks, and what they
return is dropped. Given a random key, those passes draw the targets from the model's own output
distribution, the one whose negative log-likelihood the loss is.

A batch is a pytree of arrays with the examples along the first axis of each.
"""

import abc
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Protocol

import jax
import optax

import kfqn_optax as kfqn

Params = Any
Batch = Any
ModelState = Any


class Problem(Protocol):
    """A network and a loss.

    `loss` and `errors` are traced by JAX; the arguments of all methods are pytrees of arrays.

    Attributes:
        measure: what is reported beside the loss, ``mse`` or ``accuracy``.
    """

    measure: ClassVar[str]

    @property
    def network(self) -> str:
        """The network in a few words."""
        ...

    def init(self, seed: int) -> tuple[Params, ModelState]:
        """Returns the initial parameters and model state for a seed."""
        ...

    def loss(
        self, params: Params, batch: Batch, model_state: ModelState, key: jax.Array | None = None
    ) -> tuple[jax.Array, ModelState]:
        """Returns the mean loss of a batch in training, and the next model state.

        Without weight decay: it is what the optimizers are given. With a key, of targets drawn from
        the model in the place of the batch's.
        """
        ...

    def errors(
        self, params: Params, batch: Batch, model_state: ModelState
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the loss and the measure of each example, [batch] both, as in use: no dropout."""
        ...

    def curvature_fn(
        self, params: Params, batch: Batch, model_state: ModelState, key: jax.Array | None = None
    ) -> Callable[[Params], kfqn.Statistics]:
        """Returns the extra argument of an update; with a key, of drawn targets."""
        ...

    def layers(
        self, params: Params, batch: Batch, model_state: ModelState
    ) -> tuple[kfqn.Layer, ...]:
        """Returns what K-BFGS can precondition."""
        ...

    def warm_start(
        self,
        opt_state: Any,
        params: Params,
        batches: Iterable[tuple[Batch, jax.Array | None]],
        model_state: ModelState,
    ) -> Any:
        """Returns the optimizer state with second moments averaged over batches.

        With each batch comes a key to draw its targets from, or None.
        """
        ...

    def misfit(self, batch: Batch) -> str:
        """Returns what makes the network unable to take these examples; empty: nothing."""
        ...


class LinenProblem(abc.ABC):
    """What curvature takes from a linen problem: its loss, and arguments as for the gradient."""

    @abc.abstractmethod
    def loss(
        self, params: Params, batch: Batch, model_state: ModelState, key: jax.Array | None = None
    ) -> tuple[jax.Array, ModelState]:
        """See `Problem`."""

    def curvature_fn(
        self, params: Params, batch: Batch, model_state: ModelState, key: jax.Array | None = None
    ) -> Callable[[Params], kfqn.Statistics]:
        """See `Problem`."""
        return kfqn.curvature_fn(self.loss, params, batch, model_state, key)

    def layers(
        self, params: Params, batch: Batch, model_state: ModelState
    ) -> tuple[kfqn.Layer, ...]:
        """See `Problem`."""
        return kfqn.find_layers(self.loss, params, batch, model_state)

    def warm_start(
        self,
        opt_state: Any,
        params: Params,
        batches: Iterable[tuple[Batch, jax.Array | None]],
        model_state: ModelState,
    ) -> Any:
        """See `Problem`."""
        arguments = ((batch, model_state, key) for batch, key in batches)
        return kfqn.warm_start(opt_state, self.loss, params, arguments)


def squared_norm(params: Params) -> jax.Array:
    """Returns the sum of the squares of all parameters, biases too: |w|^2 of the weight decay."""
    return optax.tree.norm(params, squared=True)
