"""The two factors of a layer, and which pair feeds which.

The Hessian of a layer's parameters is approximated by ``A (x) G``: A the second moment of its
inputs, G the mean Hessian of the loss with respect to its outputs. K-BFGS keeps the two inverses,
``input`` near ``(A + lambda_A I)^-1`` and ``output`` near ``G^-1``, and never inverts a matrix
after the start: both learn by BFGS updates, one pair a step each.

The functions here are those of one layer, in the order of a step. Where a kernel holds several
matrices (layers stacked by ``nn.scan``, groups of a convolution), every array has an axis of blocks
in front, and each block has factors of its own.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfqn_optax import bfgs, inverse, lbfgs, pairs
from kfqn_optax.inverse import Diagonal, Factor
from kfqn_optax.layers import Layer
from kfqn_optax.options import LARGE_MEMORY, Options, known_size
from kfqn_optax.pairs import Pair
from kfqn_optax.statistics import LayerStatistics, running_average

# Stages of a layer: where its second moment A comes from.
EMPTY = 0  # A holds nothing yet; the first batch will fill it
WARM = 1  # A comes from warm_start; the first batch will not enter it
RUNNING = 2  # A is a running average (or never stored)

_NOISE = 4.0  # a change of the mean cotangent below so many times its rounding error is none


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


def init(layer: Layer, dtype: Any, options: Options) -> LayerState:
    """Both factors the identity, all averages 0."""
    d_in, d_out = layer.d_in, layer.d_out

    def factor(d: int, memory: Any) -> Factor:
        if memory is None and d > known_size("max_factor_dim", options.max_factor_dim):
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
    )
    if layer.blocks is None:
        return state
    return jax.tree.map(lambda x: jnp.tile(x, (layer.blocks, *[1] * x.ndim)), state)


def begin(
    layer: Layer, state: LayerState, measured: LayerStatistics | None, options: Options
) -> LayerState:
    """Before the direction: A takes in the batch (Algorithm 2 of the paper).

    A is the first batch's moment, unless `warm_start` gave one, which the first batch then does not
    enter; afterwards a running average. A batch that did not reach the layer, or whose moment is
    not finite, leaves A as it is.

    Args:
        layer: whose state it is.
        state: as the previous step left it.
        measured: statistics at the parameters; None to leave the factors alone in this step. After
            a warm start the input factor is made from A even so (`start`), and A stays open to the
            first batch that is measured.
        options: factor_decay is read.
    """
    if measured is None:
        closed = jnp.where(state.stage == WARM, RUNNING, state.stage)
        return state if state.input_moment is not None else state._replace(stage=closed)

    def of_one(state: LayerState, measured: LayerStatistics) -> LayerState:
        moment, stage, new = state.input_moment, state.stage, measured.input_moment
        seen = measured.input_mean if moment is None or new is None else new
        usable = (measured.rows > 0) & jnp.isfinite(jnp.sum(seen))
        if moment is not None and new is not None:
            averaged = running_average(moment, new, options.factor_decay)
            kept = jnp.where(stage == EMPTY, new, jnp.where(stage == WARM, moment, averaged))
            moment = jnp.where(usable, kept, moment)
        return state._replace(
            input_moment=moment,
            positions=jnp.where(
                measured.rows > 0, measured.rows / measured.examples, state.positions
            ),
            stage=jnp.where(usable | (stage == WARM), RUNNING, stage),
        )

    return layer.over_blocks(of_one)(state, measured)


def starts(state: LayerState, begun: LayerState) -> jax.Array:
    """Whether the input factor is to be made from A in this step; [*blocks].

    Args:
        state: as the previous step left it.
        begun: the same after `begin`.
    """
    return (begun.stage != EMPTY) & (state.stage != RUNNING)


def start(
    layer: Layer,
    state: LayerState,
    begun: LayerState,
    moment: jax.Array | None,
    options: Options,
    root: jax.Array,
) -> Any:
    """The input factor, made from A where this is the layer's first step.

    Args:
        layer: whose state it is.
        state: as the previous step left it.
        begun: the same after `begin`.
        moment: A of the first batch, where A is not stored; None where nothing is measured.
        options: split is read.
        root: sqrt(lambda).
    """

    def of_one(state: LayerState, begun: LayerState, moment: jax.Array | None) -> Any:
        damping, _ = split(options, root, begun.positions)
        if isinstance(state.input, lbfgs.Memory):
            return state.input
        A = begun.input_moment
        if A is None:  # not stored: a warm start left it in the factor's place
            batch = state.input if moment is None else moment
            A = jnp.where(state.stage == WARM, state.input, batch)
            A = jnp.where(jnp.isfinite(jnp.sum(A)), A, 0)
        new = (
            Diagonal(1 / (A + damping))
            if isinstance(state.input, Diagonal)
            else bfgs.inverse(A, damping).astype(A.dtype)
        )
        first = starts(state, begun)
        return jax.tree.map(lambda n, o: jnp.where(first, n, o), new, state.input)

    return layer.over_blocks(of_one)(state, begun, moment)


def input_step(layer: Layer, state: LayerState, measured: LayerStatistics) -> jax.Array:
    """S of the input side, ``H_a a``, [*blocks, d_in]."""
    return layer.over_blocks(inverse.apply)(state.input, measured.input_mean)


def learn(
    layer: Layer,
    state: LayerState,
    measured: LayerStatistics,
    probed: LayerStatistics,
    product: jax.Array | None,
    weights: jax.Array,
    step: jax.Array,
    options: Options,
    root: jax.Array,
) -> LayerState:
    """After the probe: both factors take one pair (Algorithm 2 of the paper).

    Args:
        layer: whose state it is.
        state: from `begin`, with the factors that the direction was made with.
        measured: statistics at the parameters.
        probed: statistics of the same examples at the probe.
        product: A of these examples times `input_step`, [*blocks, d_in], where A is not stored.
        weights: the layer's parameters, [*blocks, d_in, d_out].
        step: probe minus parameters, [*blocks, d_in, d_out].
        options: pair_decay, powell, curvature_tolerance, shift and split are read.
        root: sqrt(lambda).
    """

    def of_one(state, measured, probed, product, weights, step) -> LayerState:
        damping_in, damping_out = split(options, root, state.positions)
        output = _learn_output(state, measured, probed, weights, step, options, damping_out)
        input_ = _learn_input(state, measured, product, options, damping_in)
        return state._replace(**input_, **output)

    return layer.over_blocks(of_one)(state, measured, probed, product, weights, step)


def split(options: Options, root: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """lambda_A and lambda_G, dampings of the two sides, from sqrt(lambda) and T."""
    root = root.astype(positions.dtype)
    if options.split == "sqrt":
        return root, root
    return root * jnp.sqrt(positions), root / jnp.sqrt(positions)


def _learn_output(state, measured, probed, weights, step, options, damping) -> dict[str, Any]:
    # The mean output is W a, so its change is (step) a+ + W (a+ - a): the small step is
    # not lost in a difference of two large means.
    change = pairs.matmul(probed.input_mean, step) + pairs.matmul(
        probed.input_mean - measured.input_mean, weights
    )
    raw = Pair(change, probed.cotangent_mean - measured.cotangent_mean)
    reached = (measured.rows > 0) & (probed.rows > 0)
    finite = jnp.isfinite(jnp.sum(raw.s)) & jnp.isfinite(jnp.sum(raw.y))
    # A mean of cotangents that cancel exactly (softmax does not see a shift of all keys) is noise,
    # and so is its change; damping would make a pair of it all the same.
    noise = _NOISE * (measured.cotangent_noise + probed.cotangent_noise)
    size = pairs.dot(raw.y, raw.y)
    drowned = (0 < size) & (size < noise**2)
    usable = reached & finite & ~drowned
    average = Pair(
        jnp.where(usable, running_average(state.s, raw.s, options.pair_decay), state.s),
        jnp.where(usable, running_average(state.y, raw.y, options.pair_decay), state.y),
    )
    Hy = inverse.apply(state.output, average.y)
    if options.shift:
        damped, by_powell = pairs.damp_powell(average, Hy, options.powell)
        damped, by_second = pairs.damp_shift(damped, damping), jnp.ones_like(by_powell)
    else:
        damped, by_powell, by_second = pairs.damp_double(average, Hy, options.powell, damping)
    status = pairs.pair_status(damped, measured.cotangent_mean, options.curvature_tolerance)
    status = jnp.where(finite, status, pairs.NOT_FINITE)
    status = jnp.where(drowned, pairs.ROUNDING, status)
    status = jnp.where(reached, status, pairs.NOT_MEASURED)
    output, output_status = inverse.update(state.output, damped, status)
    return dict(
        output=output,
        s=average.s,
        y=average.y,
        output_status=output_status,
        powell_damped=by_powell & usable,
        second_damped=by_second & usable,
    )


def _learn_input(state, measured, product, options, damping) -> dict[str, Any]:
    # The input side: the matrix to invert is known, so its pair is exact.
    if isinstance(state.input, Diagonal):
        status = jnp.where(measured.rows > 0, pairs.UPDATED, pairs.NOT_MEASURED)
        return dict(
            input=Diagonal(1 / (state.input_moment + damping)),
            input_status=status.astype(jnp.int32),
        )
    s = inverse.apply(state.input, measured.input_mean)
    As = product if state.input_moment is None else pairs.matmul(state.input_moment, s)
    action = pairs.hessian_action(s, As, damping)
    status = pairs.pair_status(action, measured.input_mean, options.curvature_tolerance)
    status = jnp.where(measured.rows > 0, status, pairs.NOT_MEASURED)
    input_, input_status = inverse.update(state.input, action, status)
    return dict(input=input_, input_status=input_status)


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
