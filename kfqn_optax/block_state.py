"""What block K-BFGS keeps of a layer, and how it learns: q pairs a step on each side.

Unlike K-BFGS's, the factors start from their damping alone, ``I / sqrt(lambda)``, the inverse of a
matrix of which nothing is known yet but its damping. The input factor (`block_inputs`) is a matrix,
whose pairs are exact, or knows the largest curvature only (`nystrom`); the output factor, whose
pairs are noisy and soon out of date, forgets (`generations`).

`learn` takes the output sides of all layers at once; arguments by layer path.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kfqn_optax import block_bfgs, factors, generations, nystrom, pairs
from kfqn_optax.block_bfgs import Taken
from kfqn_optax.generations import Generations
from kfqn_optax.layer_state import COLUMNS, columns_of
from kfqn_optax.layers import Layer, to_matrices
from kfqn_optax.nystrom import Nystrom
from kfqn_optax.options import Number, is_damping
from kfqn_optax.statistics import LayerStatistics, Sketches


class BlockState(NamedTuple):
    """The curvature of one layer, in the dtype of the factors; with blocks an axis in front.

    Attributes:
        input: H_a, inverse of the damped second moment of the inputs, [d_in, d_in]; or `Nystrom`.
        output: H_g, inverse of the damped mean Hessian at the outputs.
        input_moment: A, running average of the second moment of the inputs, [d_in, d_in].
        stage: how many batches A has taken in, int32.
        counts: how often what happened, since the start (`layer_state.COLUMNS`), int32; `health`
            reads it. Each side offers q pairs a step; a `Nystrom` factor is one.
    """

    input: jax.Array | Nystrom
    output: Generations
    input_moment: jax.Array
    stage: jax.Array
    counts: jax.Array


def init(
    layer: Layer, dtype: Any, pairs_of_step: int, window: int, input_rank: int | None = None
) -> BlockState:
    """Factors that know nothing, until the first batch; A 0.

    Args:
        layer: whose state it is.
        dtype: of the factors.
        pairs_of_step: q.
        window: of the output factor, in steps.
        input_rank: how many directions the input factor knows; None for a matrix.
    """
    d_in, d_out = layer.d_in, layer.d_out
    state = BlockState(
        input=jnp.eye(d_in, dtype=dtype)
        if input_rank is None
        else nystrom.init(d_in, input_rank, dtype),
        output=generations.init(d_out, pairs_of_step, window, dtype),
        input_moment=jnp.zeros((d_in, d_in), dtype),
        stage=jnp.zeros((), jnp.int32),
        counts=jnp.zeros(len(COLUMNS), jnp.int32),
    )
    return layer.for_each_block(state)


class Pairs(NamedTuple):
    """A step's pairs for one side of a layer.

    Attributes:
        s: changes of the point, [q, d].
        y: changes of the gradient, [q, d].
        refusal: why pairs are not offered, [q] or [] for all; `pairs.UPDATED` if they are.
        fresh: whether the factor has learned nothing yet, []; None where it knows by itself.
    """

    s: jax.Array
    y: jax.Array
    refusal: jax.Array
    fresh: jax.Array | None = None


def learn(
    layers: Sequence[Layer],
    states: Mapping[str, BlockState],
    before: Mapping[str, jax.Array],
    after: Mapping[str, jax.Array],
    at: Mapping[str, LayerStatistics],
    plus: Mapping[str, LayerStatistics],
    powell: Number,
    root: jax.Array,
) -> dict[str, BlockState]:
    """Layers whose output factors have taken q pairs of the changes from parameters to probe.

    Args:
        layers: whose states they are.
        states: from `begin`.
        before: the parameters, by path.
        after: those of the probe.
        at: statistics at the parameters.
        plus: statistics at the probe.
        powell: mu_1 of Powell's damping.
        root: sqrt(lambda).
    """

    def change(state, before, after, at, plus, x: Sketches, x_plus: Sketches) -> Pairs:
        known = (at.rows > 0) & (plus.rows > 0) & is_damping(root) & (state.stage > 0)
        S = factors.change_of_output(before, after, x.input, x_plus.input)
        change = x_plus.cotangent - x.cotangent
        # Of a step so short that cotangents change in their last digits only, nothing is learned.
        rounding = 100 * float(jnp.finfo(S.dtype).eps) * _lengths(x.cotangent)
        size = _lengths(change)
        told = size > rounding
        is_number = told | jnp.isfinite(size + rounding + _lengths(S))
        Y = change + root.astype(S.dtype) * S
        usable = (known & told)[:, None]
        refusal = jnp.select(
            [(at.rows == 0) | (plus.rows == 0), ~(known & is_number), ~told],
            [pairs.NOT_MEASURED, pairs.NOT_FINITE, pairs.ROUNDING],
            pairs.UPDATED,
        )
        return Pairs(jnp.where(usable, S, 0), jnp.where(usable, Y, 0), refusal)

    pairs_of = {
        layer.path: layer.over_blocks(change)(
            states[layer.path],
            to_matrices(layer, before),
            to_matrices(layer, after),
            at[layer.path],
            plus[layer.path],
            sketches_of(layer, at[layer.path]),
            sketches_of(layer, plus[layer.path]),
        )
        for layer in layers
    }
    return take_pairs(
        layers,
        states,
        pairs_of,
        "output",
        lambda H, of: generations.offer(H, of.s, of.y),
        generations.take,
        powell,
    )


def take_pairs(
    layers: Sequence[Layer],
    states: Mapping[str, BlockState],
    pairs_of: Mapping[str, Pairs],
    side: str,
    offer: Callable,
    take: Callable,
    powell: Number,
) -> dict[str, BlockState]:
    """The states after one side has been offered its pairs; what became of these is counted.

    Products with matrices are taken layer by layer, what lies between for all layers at once.

    Args:
        layers: whose states they are.
        states: before.
        pairs_of: the pairs.
        side: "input" or "output".
        offer: of the module that knows how this side is kept.
        take: the same.
        powell: mu_1.
    """
    held = {layer.path: getattr(states[layer.path], side) for layer in layers}
    offers = {
        layer.path: layer.over_blocks(offer)(held[layer.path], pairs_of[layer.path])
        for layer in layers
    }
    solved = block_bfgs.solve_all(
        {path: offer.products for path, offer in offers.items()},
        {path: offer.usable for path, offer in offers.items()},
        powell,
    )
    learned = {}
    for layer in layers:
        state, path = states[layer.path], layer.path
        H, taken = layer.over_blocks(take)(held[path], offers[path], solved[path])
        counts = state.counts + counted(side, taken, pairs_of[path].refusal)
        learned[path] = state._replace(**{side: H}, counts=counts)
    return learned


def counted(side: str, taken: Taken, refusal: jax.Array) -> jax.Array:
    """What became of the pairs of one side, int32, [*blocks, columns] by `COLUMNS`.

    Args:
        side: "input" or "output".
        taken: [*blocks, q].
        refusal: see `Pairs`, [*blocks, q] or [*blocks].
    """
    if refusal.ndim < taken.status.ndim:
        refusal = refusal[..., None]
    offered = jnp.broadcast_to(refusal == pairs.UPDATED, taken.status.shape)
    happened = {f"{side}_status": jnp.where(offered, taken.status, refusal)}
    if side == "output":
        happened |= {"powell_damped": taken.damped, "second_damped": offered}
    happened = {field: value.astype(jnp.int32) for field, value in happened.items()}
    total = jnp.sum(columns_of(happened), axis=-2, dtype=jnp.int32)
    is_reset = np.array([column == (f"{side}_status", pairs.RESET) for column in COLUMNS], np.int32)
    return total + taken.reset[..., None] * np.broadcast_to(is_reset, total.shape)


def sketches_of(layer: Layer, seen: LayerStatistics) -> Sketches:
    """What was measured of a layer; refuses a ``curvature_fn`` that did not."""
    if seen.sketches is None:
        raise ValueError(
            f"curvature_fn did not measure the sketches of layer {layer.path!r} that block K-BFGS "
            "asked for. A function of your own must pass its keyword arguments on to "
            "kfqn_optax.curvature_fn's: def curvature_fn(params, **asked)."
        )
    return seen.sketches


def _lengths(rows: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(rows * rows, axis=-1))


def start_of(root: jax.Array) -> jax.Array:
    """The scale of a factor that knows nothing but its damping."""
    return 1 / jnp.where(is_damping(root), root, 1)
