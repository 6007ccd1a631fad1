"""K-BFGS as Optax gradient transformations: the state, `scale_by_kbfgs`, and the chain `kbfgs`."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfqn_optax import factors, layers as layers_lib
from kfqn_optax.direction import constrain, precondition
from kfqn_optax.factors import LayerState
from kfqn_optax.layers import Layer, named_leaves
from kfqn_optax.options import Number, Options, ScalarOrSchedule, check, check_decay, value_at
from kfqn_optax.statistics import Statistics

_MISSING = object()
KBFGS, FALLBACK = "kbfgs", "fallback"


class ScaleByKBFGSState(NamedTuple):
    """State of `scale_by_kbfgs`.

    Attributes:
        count: number of steps taken, int32; schedules are evaluated at it.
        layers: curvature by layer path.
    """

    count: jax.Array
    layers: dict[str, LayerState]


class MomentumState(NamedTuple):
    """State of the momentum in `kbfgs`.

    Attributes:
        momentum: M, running average of the gradient, like the parameters, in the factors' dtype.
    """

    momentum: Any


def kbfgs(
    learning_rate: ScalarOrSchedule,
    damping: ScalarOrSchedule = 0.3,
    *,
    momentum: Number = 0.9,
    weight_decay: Number = 0.0,
    factor_decay: Number = 0.9,
    pair_decay: Number = 0.9,
    powell: Number = 0.2,
    curvature_tolerance: Number = 1e-4,
    norm_constraint: Number | None = None,
    layers: Iterable[Layer] | None = None,
    fallback: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """K-BFGS, the Kronecker-factored quasi-Newton method of Goldfarb, Ren and Bahamou (2020).

    Weight decay is added to the gradient, then momentum ``M <- momentum M + (1 - momentum) G`` is
    taken (not bias-corrected), then `scale_by_kbfgs`, then the learning rate. Layers are dense
    layers; every other parameter goes to ``fallback``, with a state of its own and without the
    weight decay and momentum given here. ``summary(opt_state, params)`` prints which goes where.

    Args:
        learning_rate: alpha; a number at least 0, or a schedule.
        damping: lambda; a number above 0, or a schedule. 0.3 is what the authors use with learning
            rate 0.3 on autoencoders; smaller is faster until it diverges.
        momentum: decay of M, in [0, 1).
        weight_decay: tau, at least 0; ``tau`` times kernel and bias enters the gradient.
        factor_decay: decay of the running second moment of layer inputs, in [0, 1).
        pair_decay: decay of the running averages of s and y, in [0, 1).
        powell: mu_1 of Powell's damping, in (0, 1).
        curvature_tolerance: a pair is refused unless ``s.y > tolerance |s|^2 |v|``; at least 0.
        norm_constraint: the most that ``learning_rate^2 <M, P>`` may be, above 0: longer steps are
            shortened to it. None, the default, is K-BFGS as published.
        layers: which layers, from `find_layers`. By default every ``kernel`` with two axes in the
            parameters is a dense layer.
        fallback: what updates all other parameters; ``optax.adam(learning_rate)`` by default.

    Returns:
        A transformation whose ``update`` needs ``params`` and the extra argument ``curvature_fn``:

            tx.update(grads, state, params, curvature_fn=kfqn.curvature_fn(loss_fn, params, batch))

        See `scale_by_kbfgs` for ``curvature_fn=None`` and for errors.

    Raises:
        TypeError, ValueError: for an argument that is not a number or out of range, by name.

    Examples:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, optax, kfqn_optax as kfqn
        >>> model = nn.Dense(1)
        >>> x = jnp.arange(12.0).reshape(6, 2) / 12
        >>> def loss_fn(params, x):
        ...     return jnp.mean((model.apply(params, x) - x.sum(axis=1, keepdims=True)) ** 2)
        >>> params = model.init(jax.random.key(0), x)
        >>> tx = kfqn.kbfgs(learning_rate=0.3)
        >>> state = tx.init(params)
        >>> @jax.jit
        ... def step(params, state):
        ...     grads = jax.grad(loss_fn)(params, x)
        ...     updates, state = tx.update(
        ...         grads, state, params, curvature_fn=kfqn.curvature_fn(loss_fn, params, x))
        ...     return optax.apply_updates(params, updates), state
        >>> before = loss_fn(params, x)
        >>> for _ in range(30):
        ...     params, state = step(params, state)
        >>> bool(loss_fn(params, x) < before / 10)
        True

    References:
        Goldfarb, Ren, Bahamou, `Practical Quasi-Newton Methods for Training Deep Neural Networks
        <https://arxiv.org/abs/2006.08877>`_, NeurIPS 2020.
    """
    check_decay("momentum", momentum)
    check("weight_decay", weight_decay, lambda v: v >= 0, "at least 0")
    layers = layers_lib.as_layers(layers)
    chosen = optax.chain(
        optax.identity()
        if isinstance(weight_decay, (int, float)) and weight_decay == 0
        else optax.add_decayed_weights(weight_decay),
        _momentum(momentum),
        scale_by_kbfgs(
            learning_rate,
            damping,
            factor_decay=factor_decay,
            pair_decay=pair_decay,
            powell=powell,
            curvature_tolerance=curvature_tolerance,
            norm_constraint=norm_constraint,
            layers=layers,
        ),
        optax.scale_by_learning_rate(learning_rate),
    )
    others = optax.adam(learning_rate) if fallback is None else fallback

    def labels(tree: Any) -> Any:
        leaves = named_leaves(tree)
        _check_real(leaves)
        mine = {p for layer in _layers_present(layers, leaves) for p in layer.parameter_paths}
        return jax.tree_util.tree_map_with_path(
            lambda path, _: KBFGS if layers_lib.path_name(path) in mine else FALLBACK, tree
        )

    return optax.partition({KBFGS: chosen, FALLBACK: others}, labels)


def scale_by_kbfgs(
    learning_rate: ScalarOrSchedule,
    damping: ScalarOrSchedule = 0.3,
    *,
    factor_decay: Number = 0.9,
    pair_decay: Number = 0.9,
    powell: Number = 0.2,
    curvature_tolerance: Number = 1e-4,
    norm_constraint: Number | None = None,
    layers: Iterable[Layer] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Preconditions the updates of dense layers by their two K-BFGS factors.

    Algorithm 2 of the paper without weight decay, momentum and the step itself: the updates that
    come in are M, those that leave are ``H_a M H_g``, to be scaled by minus the learning rate. Other
    parameters pass unchanged.

    ``update(updates, state, params, *, curvature_fn, **extra_args)`` measures the curvature twice,
    by ``curvature_fn(params)`` and at the probe, ``params`` minus ``learning_rate`` times the
    updates that leave. With ``curvature_fn=None`` the factors stay as they are for this step.
    Unknown extra arguments are ignored.

    ``norm_constraint`` limits the step. With P the preconditioned M, ``learning_rate^2 <M, P>`` is
    the squared length of the step in the metric of the factors, twice the change of the loss that
    their quadratic model predicts for it; where it is above the limit, P of all layers is scaled
    down to meet it (as K-FAC implementations do). The published method has no such limit and can
    diverge from one batch to the next, at the authors' own settings too.

    Factors and averages are float32 for parameters of float32 or fewer bits, float64 for float64;
    the updates that leave have the parameter's dtype.

    Args:
        learning_rate: of the step at whose end the curvature is measured; give the same to
            ``optax.scale_by_learning_rate`` behind this. A number or a schedule.
        damping: lambda; a number above 0, or a schedule.
        factor_decay: decay of the running second moment of layer inputs, in [0, 1).
        pair_decay: decay of the running averages of s and y, in [0, 1).
        powell: mu_1 of Powell's damping, in (0, 1).
        curvature_tolerance: a pair is refused unless ``s.y > tolerance |s|^2 |v|``; at least 0.
        norm_constraint: the most that ``learning_rate^2 <M, P>`` may be, above 0: longer steps are
            shortened to it. None, the default, is K-BFGS as published.
        layers: which layers, from `find_layers`; by default every ``kernel`` with two axes.

    Returns:
        The transformation. Its ``init`` raises for a layer that cannot be told from its parameters
        alone and for parameters that are not real floating-point numbers. Its ``update`` raises
        ``TypeError`` when ``curvature_fn`` is left out, and ``ValueError`` when the parameters, the
        statistics and the state do not have the same layers. A tree without layers needs neither
        ``params`` nor ``curvature_fn``.

    References:
        Goldfarb, Ren, Bahamou, `Practical Quasi-Newton Methods for Training Deep Neural Networks
        <https://arxiv.org/abs/2006.08877>`_, NeurIPS 2020, Algorithm 2.
    """
    options = Options(
        learning_rate, damping, factor_decay, pair_decay, powell, curvature_tolerance,
        norm_constraint,
    )  # fmt: skip
    given = layers_lib.as_layers(layers)

    def init_fn(params: Any) -> ScaleByKBFGSState:
        leaves = named_leaves(params)
        _check_real(leaves)
        present = _layers_present(given, leaves)
        layers_lib.check_layers(present, leaves)
        return ScaleByKBFGSState(
            count=jnp.zeros((), jnp.int32),
            layers={
                layer.path: factors.init(
                    layer, layers_lib.factor_dtype(leaves[layer.kernel_path].dtype)
                )
                for layer in present
            },
        )

    def update_fn(
        updates: Any,
        state: ScaleByKBFGSState,
        params: Any = None,
        *,
        curvature_fn: Callable[[Any], Statistics] | None | object = _MISSING,
        **extra_args: Any,
    ) -> tuple[Any, ScaleByKBFGSState]:
        del extra_args
        count = optax.safe_increment(state.count)
        gradients = named_leaves(updates)
        present = _layers_present(given, gradients)
        _check_state(present, state, gradients)
        if not present:
            return updates, ScaleByKBFGSState(count, state.layers)
        _check_arguments(params, curvature_fn, present)
        weights = named_leaves(params)
        lr, root = value_at(options.learning_rate, state.count), _root(options, state.count)

        # Step 1: the curvature at params. Steps 0 and 3: A, and H_a at the start.
        measured = None if curvature_fn is None else curvature_fn(params)
        if measured is not None:
            _check_statistics(present, measured, given is None, weights, state)
        begun = {
            layer.path: factors.begin(
                state.layers[layer.path],
                None if measured is None else measured.layers[layer.path],
                options,
                root.astype(state.layers[layer.path].s.dtype),
            )
            for layer in present
        }

        # Step 4: the direction, with both factors as the previous step left them.
        directions = {}
        for layer in present:
            directions |= precondition(layer, begun[layer.path], gradients)
        directions = constrain(directions, gradients, lr, options.norm_constraint)
        updates = _like(updates, gradients | directions, dtypes=params)
        if measured is None:
            return updates, ScaleByKBFGSState(count, begun)

        # Step 5: the same examples at the point that this step proposes.
        probe = jax.tree.map(lambda p, u: (p - lr * u).astype(p.dtype), params, updates)
        probed = curvature_fn(probe)
        probe_weights = named_leaves(probe)

        # Steps 6 and 7: each factor takes one pair.
        learned = {}
        for layer in present:
            before = layers_lib.to_matrix(layer, weights)
            learned[layer.path] = factors.learn(
                begun[layer.path],
                measured.layers[layer.path],
                probed.layers[layer.path],
                before,
                layers_lib.to_matrix(layer, probe_weights) - before,
                options,
                root.astype(before.dtype),
            )
        return updates, ScaleByKBFGSState(count, learned)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _momentum(decay: Number) -> optax.GradientTransformation:
    """``M <- decay M + (1 - decay) G``, kept in the factors' dtype; not bias-corrected.

    As ``optax.ema(decay, debias=False)``, which however keeps bfloat16 averages of bfloat16
    gradients.
    """

    def init_fn(params: Any) -> MomentumState:
        return MomentumState(
            jax.tree.map(lambda p: jnp.zeros(p.shape, layers_lib.factor_dtype(p.dtype)), params)
        )

    def update_fn(updates: Any, state: MomentumState, params: Any = None):
        del params
        updates = jax.tree.map(
            lambda m, g: (decay * m + (1 - decay) * g.astype(m.dtype)).astype(m.dtype),
            state.momentum,
            updates,
        )
        return updates, MomentumState(updates)

    return optax.GradientTransformation(init_fn, update_fn)


def _layers_present(given: tuple[Layer, ...] | None, leaves: dict[str, Any]) -> tuple[Layer, ...]:
    """The layers of a tree of parameters or gradients: those given, or those it shows.

    Of the layers given, those whose parameters are all masked out belong to somebody else.
    """
    if given is None:
        return layers_lib.infer_layers(leaves)
    return tuple(
        layer
        for layer in given
        if any(name in leaves for name in layer.parameter_paths)
    )


def _root(options: Options, count: jax.Array) -> jax.Array:
    """sqrt(lambda): lambda_A and mu_2 of DESIGN section 4."""
    return jnp.sqrt(jnp.asarray(value_at(options.damping, count)))


def _like(tree: Any, leaves: dict[str, jax.Array], dtypes: Any) -> Any:
    """A tree of the structure of ``tree`` from leaves by path, in the dtypes of another tree."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _, p: leaves[layers_lib.path_name(path)].astype(p.dtype), tree, dtypes
    )


# --- what can be wrong with the input -----------------------------------------------------------


def _check_real(leaves: dict[str, Any]) -> None:
    for name, leaf in leaves.items():
        if jnp.issubdtype(leaf.dtype, jnp.integer) or leaf.dtype == bool:
            raise TypeError(
                f"parameter {name!r} has dtype {leaf.dtype}, which has no gradient. Leave it out "
                "with optax.masked or optax.partition, or keep it outside the parameters."
            )


def _check_arguments(params: Any, curvature_fn: Any, present: tuple[Layer, ...]) -> None:
    names = layers_lib.some(layer.path for layer in present)
    if params is None:
        raise ValueError(
            f"K-BFGS needs the parameters to precondition {names}: call "
            "tx.update(grads, state, params, curvature_fn=...)."
        )
    if curvature_fn is _MISSING:
        raise TypeError(
            "update() is missing the keyword argument curvature_fn, which K-BFGS needs for "
            f"{names}: pass curvature_fn=kfqn_optax.curvature_fn(loss_fn, params, *args) with the "
            "arguments of the gradient, or curvature_fn=None to keep the factors in this step."
        )
    if curvature_fn is not None and not callable(curvature_fn):
        raise TypeError(
            "curvature_fn must be a function from parameters to statistics, as "
            f"kfqn_optax.curvature_fn(loss_fn, params, *args) makes it, got {curvature_fn!r}."
        )


def _check_state(
    present: tuple[Layer, ...], state: ScaleByKBFGSState, gradients: dict[str, Any]
) -> None:
    layers_lib.check_layers(present, gradients)
    expected = {layer.path: (layer.d_in, layer.d_out) for layer in present}
    held = {path: (s.input.shape[-1], s.output.shape[-1]) for path, s in state.layers.items()}
    wrong = sorted(path for path in {**expected, **held} if expected.get(path) != held.get(path))
    if wrong:
        path = wrong[0]
        raise ValueError(
            "the state of K-BFGS was made for other parameters: layer "
            f"{path!r} has (d_in, d_out) = {expected.get(path, 'no parameters')} in the gradients "
            f"and {held.get(path, 'no factors')} in the state (differing: "
            f"{layers_lib.some(wrong)}). Call tx.init(params) on the parameters that are trained."
        )


def _check_statistics(
    present: tuple[Layer, ...],
    measured: Statistics,
    all_layers: bool,
    weights: dict[str, Any],
    state: ScaleByKBFGSState,
) -> None:
    lacking = [layer.path for layer in present if layer.path not in measured.layers]
    if lacking:
        raise ValueError(
            f"curvature_fn measured no layer {layers_lib.some(lacking)}, which the optimizer "
            f"preconditions; it measured {layers_lib.some(measured.layers)}. Either the loss does "
            "not call these as nn.Dense (pass layers=kfqn_optax.find_layers(loss_fn, params, "
            "*args), and they go to the fallback), or curvature_fn was given another model's "
            "loss or parameters of another nesting."
        )
    surplus = [
        path
        for path in measured.layers
        if all_layers
        and path not in state.layers
        and any(layers_lib.join(path, name) in weights for name in ("kernel", "bias"))
    ]
    if surplus:
        raise ValueError(
            f"curvature_fn measured {layers_lib.some(surplus)}, for which the state has no "
            "factors. Call tx.init(params) on the parameters that are trained."
        )
    for layer in present:
        shape = measured.layers[layer.path].input_mean.shape[-1:]
        shape += measured.layers[layer.path].cotangent_mean.shape[-1:]
        if shape != (layer.d_in, layer.d_out):
            raise ValueError(
                f"curvature_fn measured layer {layer.path!r} with (d_in, d_out) = {shape}, the "
                f"optimizer has {(layer.d_in, layer.d_out)} (d_in counts the bias). Kernel and "
                "bias must go to the same optimizer: change the mask, or give curvature_fn the "
                "same model."
            )
