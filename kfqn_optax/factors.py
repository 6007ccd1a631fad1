"""The two factors of a layer, and which pair feeds which.

The Hessian of a layer's parameters is approximated by ``A (x) G``: A the second moment of its
inputs, G the mean Hessian of the loss with respect to its outputs. K-BFGS keeps the two inverses,
``input`` near ``(A + sqrt(lambda) I)^-1`` and ``output`` near ``G^-1``, and never inverts a matrix
after the start: both learn by BFGS updates, one pair a step each.

The functions here are those of one layer, arrays in, arrays out, in the order of a step.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kfqn_optax import bfgs, pairs
from kfqn_optax.layers import Layer
from kfqn_optax.options import Options
from kfqn_optax.pairs import Pair
from kfqn_optax.statistics import LayerStatistics, running_average

# Stages of a layer: where its second moment A comes from.
EMPTY = 0  # A holds nothing yet; the first batch will fill it
WARM = 1  # A comes from warm_start; the first batch will not enter it
RUNNING = 2  # A is a running average


class LayerState(NamedTuple):
    """The curvature of one layer, in the dtype of the factors.

    Attributes:
        input: H_a, inverse of the damped second moment of the inputs, [d_in, d_in].
        output: H_g, inverse of the mean Hessian at the outputs, [d_out, d_out].
        input_moment: A, running average of the second moment of the inputs, [d_in, d_in].
        s: running average of the change of the mean output from params to probe, [d_out].
        y: running average of the change of the mean cotangent, [d_out].
        stage: `EMPTY`, `WARM` or `RUNNING`, int32.
        input_status: what became of the last pair of the input factor (see `pairs`), int32.
        output_status: the same for the output factor.
        powell_damped: whether Powell's damping acted on the last output pair, bool.
        second_damped: whether the second damping did.
    """

    # read by the direction; change every step
    input: jax.Array
    output: jax.Array
    # running averages, never damped
    input_moment: jax.Array
    s: jax.Array
    y: jax.Array
    # what happened
    stage: jax.Array
    input_status: jax.Array
    output_status: jax.Array
    powell_damped: jax.Array
    second_damped: jax.Array


def init(layer: Layer, dtype: jnp.dtype) -> LayerState:
    """Both factors the identity, all averages 0."""
    return LayerState(
        input=bfgs.init(layer.d_in, dtype),
        output=bfgs.init(layer.d_out, dtype),
        input_moment=jnp.zeros((layer.d_in, layer.d_in), dtype),
        s=jnp.zeros((layer.d_out,), dtype),
        y=jnp.zeros((layer.d_out,), dtype),
        stage=jnp.full((), EMPTY, jnp.int32),
        input_status=jnp.full((), pairs.NOT_MEASURED, jnp.int32),
        output_status=jnp.full((), pairs.NOT_MEASURED, jnp.int32),
        powell_damped=jnp.zeros((), bool),
        second_damped=jnp.zeros((), bool),
    )


def begin(
    state: LayerState, measured: LayerStatistics | None, options: Options, damping: jax.Array
) -> LayerState:
    """Before the direction: A takes in the batch; at the start the input factor is made from A.

    Algorithm 2 of the paper, before the direction. A is the first batch's moment, unless
    `warm_start` gave one, which the first batch then does not enter; afterwards a running average.
    A batch that did not reach the layer, or whose moment is not finite, leaves A as it is.

    Args:
        state: as the previous step left it.
        measured: statistics at the parameters; None to leave the factors alone in this step. After
            a warm start the input factor is made from A even so, and stays open to the first batch
            that is measured.
        options: factor_decay is read.
        damping: lambda_A, the square root of lambda.
    """
    moment, stage = state.input_moment, state.stage
    if measured is not None:
        new = measured.input_moment
        usable = (measured.rows > 0) & jnp.isfinite(jnp.sum(new))
        averaged = running_average(moment, new, options.factor_decay)
        kept = jnp.where(stage == EMPTY, new, jnp.where(stage == WARM, moment, averaged))
        moment = jnp.where(usable, kept, moment)
        stage = jnp.where(usable | (stage == WARM), RUNNING, stage)
    starts = (stage != EMPTY) & (state.stage != RUNNING)
    inverse = jax.lax.cond(
        starts, lambda: bfgs.inverse(moment, damping).astype(moment.dtype), lambda: state.input
    )
    return state._replace(input=inverse, input_moment=moment, stage=stage)


def learn(
    state: LayerState,
    measured: LayerStatistics,
    probed: LayerStatistics,
    weights: jax.Array,
    step: jax.Array,
    options: Options,
    damping: jax.Array,
) -> LayerState:
    """After the probe: both factors take one pair (Algorithm 2 of the paper).

    Args:
        state: from `begin`.
        measured: statistics at the parameters.
        probed: statistics of the same examples at the probe.
        weights: the layer's parameters, [d_in, d_out].
        step: probe minus parameters, [d_in, d_out].
        options: pair_decay, powell and curvature_tolerance are read.
        damping: lambda_A and mu_2, the square root of lambda.
    """
    tolerance = options.curvature_tolerance

    # The mean output is W a, so its change is (step) a+ + W (a+ - a): the small step is
    # not lost in a difference of two large means.
    change = pairs.matmul(probed.input_mean, step) + pairs.matmul(
        probed.input_mean - measured.input_mean, weights
    )
    raw = Pair(change, probed.cotangent_mean - measured.cotangent_mean)
    reached = (measured.rows > 0) & (probed.rows > 0)
    finite = jnp.isfinite(jnp.sum(raw.s)) & jnp.isfinite(jnp.sum(raw.y))
    usable = reached & finite
    average = Pair(
        jnp.where(usable, running_average(state.s, raw.s, options.pair_decay), state.s),
        jnp.where(usable, running_average(state.y, raw.y, options.pair_decay), state.y),
    )
    damped, by_powell, by_second = pairs.damp_double(
        average, bfgs.apply(state.output, average.y), options.powell, damping
    )
    status = pairs.pair_status(damped, measured.cotangent_mean, tolerance)
    status = jnp.where(finite, status, pairs.NOT_FINITE)
    status = jnp.where(reached, status, pairs.NOT_MEASURED)
    output, output_status = bfgs.update(state.output, damped, status)

    # The input side: the matrix to invert is known, so its pair is exact.
    action = pairs.hessian_action(state.input, state.input_moment, measured.input_mean, damping)
    status = pairs.pair_status(action, measured.input_mean, tolerance)
    status = jnp.where(measured.rows > 0, status, pairs.NOT_MEASURED)
    input_, input_status = bfgs.update(state.input, action, status)

    return LayerState(
        input=input_,
        output=output,
        input_moment=state.input_moment,
        s=average.s,
        y=average.y,
        stage=state.stage,
        input_status=input_status,
        output_status=output_status,
        powell_damped=by_powell & usable,
        second_damped=by_second & usable,
    )


def warm(state: LayerState, moment: jax.Array) -> LayerState:
    """The state with A given; the next step makes the input factor from it.

    Args:
        state: any.
        moment: A averaged over many batches, [d_in, d_in].
    """
    return state._replace(
        input_moment=moment.astype(state.input_moment.dtype),
        stage=jnp.full_like(state.stage, WARM),
    )
