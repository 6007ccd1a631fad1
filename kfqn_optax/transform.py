"""One step of the whole family as an Optax gradient transformation, and its state.

K-BFGS, K-BFGS(L) and KFQN take the same step; their `Options` say what their factors are and which
pairs they learn from. `methods` has the three public transformations.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from kfqn_optax import checks, factors, intake, layer_state
from kfqn_optax import layers as layers_lib
from kfqn_optax.checks import MISSING
from kfqn_optax.direction import precondition
from kfqn_optax.layer_state import WARM, LayerState
from kfqn_optax.layers import Layer, named_leaves
from kfqn_optax.one_pass import anew
from kfqn_optax.options import Options, known, value_at
from kfqn_optax.statistics import Statistics


class ScaleByKBFGSState(NamedTuple):
    """State of `scale_by_kbfgs`, `scale_by_kbfgs_l` and `scale_by_kfqn`.

    Attributes:
        count: number of steps taken, int32; schedules are evaluated at it.
        layers: curvature by layer path.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    layers: dict[str, LayerState]


def quasi_newton(
    options: Options, layers: Iterable[Layer] | None
) -> optax.GradientTransformationExtraArgs:
    """The transformation for one set of options; see `methods.scale_by_kbfgs` for what it does.

    Args:
        options: of the method.
        layers: which layers; None for every ``kernel`` with two axes.
    """
    given = layers_lib.as_layers(layers)

    def init_fn(params: Any) -> ScaleByKBFGSState:
        if is_placeholder(params):
            return placeholder_state(
                ScaleByKBFGSState,
                given,
                lambda layer: layer_state.init(layer, jnp.float32, options),
            )
        layers = initial(
            params, given, lambda layer, dtype: layer_state.init(layer, dtype, options)
        )
        return ScaleByKBFGSState(jnp.zeros((), jnp.int32), layers)

    def update_fn(
        updates: Any,
        state: ScaleByKBFGSState,
        params: Any = None,
        *,
        curvature_fn: Callable[..., Statistics] | None = MISSING,
        **extra_args: Any,
    ) -> tuple[Any, ScaleByKBFGSState]:
        del extra_args
        count = jnp.asarray(optax.safe_increment(state.count))
        gradients = named_leaves(updates)
        present = layers_present(given, gradients)
        checks.check_state(present, state.layers, gradients)
        if not present:
            if callable(curvature_fn) and params is not None:
                # Nothing to learn; but other parameters than curvature_fn's are a mistake.
                measured = jax.eval_shape(lambda p: _ask(curvature_fn, p, moments=[]), params)
                checks.check_statistics(
                    present, measured, given is None, named_leaves(params), state.layers
                )
            return updates, ScaleByKBFGSState(count, state.layers)
        checks.check_arguments(params, curvature_fn, present)
        step = functools.partial(_step, options, given is None, present, updates, state, params)
        every = options.update_every
        if curvature_fn is None or known(every) == 1:
            updates, learned = step(curvature_fn)
        else:
            warm = [jnp.any(of_layer.stage == WARM) for of_layer in state.layers.values()]
            updates, learned = jax.lax.cond(
                (state.count % every == 0) | jnp.any(jnp.stack(warm)),
                lambda: step(curvature_fn),
                lambda: step(None, may_start=False),
            )
        return updates, ScaleByKBFGSState(count, learned)

    return optax.GradientTransformationExtraArgs(cast(Any, init_fn), cast(Any, update_fn))


def _step(
    options: Options,
    inferred: bool,
    present: tuple[Layer, ...],
    updates: Any,
    state: ScaleByKBFGSState,
    params: Any,
    curvature_fn: Callable[..., Statistics] | None,
    may_start: bool = True,
) -> tuple[Any, dict[str, LayerState]]:
    """One step: the updates that leave, and the layers' states.

    Args:
        options: of the method.
        inferred: whether the layers were told from the parameters alone.
        present: the layers.
        updates: M.
        state: as the previous step left it.
        params: the parameters.
        curvature_fn: None to keep the factors.
        may_start: False where no input factor can be waiting to be made from a warm start's A; to
            say so saves compiling that.
    """
    gradients, weights = named_leaves(updates), named_leaves(params)
    lr = value_at(options.learning_rate, state.count)
    root = jnp.sqrt(jnp.asarray(value_at(options.damping, state.count)))
    stored = [p for p, of_layer in state.layers.items() if of_layer.input_moment is not None]

    # The curvature at params; A takes it in, and at the start H_a is made from A.
    measured = None
    if curvature_fn is not None:
        measured = _ask(curvature_fn, params, moments=stored)
        checks.check_statistics(present, measured, inferred, weights, state.layers)
    held = {layer.path: state.layers[layer.path] for layer in present}
    begun = intake.begin(present, held, measured and measured.layers, options.factor_decay, root)
    if may_start:
        begun = _started(present, held, begun, curvature_fn, params, options, root)

    # The direction, with both factors as the previous step left them.
    directions = precondition(present, begun, gradients, lr, options.norm_constraint)
    updates = like(updates, gradients | directions, dtypes=params)
    if measured is None or curvature_fn is None:
        return updates, begun

    # The same examples at the point that this step proposes, in the words of
    # `optax.scale_by_learning_rate` and `apply_updates`, so that XLA computes it once.
    probe = jax.tree.map(lambda p, u: (p + (-1 * lr) * u).astype(p.dtype), params, updates)
    probed = _ask(curvature_fn, probe, moments=[])
    probe_weights = named_leaves(probe)

    # Each factor takes one pair; where A is not stored, from its product with a vector.
    unstored = [layer for layer in present if layer.path not in stored]
    products: dict[str, Any] = {}
    vectors = factors.input_steps(unstored, begun, measured.layers)
    if vectors:
        again = curvature_fn(params, moments=[], vectors=vectors)
        products = {path: again.layers[path].input_product for path in vectors}
    changes = {
        layer.path: factors.output_change(
            layer,
            layers_lib.to_matrices(layer, weights),
            layers_lib.to_matrices(layer, probe_weights),
            measured.layers[layer.path],
            probed.layers[layer.path],
        )
        for layer in present
    }
    learned = factors.learn(
        present, begun, measured.layers, probed.layers, products, changes, options, root
    )
    return updates, learned


def _started(
    present: tuple[Layer, ...],
    held: dict[str, LayerState],
    begun: dict[str, LayerState],
    curvature_fn: Callable[..., Statistics] | None,
    params: Any,
    options: Options,
    root: jax.Array,
) -> dict[str, LayerState]:
    """The layers after `intake.begin`, with input factors made from A where they start.

    What this needs (inverses, and the second moments of layers that do not store A) is computed in
    the first step only.
    """
    unstored = [
        path
        for path, state in held.items()
        if state.input_moment is None and isinstance(state.input, jax.Array)
    ]

    def make() -> tuple[dict[str, Any], dict[str, jax.Array]]:
        moments: dict[str, Any] = {}
        if unstored and curvature_fn is not None:
            measured = anew(curvature_fn)(params, moments=unstored)
            moments = {path: measured.layers[path].input_moment for path in unstored}
        return intake.start(present, held, begun, moments, options, root)

    starting = [jnp.any(intake.starts(held[path], begun[path])) for path in begun]
    inputs, stages = jax.lax.cond(
        jnp.any(jnp.stack(starting)),
        make,
        lambda: (
            {path: held[path].input for path in begun},
            {path: begun[path].stage for path in unstored},
        ),
    )
    return {
        path: of_layer._replace(input=inputs[path], stage=stages.get(path, of_layer.stage))
        for path, of_layer in begun.items()
    }


def _ask(curvature_fn: Callable[..., Statistics], params: Any, moments: list[str]) -> Statistics:
    """The statistics at ``params``; a plain function of the parameters will do."""
    try:
        inspect.signature(curvature_fn).bind(params, moments=moments)
    except (TypeError, ValueError):
        return curvature_fn(params)
    return curvature_fn(params, moments=moments)


def layers_present(given: tuple[Layer, ...] | None, leaves: dict[str, Any]) -> tuple[Layer, ...]:
    """The layers of a tree of parameters or gradients: those given, or those it shows.

    Of the layers given, those whose parameters are all masked out belong to somebody else.
    """
    if given is None:
        return layers_lib.infer_layers(leaves)
    return tuple(layer for layer in given if any(name in leaves for name in layer.parameter_paths))


def initial(
    params: Any,
    given: tuple[Layer, ...] | None,
    init: Callable[[Layer, Any], Any],
    check: Callable[[tuple[Layer, ...]], None] = lambda present: None,
) -> dict[str, Any]:
    """What is kept of each layer before the first step, by path.

    Args:
        params: the parameters.
        given: the layers, None for those that the parameters show.
        init: from a layer and the dtype of its factors to what is kept of it.
        check: refuses layers that the method cannot have.
    """
    leaves = named_leaves(params)
    checks.check_real(leaves)
    present = layers_present(given, leaves)
    layers_lib.check_layers(present, leaves)
    check(present)
    return {
        layer.path: init(layer, layers_lib.factor_dtype(leaves[layer.kernel_path].dtype))
        for layer in present
    }


def is_placeholder(params: Any) -> bool:
    """Whether this is what ``optax.tree.map_params`` puts in the place of all parameters.

    It wants to see where in a state the parameters go. The placeholder is one node without leaves
    that is no container.
    """
    container = params is None or isinstance(params, (Mapping, Sequence))
    return not container and layers_lib.is_hole(params)


def placeholder_state(
    state: Callable[..., Any], given: tuple[Layer, ...] | None, init: Callable[[Layer], Any]
) -> Any:
    """A state of the right structure, none of it parameters.

    Which layers there are is known only if they were given; else one leaf stands for them all.

    Args:
        state: its class, of a count and the layers.
        given: the layers, if they are known.
        init: what is kept of a layer.
    """
    count = jax.ShapeDtypeStruct((), jnp.int32)
    if given is None:
        return state(count, count)
    return state(count, jax.eval_shape(lambda: {layer.path: init(layer) for layer in given}))


def like(tree: Any, leaves: dict[str, jax.Array], dtypes: Any) -> Any:
    """A tree of the structure of ``tree`` from leaves by path, in the dtypes of another tree."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _, p: leaves[layers_lib.path_name(path)].astype(p.dtype), tree, dtypes
    )
