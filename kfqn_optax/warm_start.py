"""A second moment of the inputs from whole batches, before the first step.

The authors begin with one pass over the training set at the initial weights: A is the second moment
over all of it, and the input factors start as its damped inverse. Without it, A starts from the
first batch alone.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from kfqn_optax import layer_state, nnx
from kfqn_optax.capture import curvature_fn
from kfqn_optax.layers import some
from kfqn_optax.lbfgs import Memory
from kfqn_optax.loss import LossFn, split_arrays
from kfqn_optax.statistics import LayerStatistics
from kfqn_optax.transform import ScaleByKBFGSState


def warm_start(opt_state: Any, loss_fn: LossFn, params: Any, batches: Iterable[tuple]) -> Any:
    """Averages A over batches at ``params`` and puts it into the state.

    Each batch counts by its number of examples. The next step makes the input factors from A (with
    the damping of that step) and does not let its own batch into A.

    Args:
        opt_state: state of `kbfgs`, of `scale_by_kbfgs`, or of anything that holds one of them
            (``optax.chain``, ``optax.partition``, ``optax.inject_hyperparams``, the ``opt_state``
            of an ``nnx.Optimizer``).
        loss_fn: ``loss_fn(params, *batch)``, as in `curvature_fn`.
        params: all the parameters; for an NNX optimizer the model, and ``loss_fn(model, *batch)``.
        batches: an iterable of tuples, each the arguments of ``loss_fn`` after ``params``.

    Returns:
        A new state of the same structure.

    Raises:
        ValueError: if there are no batches, no K-BFGS state in ``opt_state``, a layer of that state
            which the loss does not reach, or one whose inputs are not finite or too large.
        TypeError: if a batch is not a tuple.
    """
    states = [s for s in jax.tree.leaves(opt_state, is_leaf=_is_state) if _is_state(s)]
    if not states:
        raise ValueError(
            "opt_state holds no K-BFGS state to start: pass what tx.init(params) returned, for a "
            "tx made with kbfgs or scale_by_kbfgs."
        )
    wanted = [path for state in states for path in state.layers if _takes_moment(state, path)]
    averages = _averages(loss_fn, params, batches, wanted)
    return jax.tree.map(
        lambda s: _warmed(s, averages) if _is_state(s) else s, opt_state, is_leaf=_is_state
    )


def _is_state(node: Any) -> bool:
    return isinstance(node, ScaleByKBFGSState)


def _takes_moment(state: ScaleByKBFGSState, path: str) -> bool:
    """Whether a layer's input factor is made from A; one of limited memory is not."""
    return not isinstance(state.layers[path].input, Memory)


def _warmed(state: ScaleByKBFGSState, averages: dict[str, Any]) -> ScaleByKBFGSState:
    lacking = [path for path in state.layers if path not in averages]
    if lacking:
        raise ValueError(
            f"the loss does not reach layer {some(lacking)} of the state; it reaches "
            f"{some(averages)}. Pass the loss and the parameters that the optimizer was made for."
        )
    # In an nnx.Optimizer each array is wrapped in a variable; they keep their places.
    plain = jax.tree.map(
        lambda leaf: None if leaf is None else jax.tree.leaves(leaf)[0],
        state,
        is_leaf=lambda node: not isinstance(node, (tuple, dict)),
    )
    warmed = ScaleByKBFGSState(
        count=plain.count,
        layers={
            path: layer_state.warm(of_layer, *averages[path])
            for path, of_layer in plain.layers.items()
        },
    )
    return jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(warmed))


def _averages(
    loss_fn: LossFn, params: Any, batches: Iterable[tuple], wanted: list[str]
) -> dict[str, tuple[jax.Array | None, jax.Array]]:
    """A (of the layers wanted) and T by layer path, averaged over all examples of all batches."""
    rebuild, params = nnx.open_model(params) if nnx.is_model(params) else (lambda p: p, params)
    totals = None
    programs: dict[Any, Callable] = {}
    for batch in batches:
        if not isinstance(batch, tuple):
            raise TypeError(
                "each batch must be a tuple, the arguments of loss_fn after params, got "
                f"{type(batch).__name__}: write (batch,) for a loss_fn(params, batch)."
            )
        call, arrays, key = split_arrays(loss_fn, batch, {})
        if key not in programs:
            programs[key] = jax.jit(_sums(call, rebuild, wanted))
        sums = programs[key](params, arrays)
        totals = sums if totals is None else jax.tree.map(jnp.add, totals, sums)
    if totals is None:
        raise ValueError("batches is empty: warm_start needs at least one batch.")
    averages = {
        path: jax.tree.map(lambda total, weight=weight: _divide(total, weight), total)
        for path, (total, weight) in totals.items()
    }
    _check_finite({path: moment for path, (moment, _) in averages.items() if moment is not None})
    return averages


def _check_finite(moments: dict[str, jax.Array]) -> None:
    """Refuses an A that no factor can be made of, unless it is traced."""
    usable = {
        path: jnp.isfinite(jnp.sum(jnp.square(jnp.sum(jnp.abs(moment), axis=-1))))
        for path, moment in moments.items()
        if not isinstance(moment, jax.core.Tracer)
    }
    wrong = [path for path, fine in jax.device_get(usable).items() if not fine]
    if wrong:
        raise ValueError(
            f"the second moment of the inputs of layer {some(wrong)}, averaged over the batches, "
            "is not finite or too large: look for numbers in the batches that are infinite, not "
            "numbers, or huge, or for such parameters."
        )


def _sums(call: Callable, rebuild: Callable, wanted: list[str]) -> Callable:
    """One batch: by layer path, A and T times the number of examples, and that number."""

    def weigh(layer: LayerStatistics) -> tuple[tuple[jax.Array | None, jax.Array], jax.Array]:
        moment = layer.input_moment
        if moment is not None:
            axes = moment.ndim - layer.examples.ndim
            moment = moment * layer.examples.reshape(layer.examples.shape + (1,) * axes)
        return (moment, layer.rows), layer.examples

    def run(params: Any, arrays: list) -> dict[str, Any]:
        params = rebuild(params)
        if nnx.is_model(params):
            measure = nnx.nnx_curvature_fn(call, params, arrays)
            measured = measure(nnx.parameters(params), moments=wanted)
        else:
            measured = curvature_fn(call, params, arrays)(params, moments=wanted)
        return {path: weigh(layer) for path, layer in measured.layers.items()}

    return run


def _divide(total: jax.Array, weight: jax.Array) -> jax.Array:
    return total / weight.reshape(weight.shape + (1,) * (total.ndim - weight.ndim))
