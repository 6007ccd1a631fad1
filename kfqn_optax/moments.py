"""What K-FAC and its kin keep of a layer: a second moment of each side, and its damped inverse.

The moments are running averages, one batch a step; the inverses are made of them now and then
(`refresh`), and what happens in between reads the inverses alone. All layers at once, arguments by
layer path. With blocks every array has an axis of blocks in front.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfqn_optax import bfgs
from kfqn_optax.inverse import Diagonal, Remake, remake
from kfqn_optax.layer_state import EMPTY, RUNNING, WARM
from kfqn_optax.layers import Layer
from kfqn_optax.options import Number
from kfqn_optax.statistics import is_usable


class Moments(NamedTuple):
    """The two second moments of a layer on one batch.

    Attributes:
        input: [d_in, d_in]; of an embedding's lookups its diagonal, [d_in]; None if it was not
            measured.
        output: [d_out, d_out]; None likewise.
        rows: how many rows they are of; 0 if the batch did not reach the layer.
    """

    input: Any
    output: Any
    rows: jax.Array


class Damped(NamedTuple):
    """What the two factors of a layer are the inverses of: ``moment + damping I`` on each side."""

    input: jax.Array
    input_damping: jax.Array
    output: jax.Array
    output_damping: jax.Array


class MomentState(NamedTuple):
    """The curvature of one layer, in the dtype of the factors.

    Attributes:
        input: the input factor, an inverse, [d_in, d_in]; a `Diagonal` for an embedding's lookups.
        output: the output factor, [d_out, d_out].
        input_moment: running average of the second moment of the input side, [d_in, d_in] or, for
            an embedding, its diagonal.
        output_moment: the same of the output side, [d_out, d_out].
        stage: `layer_state.EMPTY`, `WARM` or `RUNNING`, int32.
    """

    # read by the direction; change when inverses are made
    input: Any
    output: jax.Array
    # running averages, never damped; change every step
    input_moment: jax.Array
    output_moment: jax.Array
    stage: jax.Array


def init(layer: Layer, dtype: Any) -> MomentState:
    """Both factors the identity, both moments 0."""
    d_in, d_out = layer.d_in, layer.d_out
    if layer.lookup:
        input_, moment = Diagonal(jnp.ones((d_in,), dtype)), jnp.zeros((d_in,), dtype)
    else:
        input_, moment = bfgs.init(d_in, dtype), jnp.zeros((d_in, d_in), dtype)
    state = MomentState(
        input=input_,
        output=bfgs.init(d_out, dtype),
        input_moment=moment,
        output_moment=jnp.zeros((d_out, d_out), dtype),
        stage=jnp.full((), EMPTY, jnp.int32),
    )
    return layer.for_each_block(state)


def warm(state: MomentState, input_moment: jax.Array, output_moment: jax.Array) -> MomentState:
    """The state with both moments given; the next step makes the inverses of them."""
    return state._replace(
        input_moment=input_moment.astype(state.input_moment.dtype),
        output_moment=output_moment.astype(state.output_moment.dtype),
        stage=jnp.full_like(state.stage, WARM),
    )


def take_in(
    state: MomentState, batch: Moments | None, decay: Number, damped: jax.Array
) -> MomentState:
    """The moments as running averages with a batch.

    The first batch is taken as it is, unless `warm` gave moments before it. A batch that did not
    reach the layer, or whose moments are not finite or too large to be squared, leaves the moments
    as they are; so does None.

    Args:
        state: as the previous step left it.
        batch: its moments.
        decay: factor_decay.
        damped: whether the step's damping is a number above 0; the state comes back as it is if
            not.
    """
    warmed = damped & (state.stage == WARM)
    if batch is None:
        return state._replace(stage=jnp.where(warmed, RUNNING, state.stage))

    def is_sound(moment: jax.Array) -> jax.Array:
        matrix = moment.ndim > state.stage.ndim + 1
        rows = jnp.sum(jnp.abs(moment), axis=-1) if matrix else moment
        return jax.vmap(is_usable)(rows) if state.stage.ndim else is_usable(rows)

    usable = damped & (batch.rows > 0) & is_sound(batch.input) & is_sound(batch.output)
    old = jnp.where(state.stage == EMPTY, 0, jnp.asarray(decay, batch.output.dtype))

    def average(held: jax.Array, new: jax.Array) -> jax.Array:
        axes = (*usable.shape, *[1] * (held.ndim - usable.ndim))
        weight = old.reshape(axes)
        mixed = weight * held + (1 - weight) * new
        return jnp.where(usable.reshape(axes), mixed, held).astype(held.dtype)

    return state._replace(
        input_moment=average(state.input_moment, batch.input),
        output_moment=average(state.output_moment, batch.output),
        stage=jnp.where(usable | warmed, RUNNING, state.stage),
    )


def refresh(
    layers: Sequence[Layer],
    before: Mapping[str, MomentState],
    states: Mapping[str, MomentState],
    damped: Callable[[jax.Array, jax.Array], Damped],
    due: jax.Array,
    usable: jax.Array,
) -> dict[str, MomentState]:
    """The states with inverses of their moments, where these are due.

    They are also made where a layer starts: in the step of its first batch, and after `warm`. A
    layer that has seen no batch keeps the identity. Where the damping is not usable, none is made.

    Args:
        layers: whose states they are.
        before: as the previous step left them.
        states: after `take_in`.
        damped: from a layer's two moments (of one block) to what is to be inverted.
        due: whether this is a step in which all inverses are made.
        usable: whether the step's damping is a number above 0.
    """
    starts = [
        jnp.any((states[layer.path].stage != EMPTY) & (before[layer.path].stage != RUNNING))
        for layer in layers
    ]

    def make() -> dict[str, tuple[Any, jax.Array]]:
        dense: dict[tuple[str, str], Remake] = {}
        diagonal: dict[str, Diagonal] = {}
        for layer in layers:
            path, state = layer.path, states[layer.path]
            known = state.stage != EMPTY
            now = layer.over_blocks(damped)(state.input_moment, state.output_moment)
            if isinstance(state.input, Diagonal):
                new = 1 / (now.input + now.input_damping[..., None])
                diagonal[path] = Diagonal(jnp.where(known[..., None], new, state.input.inverse))
            else:
                dense[path, "input"] = Remake(known, now.input_damping, now.input, state.input)
            dense[path, "output"] = Remake(known, now.output_damping, now.output, state.output)
        # They run many times, unlike those that K-BFGS starts from, so little is padded.
        made = remake(dense, times=1.3, besides=300**3)
        return {
            layer.path: (
                diagonal.get(layer.path, made.get((layer.path, "input"))),
                made[layer.path, "output"],
            )
            for layer in layers
        }

    made = jax.lax.cond(
        usable & (due | jnp.any(jnp.stack(starts))),
        make,
        lambda: {layer.path: tuple(states[layer.path][:2]) for layer in layers},
    )
    return {
        path: MomentState(
            input=input_,
            output=output,
            input_moment=states[path].input_moment,
            output_moment=states[path].output_moment,
            stage=states[path].stage,
        )
        for path, (input_, output) in made.items()
    }
