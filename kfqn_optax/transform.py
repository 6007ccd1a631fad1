"""`scale_by_kbfgs`: one step of K-BFGS as an Optax gradient transformation, and its state."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from kfqn_optax import checks, factors
from kfqn_optax import layers as layers_lib
from kfqn_optax.checks import MISSING
from kfqn_optax.direction import constrain, precondition
from kfqn_optax.factors import LayerState
from kfqn_optax.layers import Layer, named_leaves
from kfqn_optax.options import Number, Options, ScalarOrSchedule, value_at
from kfqn_optax.statistics import Statistics


class ScaleByKBFGSState(NamedTuple):
    """State of `scale_by_kbfgs`.

    Attributes:
        count: number of steps taken, int32; schedules are evaluated at it.
        layers: curvature by layer path.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    layers: dict[str, LayerState]


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
    come in are M, those that leave are ``H_a M H_g``, to be scaled by minus the learning rate.
    Other parameters pass unchanged.

    ``update(updates, state, params, *, curvature_fn, **extra_args)`` measures the curvature twice,
    by ``curvature_fn(params)`` and at the probe, ``params`` minus ``learning_rate`` times the
    updates that leave. With ``curvature_fn=None`` the factors stay as they are for this step.
    Unknown extra arguments are ignored.

    ``norm_constraint`` limits the step. With P the preconditioned M, ``learning_rate^2 <M, P>`` is
    the squared length of the step in the metric of the factors; where it is above the limit, P of
    all layers is scaled down together until that length is the limit (as K-FAC implementations do).
    It is in units of the loss: half of it is the curvature term of the factors' quadratic model.
    The published method has no such limit and can diverge from one batch to the next, at the
    authors' own settings too.

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
        norm_constraint: the most that the squared length of the step in the metric of the factors
            may be, above 0. None, the default, is K-BFGS as published.
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
        checks.check_real(leaves)
        present = layers_present(given, leaves)
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
        curvature_fn: Callable[[Any], Statistics] | None = MISSING,
        **extra_args: Any,
    ) -> tuple[Any, ScaleByKBFGSState]:
        del extra_args
        count = jnp.asarray(optax.safe_increment(state.count))
        gradients = named_leaves(updates)
        present = layers_present(given, gradients)
        checks.check_state(present, state.layers, gradients)
        if not present:
            return updates, ScaleByKBFGSState(count, state.layers)
        checks.check_arguments(params, curvature_fn, present)
        weights = named_leaves(params)
        lr, root = value_at(options.learning_rate, state.count), _root(options, state.count)

        # The curvature at params; A takes it in, and at the start H_a is made from A.
        measured = None if curvature_fn is None else curvature_fn(params)
        if measured is not None:
            checks.check_statistics(present, measured, given is None, weights, state.layers)
        begun = {
            layer.path: factors.begin(
                state.layers[layer.path],
                None if measured is None else measured.layers[layer.path],
                options,
                root.astype(state.layers[layer.path].s.dtype),
            )
            for layer in present
        }

        # The direction, with both factors as the previous step left them.
        directions = {}
        for layer in present:
            directions |= precondition(layer, begun[layer.path], gradients)
        directions = constrain(directions, gradients, lr, options.norm_constraint)
        updates = _like(updates, gradients | directions, dtypes=params)
        if measured is None:
            return updates, ScaleByKBFGSState(count, begun)

        # The same examples at the point that this step proposes.
        probe = jax.tree.map(lambda p, u: (p - lr * u).astype(p.dtype), params, updates)
        probed = cast(Callable, curvature_fn)(probe)
        probe_weights = named_leaves(probe)

        # Each factor takes one pair.
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

    return optax.GradientTransformationExtraArgs(init_fn, cast(Any, update_fn))


def layers_present(given: tuple[Layer, ...] | None, leaves: dict[str, Any]) -> tuple[Layer, ...]:
    """The layers of a tree of parameters or gradients: those given, or those it shows.

    Of the layers given, those whose parameters are all masked out belong to somebody else.
    """
    if given is None:
        return layers_lib.infer_layers(leaves)
    return tuple(layer for layer in given if any(name in leaves for name in layer.parameter_paths))


def _root(options: Options, count: jax.Array) -> jax.Array:
    """sqrt(lambda): the damping of A and mu_2 of double damping."""
    return jnp.sqrt(jnp.asarray(value_at(options.damping, count)))


def _like(tree: Any, leaves: dict[str, jax.Array], dtypes: Any) -> Any:
    """A tree of the structure of ``tree`` from leaves by path, in the dtypes of another tree."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _, p: leaves[layers_lib.path_name(path)].astype(p.dtype), tree, dtypes
    )
