"""Classification with a network of either framework: softmax cross-entropy with integer labels.

A batch is a pair, inputs and labels. There may be one label an example, or one a position, as for
the next character at every place of a text; then an example's loss is the mean over its positions.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import nnx

import kfqn_optax as kfqn
from kfqn_optax.experiment.problems.problem import LinenProblem, Params

Examples = tuple[jax.Array, jax.Array]


def cross_entropy(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Measures predictions against labels.

    Args:
        logits: [batch, ..., classes].
        labels: whole numbers [batch, ...].

    Returns:
        The loss and the share of right answers of each example, [batch] both.
    """
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    right = (logits.argmax(axis=-1) == labels).astype(losses.dtype)
    positions = tuple(range(1, labels.ndim))
    return losses.mean(axis=positions), right.mean(axis=positions)


def labels_for(logits: jax.Array, labels: jax.Array, key: jax.Array | None) -> jax.Array:
    """Returns the labels; with a key, labels drawn from the softmax of the logits."""
    return labels if key is None else kfqn.sample_categorical(key, logits)


class _Classifier:
    """What is the same in both frameworks."""

    measure: ClassVar[str] = "accuracy"

    def misfit(self, batch: Examples) -> str:
        """See `Problem`."""
        del batch
        return ""


class LinenState(NamedTuple):
    """The model state of a linen network.

    Attributes:
        batch_stats: the collection of that name; empty without batch norm.
        key: where the next step's dropout key comes from.
    """

    batch_stats: dict[str, Any]
    key: jax.Array


@dataclasses.dataclass(frozen=True)
class LinenClassifier(_Classifier, LinenProblem):
    """A linen module that maps inputs to logits: ``module(inputs, train=...)``.

    Attributes:
        module: the network.
        inputs: shape and dtype of one example's input.
        network: see `Problem`.
    """

    module: nn.Module
    inputs: jax.ShapeDtypeStruct
    network: str

    def init(self, seed: int) -> tuple[Params, LinenState]:
        """See `Problem`."""
        params_key, key = jax.random.split(jax.random.key(seed))
        inputs = jnp.zeros((1, *self.inputs.shape), self.inputs.dtype)
        variables: Any = jax.jit(self.module.init)(params_key, inputs)
        return {"params": variables["params"]}, LinenState(variables.get("batch_stats", {}), key)

    def loss(
        self, params: Params, batch: Examples, model_state: LinenState, key: jax.Array | None = None
    ) -> tuple[jax.Array, LinenState]:
        """See `Problem`."""
        inputs, labels = batch
        dropout_key, next_key = jax.random.split(model_state.key)
        result: Any = self.module.apply(
            {**params, "batch_stats": model_state.batch_stats},
            inputs,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": dropout_key},
        )
        logits, updated = result
        losses, _ = cross_entropy(logits, labels_for(logits, labels, key))
        return losses.mean(), LinenState(updated.get("batch_stats", {}), next_key)

    def errors(
        self, params: Params, batch: Examples, model_state: LinenState
    ) -> tuple[jax.Array, jax.Array]:
        """See `Problem`."""
        inputs, labels = batch
        variables = {**params, "batch_stats": model_state.batch_stats}
        logits: Any = self.module.apply(variables, inputs, train=False)
        return cross_entropy(logits, labels)


class NnxState(NamedTuple):
    """The model state of an NNX network.

    Attributes:
        graph: the network without its arrays, in training mode; static.
        rest: all its variables but the parameters: batch averages, random keys and their counts.
    """

    graph: nnx.GraphDef
    rest: nnx.State


@dataclasses.dataclass(frozen=True)
class NnxClassifier(_Classifier):
    """An NNX module that maps inputs to logits.

    The module lives for the length of a pass. Between passes it is split into parameters, which
    the optimizer sees, and the rest.

    Attributes:
        make: makes the network, in training mode.
        network: see `Problem`.
    """

    make: Callable[[nnx.Rngs], nnx.Module]
    network: str

    def init(self, seed: int) -> tuple[Params, NnxState]:
        """See `Problem`."""

        @jax.jit
        def split(key):
            graph, params, rest = nnx.split(self.make(nnx.Rngs(key)), nnx.Param, ...)
            return params, NnxState(graph, rest)

        return split(jax.random.key(seed))

    def model(self, params: Params, model_state: NnxState) -> Any:
        """Returns the network; what it changes of itself does not reach the arguments."""
        return nnx.merge(model_state.graph, params, model_state.rest, copy=True)

    @staticmethod
    def model_loss(model: Any, batch: Examples, key: jax.Array | None = None) -> jax.Array:
        """Returns the mean loss of a batch; it changes the model's averages and counts."""
        inputs, labels = batch
        logits = model(inputs)
        losses, _ = cross_entropy(logits, labels_for(logits, labels, key))
        return losses.mean()

    def loss(
        self, params: Params, batch: Examples, model_state: NnxState, key: jax.Array | None = None
    ) -> tuple[jax.Array, NnxState]:
        """See `Problem`."""
        model = self.model(params, model_state)
        loss = self.model_loss(model, batch, key)
        _, _, rest = nnx.split(model, nnx.Param, ...)
        return loss, NnxState(model_state.graph, rest)

    def errors(
        self, params: Params, batch: Examples, model_state: NnxState
    ) -> tuple[jax.Array, jax.Array]:
        """See `Problem`."""
        inputs, labels = batch
        model = self.model(params, model_state)
        model.eval()
        return cross_entropy(model(inputs), labels)

    def curvature_fn(
        self, params: Params, batch: Examples, model_state: NnxState, key: jax.Array | None = None
    ) -> Callable[[Params], kfqn.Statistics]:
        """See `Problem`."""
        model = self.model(params, model_state)
        return kfqn.nnx_curvature_fn(self.model_loss, model, batch, key)

    def layers(
        self, params: Params, batch: Examples, model_state: NnxState
    ) -> tuple[kfqn.Layer, ...]:
        """See `Problem`."""
        return kfqn.find_nnx_layers(self.model_loss, self.model(params, model_state), batch)

    def warm_start(
        self,
        opt_state: Any,
        params: Params,
        batches: Iterable[tuple[Examples, jax.Array | None]],
        model_state: NnxState,
    ) -> Any:
        """See `Problem`."""
        model = self.model(params, model_state)
        arguments = ((batch, key) for batch, key in batches)
        return kfqn.warm_start(opt_state, self.model_loss, model, arguments)
