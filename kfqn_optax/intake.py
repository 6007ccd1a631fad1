"""What a step does to a layer before its direction: A takes in the batch, the input factor starts.

All layers at once, arguments by layer path. With blocks every array has an axis of blocks in front.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfqn_optax.inverse import Diagonal, Remake, remake
from kfqn_optax.layer_state import EMPTY, RUNNING, WARM, LayerState
from kfqn_optax.layers import Layer
from kfqn_optax.options import Number, Options, dampings, is_damping
from kfqn_optax.packed import Rows
from kfqn_optax.statistics import LayerStatistics, is_usable


class _Intake(NamedTuple):
    """How a layer takes in a batch: ``A <- old A + new A_batch`` if ``usable``."""

    usable: jax.Array
    old: jax.Array
    new: jax.Array
    stage: jax.Array


def begin(
    layers: Sequence[Layer],
    states: Mapping[str, LayerState],
    measured: Mapping[str, LayerStatistics] | None,
    decay: Number,
    root: jax.Array,
) -> dict[str, LayerState]:
    """A takes in the batch (Algorithm 2 of the paper).

    A is the first batch's moment, unless `warm_start` gave one, which the first batch then does not
    enter; afterwards a running average. A batch that did not reach the layer, or whose moment is
    not finite or too large to be squared, leaves A as it is.

    Args:
        layers: whose states they are.
        states: as the previous step left them.
        measured: statistics at the parameters; None to leave the factors alone in this step. After
            a warm start the input factor is made from A even so (`start`), and A stays open to the
            first batch that is measured.
        decay: factor_decay.
        root: sqrt(lambda). While a schedule's lambda is not a number above 0, A stays as it is too,
            and no layer starts.
    """
    damped = is_damping(root)
    if measured is None:
        return {layer.path: _closed(states[layer.path], damped) for layer in layers}

    def intake(seen, rows, stage) -> _Intake:
        usable = (rows > 0) & is_usable(seen) & damped
        running = jnp.asarray(decay, seen.dtype)
        return _Intake(
            usable=usable,
            old=jnp.where(stage == EMPTY, 0, jnp.where(stage == WARM, 1, running)),
            new=jnp.where(stage == EMPTY, 1, jnp.where(stage == WARM, 0, 1 - running)),
            stage=jnp.where(usable | (damped & (stage == WARM)), RUNNING, stage),
        )

    seen = {layer.path: witness(states[layer.path], measured[layer.path]) for layer in layers}
    rows = Rows(seen)
    intakes = rows.map(
        intake,
        rows.pack(seen),
        rows.pack({path: measured[path].rows for path in seen}),
        rows.pack({path: states[path].stage for path in seen}),
    )
    return {
        path: _take_in(states[path], measured[path], how)
        for path, how in rows.unpack(intakes).items()
    }


def _closed(state: LayerState, damped: jax.Array) -> LayerState:
    """The state without a batch: a warm start is used up, where A is not stored."""
    if state.input_moment is not None:
        return state
    return state._replace(stage=jnp.where((state.stage == WARM) & damped, RUNNING, state.stage))


def witness(state: LayerState, measured: LayerStatistics) -> jax.Array:
    """A vector that is usable if what A takes in is; [*blocks, d_in].

    Of a second moment the diagonal: no entry is larger than the largest of these, and what is not
    finite in an input is not in its square.
    """
    moment = measured.input_moment
    if state.input_moment is None or moment is None:
        return measured.input_mean
    matrix = moment.ndim > measured.input_mean.ndim
    if not matrix:
        return moment
    d = moment.shape[-1]  # by a stride, for which XLA needs less code than for jnp.diagonal
    return moment.reshape(*moment.shape[:-2], d * d)[..., :: d + 1]


def _take_in(state: LayerState, measured: LayerStatistics, intake: _Intake) -> LayerState:
    A, batch = state.input_moment, measured.input_moment
    if A is not None and batch is not None:
        usable, old, new = (
            number.reshape(*number.shape, *[1] * (A.ndim - number.ndim))
            for number in (intake.usable, intake.old, intake.new)
        )
        A = jnp.where(usable, old * A + new * batch, A).astype(A.dtype)
    # Mostly a constant of the program, so it is kept out of the rows.
    positions = jnp.where(measured.rows > 0, measured.rows / measured.examples, state.positions)
    return state._replace(
        input_moment=A, positions=positions.astype(state.positions.dtype), stage=intake.stage
    )


def starts(state: LayerState, begun: LayerState) -> jax.Array:
    """Whether the input factor is to be made from A in this step; [*blocks].

    Args:
        state: as the previous step left it.
        begun: the same after `begin`.
    """
    return (begun.stage != EMPTY) & (state.stage != RUNNING)


def start(
    layers: Sequence[Layer],
    states: Mapping[str, LayerState],
    begun: Mapping[str, LayerState],
    moments: Mapping[str, jax.Array],
    options: Options,
    root: jax.Array,
) -> tuple[dict[str, Any], dict[str, jax.Array]]:
    """The input factors, made from A where this is a layer's first step.

    A layer whose A or damping is of no use does not start, and the next step tries again.

    Args:
        layers: whose states they are.
        states: as the previous step left them.
        begun: the same after `begin`.
        moments: A of the first batch, where A is not stored; empty where nothing is measured.
        options: split is read.
        root: sqrt(lambda).

    Returns:
        By layer path, the factors; and the stages of the layers that do not store A.
    """
    inputs = {layer.path: states[layer.path].input for layer in layers}
    stages: dict[str, jax.Array] = {}
    dense: dict[str, Remake] = {}
    for layer in layers:
        path, held = layer.path, inputs[layer.path]
        damping, _ = dampings(options, root, begun[path].positions)
        first = starts(states[path], begun[path]) & is_damping(damping)
        A = begun[path].input_moment
        if isinstance(held, Diagonal):
            new = 1 / (jnp.asarray(A) + damping[..., None])
            inputs[path] = Diagonal(jnp.where(first[..., None], new, held.inverse))
        elif isinstance(held, jax.Array):
            if A is None:  # not stored: a warm start left it in the factor's place
                was = states[path].stage
                A, usable = layer.over_blocks(_unstored)(was, held, moments.get(path, held))
                stages[path] = jnp.where(first & ~usable, was, begun[path].stage)
                first &= usable
            dense[path] = Remake(first, damping, A, held)
    return inputs | remake(dense), stages


def _unstored(stage: jax.Array, held: jax.Array, batch: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A of one matrix that stores none, what a warm start left or the batch's; if it is usable."""
    A = jnp.where(stage == WARM, held, batch)
    usable = is_usable(jnp.sum(jnp.abs(A), axis=-1))
    return jnp.where(usable, A, 0), usable
