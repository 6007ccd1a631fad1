"""One step of block K-BFGS, and its state.

The factors of a direction have learned from this step's inputs already, since these need no probe;
its length comes from the parabola of `trust`; the same examples at the point proposed then tell
whether the step is taken, and the output factors their pairs.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfqn_optax import block_inputs, block_state, direction, trust
from kfqn_optax.block_state import BlockState
from kfqn_optax.layers import Layer, named_leaves
from kfqn_optax.options import (
    Number,
    ScalarOrSchedule,
    check,
    check_decay,
    check_size,
    known,
    value_at,
)
from kfqn_optax.statistics import Statistics
from kfqn_optax.transform import like
from kfqn_optax.trust import Trust

# Unless told otherwise, curvature is measured in each of the first steps, later in every so many.
FIRST_STEPS, LATER_EVERY = 200, 4


class ScaleByBlockKBFGSState(NamedTuple):
    """State of `scale_by_block_kbfgs`.

    Attributes:
        count: number of steps, int32; schedules are evaluated at it.
        layers: curvature by layer path.
        momentum: running average of the gradient of the layers, by parameter path.
        averaged: how many gradients it has taken in, int32.
        trust: how far the next step may go.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    layers: dict[str, BlockState]
    momentum: dict[str, jax.Array]
    averaged: jax.Array
    trust: Trust


@dataclasses.dataclass(frozen=True)
class Settings:
    """The numbers of the method; see `scale_by_block_kbfgs`."""

    learning_rate: ScalarOrSchedule
    damping: ScalarOrSchedule
    pairs: Number
    window: Number
    input_rank: Number | None
    momentum: Number
    factor_decay: Number
    powell: Number
    update_every: ScalarOrSchedule | None
    max_factor_dim: Number | None

    def __post_init__(self):
        check("learning_rate", self.learning_rate, lambda v: v >= 0, "at least 0", schedule=True)
        check("damping", self.damping, lambda v: v > 0, "above 0", schedule=True)
        check_size("pairs", self.pairs)
        check_size("window", self.window, step=2)
        if self.input_rank is not None:
            check_size("input_rank", self.input_rank)
        check_decay("momentum", self.momentum)
        check_decay("factor_decay", self.factor_decay)
        check("powell", self.powell, lambda v: 0 < v < 1, "between 0 and 1")
        if self.update_every is not None and not callable(self.update_every):
            check_size("update_every", self.update_every)
        if self.max_factor_dim is not None:
            check_size("max_factor_dim", self.max_factor_dim)

    def measures_always(self) -> bool:
        """Whether curvature is known to be measured in every step."""
        every = self.update_every
        return not (every is None or callable(every)) and bool(known(every) == 1)

    def measures(self, count: jax.Array) -> jax.Array:
        """Whether curvature is measured in step ``count``; a schedule's values below 1 are as 1."""
        every = self.update_every
        if every is None:
            every = jnp.where(count < FIRST_STEPS, 1, LATER_EVERY)
        every = jnp.asarray(value_at(every, count)).astype(jnp.int32)
        return count % jnp.maximum(every, 1) == 0


def average(
    settings: Settings, updates: Any, state: ScaleByBlockKBFGSState
) -> tuple[ScaleByBlockKBFGSState, jax.Array]:
    """The state with the momentum of this step, and whether its gradient entered it.

    A gradient that is not finite does not.
    """
    G = _gradients(updates, state)
    usable = jnp.isfinite(sum(jnp.sum(g * g) for g in G.values()))
    momentum = {
        name: jnp.where(usable, settings.momentum * m + (1 - settings.momentum) * G[name], m)
        for name, m in state.momentum.items()
    }
    return state._replace(momentum=momentum, averaged=state.averaged + usable), usable


def step(
    settings: Settings,
    present: tuple[Layer, ...],
    updates: Any,
    state: ScaleByBlockKBFGSState,
    usable: jax.Array,
    params: Any,
    measured: Statistics | None,
    curvature_fn: Callable[..., Statistics] | None,
    sketches: int,
) -> tuple[Any, ScaleByBlockKBFGSState]:
    """One step, after `average`; the count is left to the caller."""
    gradients, G = named_leaves(updates), _gradients(updates, state)
    lr = value_at(settings.learning_rate, state.count)
    root = jnp.sqrt(jnp.asarray(value_at(settings.damping, state.count)))
    correction = 1 - jnp.asarray(settings.momentum) ** jnp.maximum(state.averaged, 1)

    # A takes in the batch, and the input factors q pairs of it: they need no probe.
    begun = {layer.path: state.layers[layer.path] for layer in present}
    trusted = state.trust
    if measured is not None:
        begun = block_inputs.begin(
            present, begun, measured.layers, settings.factor_decay, settings.powell, root
        )
        trusted = trust.begin(trusted, measured.loss)

    # The direction, and how far to go. M is the momentum over the correction, and so is P; numbers
    # are corrected in place of arrays.
    P, promised = direction.direction(present, begun, state.momentum)
    dtype = state.trust.radius.dtype
    correction = correction.astype(dtype)
    slope = _inner(G, P).astype(dtype) / correction
    curvature = promised.astype(dtype) / correction**2
    proposal = trust.propose(trusted, slope, curvature, jnp.asarray(lr, dtype))
    proposal = jax.tree.map(lambda number: jnp.where(usable, number, 0), proposal)
    length = proposal.length / correction / jnp.where(jnp.asarray(lr) > 0, lr, 1)
    steps = {name: jnp.where(length > 0, p * length.astype(p.dtype), 0) for name, p in P.items()}
    stepped = like(updates, gradients | steps, dtypes=params)
    state = state._replace(layers=begun)
    if measured is None or curvature_fn is None:
        return stepped, state

    # The same examples at the point proposed.
    probe = jax.tree.map(lambda p, u: (p + (-1 * lr) * u).astype(p.dtype), params, stepped)
    probed = curvature_fn(probe, moments=[], sketches=sketches)
    of_examples = named_leaves(measured.gradient)
    slope = _inner({name: of_examples[name] for name in P}, P).astype(dtype) / correction
    accepted, learned = trust.judge(
        trusted, proposal, slope, measured.loss.astype(dtype), probed.loss.astype(dtype)
    )
    kept = {name: jnp.where(accepted, step, 0) for name, step in steps.items()}
    layers = block_state.learn(
        present,
        begun,
        named_leaves(params),
        named_leaves(probe),
        measured.layers,
        probed.layers,
        settings.powell,
        root,
    )
    updates = like(updates, gradients | kept, dtypes=params)
    return updates, state._replace(layers=layers, trust=learned)


def _gradients(updates: Any, state: ScaleByBlockKBFGSState) -> dict[str, jax.Array]:
    """Those of the layers, by path, in the dtype of the momentum."""
    gradients = named_leaves(updates)
    return {name: gradients[name].astype(m.dtype) for name, m in state.momentum.items()}


def _inner(left: Mapping[str, jax.Array], right: Mapping[str, jax.Array]) -> jax.Array:
    return jnp.asarray(optax.tree.vdot(left, right))
