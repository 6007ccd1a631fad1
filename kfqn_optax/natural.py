"""One step of K-FAC and its kin as an Optax gradient transformation, and its state.

The methods differ in what they take the two second moments of a layer to be, and in how these are
damped; a `Rule` and a function `damped` say so. Everything else is here: what is measured, running
averages, inverses now and then, the direction.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from kfqn_optax import checks
from kfqn_optax import layers as layers_lib
from kfqn_optax import moments as moments_lib
from kfqn_optax.checks import MISSING
from kfqn_optax.direction import precondition
from kfqn_optax.layers import Layer, named_leaves
from kfqn_optax.moments import Damped, Moments, MomentState
from kfqn_optax.options import (
    Number,
    ScalarOrSchedule,
    check,
    check_decay,
    check_size,
    inverses_due,
    is_damping,
    value_at,
)
from kfqn_optax.statistics import CurvatureFn, LayerStatistics
from kfqn_optax.transform import initial, is_placeholder, layers_present, like, placeholder_state


class ScaleByKFACState(NamedTuple):
    """State of `scale_by_kfac`.

    Attributes:
        count: number of steps taken, int32; schedules are evaluated at it, and inverses made by it.
        layers: curvature by layer path.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    layers: dict[str, MomentState]


class Rule(NamedTuple):
    """What a method measures.

    Attributes:
        name: for messages.
        state: the class of its state.
        asked: from the layers' paths to the keyword arguments of ``curvature_fn``.
        moments: from what that returns of a layer to the two second moments.
        lookups: whether it can take the lookups of an embedding.
    """

    name: str
    state: type[ScaleByKFACState]
    asked: Callable[[Sequence[str]], dict[str, Any]]
    moments: Callable[[LayerStatistics], Moments]
    lookups: bool


@dataclasses.dataclass(frozen=True)
class Settings:
    """The numbers that the methods have in common.

    Attributes:
        learning_rate: alpha, at least 0, a number or a schedule; only ``norm_constraint`` reads it.
        damping: lambda, above 0; a number or a schedule.
        factor_decay: decay of the running averages of the second moments, in [0, 1).
        inverse_every: inverses are made in the first so many steps and then in every so-manieth.
        norm_constraint: the most that the squared length of the step in the metric of the factors
            may be, above 0; None for no limit.
        max_factor_dim: no side may be longer; None for `options.MAX_FACTOR_DIM`.
    """

    learning_rate: ScalarOrSchedule
    damping: ScalarOrSchedule
    factor_decay: Number
    inverse_every: Number
    norm_constraint: Number | None
    max_factor_dim: Number | None

    def __post_init__(self):
        check("learning_rate", self.learning_rate, lambda v: v >= 0, "at least 0", schedule=True)
        check("damping", self.damping, lambda v: v > 0, "above 0", schedule=True)
        check_decay("factor_decay", self.factor_decay)
        check_size("inverse_every", self.inverse_every)
        if self.norm_constraint is not None:
            check("norm_constraint", self.norm_constraint, lambda v: v > 0, "above 0, or None")
        if self.max_factor_dim is not None:
            check_size("max_factor_dim", self.max_factor_dim)


def natural_gradient(
    rule: Rule,
    settings: Settings,
    damped: Callable[[jax.Array, jax.Array, jax.Array], Damped],
    layers: Iterable[Layer] | None,
) -> optax.GradientTransformationExtraArgs:
    """The transformation of one method; see `kfac_rule.scale_by_kfac` for what it does.

    Args:
        rule: what is measured.
        settings: the numbers.
        damped: from a layer's two second moments and sqrt(lambda) to what is inverted.
        layers: which layers; None for every ``kernel`` with two axes.
    """
    given = layers_lib.as_layers(layers)

    def init_fn(params: Any) -> ScaleByKFACState:
        if is_placeholder(params):
            return placeholder_state(
                rule.state, given, lambda layer: moments_lib.init(layer, jnp.float32)
            )
        check_sides = functools.partial(
            checks.check_sides,
            method=rule.name,
            max_factor_dim=settings.max_factor_dim,
            lookups=rule.lookups,
        )
        held = initial(params, given, moments_lib.init, check_sides)
        return rule.state(count=jnp.zeros((), jnp.int32), layers=held)

    def update_fn(
        updates: Any,
        state: ScaleByKFACState,
        params: Any = None,
        *,
        curvature_fn: CurvatureFn | None = MISSING,
        **extra_args: Any,
    ) -> tuple[Any, ScaleByKFACState]:
        del extra_args
        count = jnp.asarray(optax.safe_increment(state.count))
        gradients = named_leaves(updates)
        present = layers_present(given, gradients)
        checks.check_state(present, state.layers, gradients)
        if not present:
            if callable(curvature_fn) and params is not None:
                # Nothing to learn; but other parameters than curvature_fn's are a mistake.
                seen = jax.eval_shape(lambda p: curvature_fn(p, **rule.asked([])), params)
                checks.check_statistics(
                    present, seen, given is None, named_leaves(params), state.layers
                )
            return updates, rule.state(count, state.layers)
        checks.check_arguments(params, curvature_fn, present, rule.name)
        root = jnp.sqrt(jnp.asarray(value_at(settings.damping, state.count)))
        usable = is_damping(root)  # while a schedule's is not, what is known stays as it is

        # The running averages take in the batch.
        batches: dict[str, Moments | None] = dict.fromkeys(state.layers)
        if curvature_fn is not None:
            measured = curvature_fn(params, **rule.asked(list(state.layers)))
            weights = named_leaves(params)
            checks.check_statistics(present, measured, given is None, weights, state.layers)
            batches |= {path: _moments(rule, path, measured.layers[path]) for path in batches}
        states = {
            layer.path: moments_lib.take_in(
                state.layers[layer.path], batches[layer.path], settings.factor_decay, usable
            )
            for layer in present
        }

        # Inverses, if this is a step for them: this batch is in them already.
        states = moments_lib.refresh(
            present,
            state.layers,
            states,
            lambda A, G: damped(A, G, root.astype(G.dtype)),
            inverses_due(state.count, settings.inverse_every),
            usable,
        )

        lr = value_at(settings.learning_rate, state.count)
        directions = precondition(present, states, gradients, lr, settings.norm_constraint)
        return like(updates, gradients | directions, dtypes=params), rule.state(count, states)

    return optax.GradientTransformationExtraArgs(cast(Any, init_fn), cast(Any, update_fn))


def _moments(rule: Rule, path: str, measured: LayerStatistics) -> Moments:
    batch = rule.moments(measured)
    if batch.input is None or batch.output is None:
        raise ValueError(
            f"curvature_fn did not measure the second moments of layer {path!r} that {rule.name} "
            "asked for. A function of your own must pass its keyword arguments on to "
            "kfqn_optax.curvature_fn's: def curvature_fn(params, **asked)."
        )
    return batch
