"""What is kept of a layer: its two factors, running averages, and what became of the last pair.

`LayerState` is the per-layer part of every state in the family; here it starts, empty (`init`) or
from a second moment measured beforehand (`warm`). `factors` takes it through a step.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kfqn_optax import bfgs, lbfgs, pairs
from kfqn_optax.inverse import Diagonal, Factor
from kfqn_optax.layers import Layer
from kfqn_optax.options import LARGE_MEMORY, Options, known_size, longest_side

# Stages of a layer: where its second moment A comes from.
EMPTY = 0  # A holds nothing yet; the first batch will fill it
WARM = 1  # A comes from warm_start; the first batch will not enter it
RUNNING = 2  # A is a running average (or never stored)


# What the columns of `LayerState.counts` count: what became of the pairs of each side, by status
# (see `pairs`), and the two dampings of output pairs.
COLUMNS = (
    *(("input_status", status) for status in pairs.STATUS_WORDS),
    *(("output_status", status) for status in pairs.STATUS_WORDS),
    ("powell_damped", True),
    ("second_damped", True),
)


class LayerState(NamedTuple):
    """The curvature of one layer, in the dtype of the factors.

    With blocks, every array has an axis of blocks in front.

    Attributes:
        input: H_a, inverse of the damped second moment of the inputs, [d_in, d_in]; or `Memory` or
            `Diagonal`. Where A is not stored, `warm_start` leaves A itself here for the next step.
        output: H_g, inverse of the mean Hessian at the outputs, [d_out, d_out]; or `Memory`.
        input_moment: A, running average of the second moment of the inputs, [d_in, d_in]; its
            diagonal, [d_in], for an embedding; None where A is not stored.
        s: running average of the change of the mean output from params to probe, [d_out].
        y: running average of the change of the mean cotangent, [d_out].
        positions: T, the number of positions an example had when last measured; 1 before.
        stage: `EMPTY`, `WARM` or `RUNNING`, int32.
        input_status: what became of the last pair of the input factor (see `pairs`), int32.
        output_status: the same for the output factor.
        powell_damped: whether Powell's damping acted on the last output pair, bool.
        second_damped: whether the second damping did.
        counts: how often, since the start, each of these happened (`COLUMNS`), int32; `health`
            reads it. Steps without a ``curvature_fn`` do not count.
    """

    # read by the direction; change every step
    input: Any
    output: Any
    # running averages, never damped
    input_moment: jax.Array | None
    s: jax.Array
    y: jax.Array
    positions: jax.Array
    # what happened
    stage: jax.Array
    input_status: jax.Array
    output_status: jax.Array
    powell_damped: jax.Array
    second_damped: jax.Array
    # how often
    counts: jax.Array


def init(layer: Layer, dtype: Any, options: Options) -> LayerState:
    """Both factors the identity, all averages 0."""
    d_in, d_out = layer.d_in, layer.d_out
    longest = longest_side(options.max_factor_dim)

    def factor(d: int, memory: Any) -> Factor:
        if memory is None and d > longest:
            memory = LARGE_MEMORY
        if memory is None:
            return bfgs.init(d, dtype)
        return lbfgs.init(d, known_size("memory_size", memory), dtype)

    if layer.lookup:
        input_, moment = Diagonal(jnp.ones((d_in,), dtype)), jnp.zeros((d_in,), dtype)
    else:
        input_ = factor(d_in, options.input_memory)
        stored = isinstance(input_, jax.Array) and not options.matrix_free
        moment = jnp.zeros((d_in, d_in), dtype) if stored else None
    state = LayerState(
        input=input_,
        output=factor(d_out, options.output_memory),
        input_moment=moment,
        s=jnp.zeros((d_out,), dtype),
        y=jnp.zeros((d_out,), dtype),
        positions=jnp.ones((), dtype),
        stage=jnp.full((), EMPTY, jnp.int32),
        input_status=jnp.full((), pairs.NOT_MEASURED, jnp.int32),
        output_status=jnp.full((), pairs.NOT_MEASURED, jnp.int32),
        powell_damped=jnp.zeros((), bool),
        second_damped=jnp.zeros((), bool),
        counts=jnp.zeros(len(COLUMNS), jnp.int32),
    )
    return layer.for_each_block(state)


def warm(state: LayerState, moment: jax.Array | None, positions: jax.Array) -> LayerState:
    """The state with A given; the next step makes the input factor from it.

    Args:
        state: any.
        moment: A averaged over many batches, in the shape of ``input_moment``; of no use, and may
            be None, for a limited-memory input factor.
        positions: T, the mean number of positions an example has, [*blocks].
    """
    held = state.input_moment
    if moment is None or isinstance(state.input, lbfgs.Memory):
        return state
    moment = moment.astype(state.s.dtype)
    return state._replace(
        input=moment if held is None else state.input,
        input_moment=None if held is None else moment,
        positions=positions.astype(state.positions.dtype),
        stage=jnp.full_like(state.stage, WARM),
    )


def count(
    counts: jax.Array,
    input_status: jax.Array,
    output_status: jax.Array,
    powell_damped: jax.Array,
    second_damped: jax.Array,
) -> jax.Array:
    """The counts after one more step, [*blocks, columns]; the other arguments are [*blocks].

    One comparison for all columns, since a program takes time to compile for each that it makes.
    """
    happened = {
        "input_status": input_status,
        "output_status": output_status,
        "powell_damped": powell_damped.astype(jnp.int32),
        "second_damped": second_damped.astype(jnp.int32),
    }
    return counts + columns_of(happened)


def columns_of(happened: Mapping[str, jax.Array]) -> jax.Array:
    """Which of `COLUMNS` happened, bool, [..., columns], from values by field, int32, [...]."""
    shape = (*next(iter(happened.values())).shape, len(COLUMNS))
    seen = jnp.full(shape, -1, jnp.int32)  # no value of any field
    for name, value in happened.items():
        of_field = np.array([field == name for field, _ in COLUMNS])
        seen = jnp.where(np.broadcast_to(of_field, shape), value[..., None], seen)
    values = np.array([value for _, value in COLUMNS], np.int32)
    return seen == np.broadcast_to(values, shape)
