"""The two factors of a layer, and which pair feeds which.

The Hessian of a layer's parameters is approximated by ``A (x) G``: A the second moment of its
inputs, G the mean Hessian of the loss with respect to its outputs. K-BFGS keeps the two inverses,
``input`` near ``(A + lambda_A I)^-1`` and ``output`` near ``G^-1``, and never inverts a matrix
after the start: both learn by BFGS updates, one pair a step each.

The functions here are those of one layer, in the order of a step. Where a kernel holds several
matrices (layers stacked by ``nn.scan``, groups of a convolution), every array has an axis of blocks
in front, and each block has factors of its own.
"""

from typing import Any

import jax
import jax.numpy as jnp

from kfqn_optax import bfgs, inverse, lbfgs, pairs
from kfqn_optax.inverse import Diagonal
from kfqn_optax.layer_state import EMPTY, RUNNING, WARM, LayerState
from kfqn_optax.layers import Layer
from kfqn_optax.options import Options
from kfqn_optax.pairs import Pair
from kfqn_optax.statistics import LayerStatistics, running_average


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
    reached = (measured.rows != 0) & (probed.rows != 0)
    finite = jnp.isfinite(jnp.sum(raw.s)) & jnp.isfinite(jnp.sum(raw.y))
    # A mean of cotangents that cancel exactly (softmax does not see a shift of all keys) is noise,
    # and so is its change; damping would make a pair of it all the same. Cotangents that do not
    # cancel have a mean of at least their size over the square root of their number.
    drowned = _is_noise(measured) & _is_noise(probed)
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


def _is_noise(measured: LayerStatistics) -> jax.Array:
    """Whether the mean cotangent is nothing but what rounding leaves of a sum that is 0."""
    size = jnp.sqrt(pairs.dot(measured.cotangent_mean, measured.cotangent_mean))
    return size < measured.cotangent_noise


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
    status = jnp.where(measured.rows != 0, status, pairs.NOT_MEASURED)
    input_, input_status = inverse.update(state.input, action, status)
    return dict(input=input_, input_status=input_status)
