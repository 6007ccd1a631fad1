"""What block K-BFGS keeps of a layer, and how it learns: q pairs a step on each side.

Unlike K-BFGS's, the factors start from their damping alone, ``I / sqrt(lambda)``, the inverse of a
matrix of which nothing is known yet but its damping.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kfqn_optax import block_bfgs, factors, pairs
from kfqn_optax.block_bfgs import Taken
from kfqn_optax.layer_state import COLUMNS, columns_of
from kfqn_optax.layers import Layer
from kfqn_optax.options import Number, is_damping
from kfqn_optax.pairs import matmul
from kfqn_optax.statistics import LayerStatistics, Sketches, is_usable


class BlockState(NamedTuple):
    """The curvature of one layer, in the dtype of the factors; with blocks an axis in front.

    Attributes:
        input: H_a, inverse of the damped second moment of the inputs, [d_in, d_in].
        output: H_g, inverse of the damped mean Hessian at the outputs, [d_out, d_out].
        input_moment: A, running average of the second moment of the inputs, [d_in, d_in].
        stage: how many batches A has taken in, int32.
        counts: how often what happened, since the start (`layer_state.COLUMNS`), int32; `health`
            reads it. Each side offers q pairs a step; a reset is counted beside them.
    """

    input: jax.Array
    output: jax.Array
    input_moment: jax.Array
    stage: jax.Array
    counts: jax.Array


def init(layer: Layer, dtype: Any) -> BlockState:
    """Both factors the identity, until the first batch; A 0."""
    d_in, d_out = layer.d_in, layer.d_out
    state = BlockState(
        input=jnp.eye(d_in, dtype=dtype),
        output=jnp.eye(d_out, dtype=dtype),
        input_moment=jnp.zeros((d_in, d_in), dtype),
        stage=jnp.zeros((), jnp.int32),
        counts=jnp.zeros(len(COLUMNS), jnp.int32),
    )
    return layer.for_each_block(state)


def begin(
    layer: Layer,
    state: BlockState,
    measured: LayerStatistics | None,
    factor_decay: Number,
    powell: Number,
    root: jax.Array,
) -> BlockState:
    """A layer whose A has taken in the batch, and whose input factor q exact pairs.

    The pairs are the paper's Hessian action, ``s = H_a x`` and ``y = (A + lambda_A I) s``, for q
    sketches x of the inputs instead of their mean.
    """
    if measured is None:
        return state
    start = _start(root)

    def of_one(state: BlockState, seen: LayerStatistics) -> BlockState:
        X, batch = _sketches(layer, seen).input, jnp.asarray(seen.input_moment)
        reached = (seen.rows > 0) & is_damping(root)
        usable = reached & is_usable(jnp.sum(jnp.abs(batch), axis=-1))
        fresh = usable & (state.stage == 0)
        H_a, H_g = (
            jnp.where(fresh, start.astype(H.dtype) * jnp.eye(len(H), dtype=H.dtype), H)
            for H in (state.input, state.output)
        )
        n = state.stage.astype(H_a.dtype)
        decay = jnp.minimum(jnp.asarray(factor_decay, H_a.dtype), n / (n + 1))
        A = jnp.where(usable, decay * state.input_moment + (1 - decay) * batch, state.input_moment)
        S = matmul(jnp.where(usable, X, 0), H_a)
        Y = matmul(S, A) + root.astype(S.dtype) * S
        H_a, taken = block_bfgs.update(H_a, S, Y, powell, start.astype(S.dtype))
        refusal = jnp.select(
            [seen.rows == 0, ~usable], [pairs.NOT_MEASURED, pairs.NOT_FINITE], pairs.UPDATED
        )
        counts = state.counts + _counted("input_status", taken, refusal)
        return BlockState(H_a, H_g, A, state.stage + usable, counts)

    return layer.over_blocks(of_one)(state, measured)


def learn(
    layer: Layer,
    state: BlockState,
    before: Mapping[str, jax.Array],
    after: Mapping[str, jax.Array],
    at: LayerStatistics,
    plus: LayerStatistics,
    powell: Number,
    root: jax.Array,
) -> BlockState:
    """A layer whose output factor has taken q pairs of the changes from parameters to probe."""
    start = _start(root)

    def of_one(state, before, after, at: LayerStatistics, plus: LayerStatistics) -> BlockState:
        known = (at.rows > 0) & (plus.rows > 0) & is_damping(root) & (state.stage > 0)
        x, x_plus = _sketches(layer, at), _sketches(layer, plus)
        S = factors.change_of_output(before, after, x.input, x_plus.input)
        change = x_plus.cotangent - x.cotangent
        # Of a step so short that cotangents change in their last digits only, nothing is learned.
        rounding = 100 * float(jnp.finfo(S.dtype).eps) * _lengths(x.cotangent)
        size = _lengths(change)
        told = size > rounding
        is_number = told | jnp.isfinite(size + rounding + _lengths(S))
        Y = change + root.astype(S.dtype) * S
        usable = (known & told)[:, None]
        S, Y = jnp.where(usable, S, 0), jnp.where(usable, Y, 0)
        H_g, taken = block_bfgs.update(state.output, S, Y, powell, start.astype(S.dtype))
        refusal = jnp.select(
            [(at.rows == 0) | (plus.rows == 0), ~(known & is_number), ~told],
            [pairs.NOT_MEASURED, pairs.NOT_FINITE, pairs.ROUNDING],
            pairs.UPDATED,
        )
        counts = state.counts + _counted("output_status", taken, refusal)
        return state._replace(output=H_g, counts=counts)

    return layer.over_blocks(of_one)(state, before, after, at, plus)


def _counted(side: str, taken: Taken, refusal: jax.Array) -> jax.Array:
    """What became of the q pairs of one side, int32 by `COLUMNS`.

    Args:
        side: "input_status" or "output_status".
        taken: from `block_bfgs.update`.
        refusal: why pairs were not offered to it, [q] or [] for all; `pairs.UPDATED` if they were.
    """
    offered = jnp.broadcast_to(refusal == pairs.UPDATED, taken.status.shape)
    happened = {side: jnp.where(offered, taken.status, refusal)}
    if side == "output_status":
        happened |= {"powell_damped": taken.damped, "second_damped": offered}
    happened = {field: value.astype(jnp.int32) for field, value in happened.items()}
    counted = jnp.sum(columns_of(happened), axis=0, dtype=jnp.int32)
    is_reset = np.array([column == (side, pairs.RESET) for column in COLUMNS], np.int32)
    return counted + taken.reset * is_reset


def _sketches(layer: Layer, seen: LayerStatistics) -> Sketches:
    if seen.sketches is None:
        raise ValueError(
            f"curvature_fn did not measure the sketches of layer {layer.path!r} that block K-BFGS "
            "asked for. A function of your own must pass its keyword arguments on to "
            "kfqn_optax.curvature_fn's: def curvature_fn(params, **asked)."
        )
    return seen.sketches


def _lengths(rows: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(rows * rows, axis=-1))


def _start(root: jax.Array) -> jax.Array:
    """The scale of a factor that knows nothing but its damping."""
    return 1 / jnp.where(is_damping(root), root, 1)
