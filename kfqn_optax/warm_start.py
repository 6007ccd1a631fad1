"""A second moment of the inputs from whole batches, before the first step.

The authors begin with one pass over the training set at the initial weights: A is the second moment
over all of it, and the input factors start as its damped inverse. Without it, A starts from the
first batch alone.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax

from kfqn_optax import factors, nnx
from kfqn_optax.capture import curvature_fn
from kfqn_optax.layers import some
from kfqn_optax.statistics import LayerStatistics
from kfqn_optax.tag import LossFn, split_arrays
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
        ValueError: if there are no batches, no K-BFGS state in ``opt_state``, or a layer of that
            state which the loss does not reach.
        TypeError: if a batch is not a tuple.
    """
    states = [s for s in jax.tree.leaves(opt_state, is_leaf=_is_state) if _is_state(s)]
    if not states:
        raise ValueError(
            "opt_state holds no K-BFGS state to start: pass what tx.init(params) returned, for a "
            "tx made with kbfgs or scale_by_kbfgs."
        )
    moments = _average_moments(loss_fn, params, batches)
    return jax.tree.map(
        lambda s: _with_moments(s, moments) if _is_state(s) else s, opt_state, is_leaf=_is_state
    )


def _is_state(node: Any) -> bool:
    return isinstance(node, ScaleByKBFGSState)


def _with_moments(state: ScaleByKBFGSState, moments: dict[str, jax.Array]) -> ScaleByKBFGSState:
    lacking = [path for path in state.layers if path not in moments]
    if lacking:
        raise ValueError(
            f"the loss does not reach layer {some(lacking)} of the state as nn.Dense; it reaches "
            f"{some(moments)}. Pass the loss and the parameters that the optimizer was made for."
        )
    # In an nnx.Optimizer each array is wrapped in a variable; they keep their places.
    plain = jax.tree.map(
        lambda leaf: jax.tree.leaves(leaf)[0],
        state,
        is_leaf=lambda node: not isinstance(node, (tuple, dict)),
    )
    warmed = ScaleByKBFGSState(
        count=plain.count,
        layers={
            path: factors.warm(layer_state, moments[path])
            for path, layer_state in plain.layers.items()
        },
    )
    return jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(warmed))


def _average_moments(loss_fn: LossFn, params: Any, batches: Iterable[tuple]) -> dict[str, Any]:
    """A by layer path, averaged over all examples of all batches."""
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
            programs[key] = jax.jit(_weighted_moments(call, rebuild))
        sums = programs[key](params, arrays)
        totals = sums if totals is None else jax.tree.map(jax.numpy.add, totals, sums)
    if totals is None:
        raise ValueError("batches is empty: warm_start needs at least one batch.")
    return {path: moment / weight for path, (moment, weight) in totals.items()}


def _weighted_moments(call: Callable, rebuild: Callable) -> Callable:
    def weigh(layer: LayerStatistics) -> tuple[jax.Array, jax.Array]:
        return layer.input_moment * layer.examples, layer.examples

    def run(params: Any, arrays: list) -> dict[str, tuple[jax.Array, jax.Array]]:
        params = rebuild(params)
        if nnx.is_model(params):
            measured = nnx.nnx_curvature_fn(call, params, arrays)(nnx.parameters(params))
        else:
            measured = curvature_fn(call, params, arrays)(params)
        return {path: weigh(layer) for path, layer in measured.layers.items()}

    return run
