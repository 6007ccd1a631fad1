"""Second moments from whole batches, before the first step.

The authors begin with one pass over the training set at the initial weights: A is the second moment
over all of it, and the input factors start as its damped inverse. Without it, A starts from the
first batch alone. K-FAC and its kin average both of their moments in the same way.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp

from kfqn_optax import kfac_rule, layer_state, moments, nnx, tkfac_rule
from kfqn_optax.capture import curvature_fn
from kfqn_optax.layers import some
from kfqn_optax.lbfgs import Memory
from kfqn_optax.loss import LossFn, split_arrays
from kfqn_optax.natural import ScaleByKFACState
from kfqn_optax.statistics import LayerStatistics, is_usable
from kfqn_optax.transform import ScaleByKBFGSState

_RULES = {rule.state: rule for rule in (kfac_rule.RULE, tkfac_rule.RULE)}


def warm_start(opt_state: Any, loss_fn: LossFn, params: Any, batches: Iterable[tuple]) -> Any:
    """Averages second moments over batches at ``params`` and puts them into the state.

    Each batch counts by its number of examples. The next step makes the input factors from A (with
    the damping of that step) and does not let its own batch into A. `kfac` and `tkfac` have moments
    of both sides, for which the loss must draw its targets, and the next step makes both inverses;
    its own batch enters the moments as any other.

    Args:
        opt_state: state of `kbfgs`, `kfac`, `scale_by_kbfgs` and their like, or of anything that
            holds one of them (``optax.chain``, ``optax.partition``, ``optax.inject_hyperparams``,
            the ``opt_state`` of an ``nnx.Optimizer``). `mbf` has no warm start.
        loss_fn: ``loss_fn(params, *batch)``, as in `curvature_fn`.
        params: all the parameters; for an NNX optimizer the model, and ``loss_fn(model, *batch)``.
        batches: an iterable of tuples, each the arguments of ``loss_fn`` after ``params``.

    Returns:
        A new state of the same structure.

    Raises:
        ValueError: if there are no batches, no state of ours in ``opt_state``, a layer of that
            state which the loss does not reach, or one whose second moments are not finite or too
            large.
        TypeError: if a batch is not a tuple.
    """
    states = [s for s in jax.tree.leaves(opt_state, is_leaf=_is_state) if _is_state(s)]
    if not states:
        raise ValueError(
            "opt_state holds no state to start, of kbfgs, kbfgs_l, kfqn, kfac or tkfac: pass what "
            "tx.init(params) returned, for a tx made with one of these, or with the scale_by_ "
            "function of the same name. Other methods have no warm start."
        )
    averages = _averages(loss_fn, params, batches, _wanted(states))
    return jax.tree.map(
        lambda s: _warmed(s, averages) if _is_state(s) else s, opt_state, is_leaf=_is_state
    )


State = ScaleByKBFGSState | ScaleByKFACState


def _is_state(node: Any) -> bool:
    return isinstance(node, State)


class _Wanted(NamedTuple):
    """What is averaged.

    Attributes:
        asked: keyword arguments of ``curvature_fn``.
        moments: by layer path, from the layer's statistics to two arrays, each of which is a mean
            over examples. Other layers' are A, perhaps, and the number of positions.
    """

    asked: dict[str, Any]
    moments: dict[str, Callable[[LayerStatistics], moments.Moments]]


def _wanted(states: list[Any]) -> _Wanted:
    asked: dict[str, Any] = {"moments": []}
    of_layers = {}
    for state in states:
        rule = _RULES.get(type(state))
        if rule is None:
            asked["moments"] += [path for path in state.layers if _takes_moment(state, path)]
            continue
        for name, paths in rule.asked(list(state.layers)).items():
            asked[name] = [*asked.get(name, []), *paths]
        of_layers |= dict.fromkeys(state.layers, rule.moments)
    return _Wanted(asked, of_layers)


def _takes_moment(state: ScaleByKBFGSState, path: str) -> bool:
    """Whether a layer's input factor is made from A; one of limited memory is not."""
    return not isinstance(state.layers[path].input, Memory)


def _warmed(state: State, averages: dict[str, Any]) -> State:
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
    warm: Any = moments.warm if isinstance(state, ScaleByKFACState) else layer_state.warm
    warmed = type(state)(
        count=plain.count,
        layers={path: warm(of_layer, *averages[path]) for path, of_layer in plain.layers.items()},
    )
    return jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(warmed))


def _averages(
    loss_fn: LossFn, params: Any, batches: Iterable[tuple], wanted: _Wanted
) -> dict[str, tuple[jax.Array | None, jax.Array]]:
    """A (of the layers wanted) and T, or both moments, averaged over all examples."""
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
    inputs = {path: moment for path, (moment, _) in averages.items() if moment is not None}
    outputs = {path: averages[path][1] for path in wanted.moments if path in averages}
    _check_finite("inputs", inputs)
    _check_finite("output gradients", outputs)
    return averages


def _check_finite(side: str, moments: dict[str, jax.Array]) -> None:
    """Refuses second moments that no factor can be made of, unless they are traced."""
    usable = {
        path: is_usable(jnp.sum(jnp.abs(moment), axis=-1))
        for path, moment in moments.items()
        if not isinstance(moment, jax.core.Tracer)
    }
    wrong = [path for path, fine in jax.device_get(usable).items() if not fine]
    if wrong:
        raise ValueError(
            f"the second moment of the {side} of layer {some(wrong)}, averaged over the batches, "
            "is not finite or too large: look for numbers in the batches that are infinite, not "
            "numbers, or huge, or for such parameters."
        )


def _sums(call: Callable, rebuild: Callable, wanted: _Wanted) -> Callable:
    """One batch: by layer path, what is averaged times the number of examples; that number."""

    def weigh(path: str, layer: LayerStatistics) -> tuple[Any, jax.Array]:
        def times(moment: jax.Array) -> jax.Array:
            axes = moment.ndim - layer.examples.ndim
            return moment * layer.examples.reshape(layer.examples.shape + (1,) * axes)

        if path in wanted.moments:
            both = wanted.moments[path](layer)
            return (times(both.input), times(both.output)), layer.examples
        moment = None if layer.input_moment is None else times(layer.input_moment)
        return (moment, layer.rows), layer.examples

    def run(params: Any, arrays: list) -> dict[str, Any]:
        params = rebuild(params)
        if nnx.is_model(params):
            measure = nnx.nnx_curvature_fn(call, params, arrays)
            measured = measure(nnx.parameters(params), **wanted.asked)
        else:
            measured = curvature_fn(call, params, arrays)(params, **wanted.asked)
        return {path: weigh(path, layer) for path, layer in measured.layers.items()}

    return run


def _divide(total: jax.Array, weight: jax.Array) -> jax.Array:
    return total / weight.reshape(weight.shape + (1,) * (total.ndim - weight.ndim))
