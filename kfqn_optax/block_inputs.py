"""The input factors of block K-BFGS: how they follow the second moment A of a layer's inputs.

A is known here, so nothing about it has to be guessed from differences. As a matrix, a factor takes
q exact pairs in each step that is measured. As `nystrom` directions it is made anew from A, and is
applied for a fraction of the price.

All layers at once; arguments by layer path.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfqn_optax import block_matrix, inverse, nystrom, pairs
from kfqn_optax.block_bfgs import Taken
from kfqn_optax.block_state import BlockState, Pairs, counted, sketches_of, start_of, take_pairs
from kfqn_optax.layers import Layer
from kfqn_optax.nystrom import Nystrom
from kfqn_optax.options import Number, is_damping
from kfqn_optax.statistics import LayerStatistics, is_usable

States = Mapping[str, BlockState]

STARTS = 5  # how often the directions are followed in a layer's first step


class _Seen(NamedTuple):
    """What a batch showed of the inputs of a layer.

    Attributes:
        sketches: of the inputs, 0 where they are of no use, [q, d].
        first: whether this is the first batch that is of use, [].
        refusal: why nothing is learned from it, [] (see `pairs`); `pairs.UPDATED` if it is.
    """

    sketches: jax.Array
    first: jax.Array
    refusal: jax.Array


def begin(
    layers: Sequence[Layer],
    states: States,
    measured: Mapping[str, LayerStatistics],
    factor_decay: Number,
    powell: Number,
    root: jax.Array,
) -> dict[str, BlockState]:
    """Layers whose A has taken in the batch, and whose input factors have followed it.

    Args:
        layers: whose states they are.
        states: as the previous step left them.
        measured: statistics at the parameters.
        factor_decay: decay of A; the first averages are plain means.
        powell: mu_1 of Powell's damping.
        root: sqrt(lambda).
    """

    def take_in(state: BlockState, seen: LayerStatistics, X: jax.Array) -> tuple[BlockState, _Seen]:
        batch = jnp.asarray(seen.input_moment)
        reached = (seen.rows > 0) & is_damping(root)
        usable = reached & is_usable(jnp.diagonal(batch))
        first, start = usable & (state.stage == 0), start_of(root).astype(batch.dtype)
        H_g = state.output._replace(scale=jnp.where(usable, start, state.output.scale))
        n = state.stage.astype(batch.dtype)
        decay = jnp.minimum(jnp.asarray(factor_decay, batch.dtype), n / (n + 1))
        A = jnp.where(usable, decay * state.input_moment + (1 - decay) * batch, state.input_moment)
        refusal = jnp.select(
            [seen.rows == 0, ~usable], [pairs.NOT_MEASURED, pairs.NOT_FINITE], pairs.UPDATED
        )
        state = state._replace(output=H_g, input_moment=A, stage=state.stage + usable)
        return state, _Seen(jnp.where(usable, X, 0), first, refusal)

    taken_in = {
        layer.path: layer.over_blocks(take_in)(
            states[layer.path],
            measured[layer.path],
            sketches_of(layer, measured[layer.path]).input,
        )
        for layer in layers
    }
    states = {path: state for path, (state, _) in taken_in.items()}
    seen = {path: of_layer for path, (_, of_layer) in taken_in.items()}
    if all(isinstance(state.input, Nystrom) for state in states.values()):
        return _follow(layers, states, seen, root)
    return _take_exact_pairs(layers, states, seen, powell, root)


def _take_exact_pairs(
    layers: Sequence[Layer],
    states: States,
    seen: Mapping[str, _Seen],
    powell: Number,
    root: jax.Array,
) -> dict[str, BlockState]:
    """Input factors that are matrices, after q BFGS updates.

    The pairs are the paper's Hessian action, ``s = H_a x`` and ``y = (A + lambda_A I) s``, for q
    sketches x of the inputs instead of their mean.
    """
    start = start_of(root)

    def pairs_of(state: BlockState, of_layer: _Seen) -> Pairs:
        X, first, refusal = of_layer
        S = jnp.where(first, start.astype(X.dtype) * X, inverse.apply_to_rows(state.input, X))
        Y = pairs.matmul(S, state.input_moment) + root.astype(S.dtype) * S
        return Pairs(S, Y, refusal, first)

    return take_pairs(
        layers,
        states,
        {
            layer.path: layer.over_blocks(pairs_of)(states[layer.path], seen[layer.path])
            for layer in layers
        },
        "input",
        lambda H, of: block_matrix.offer(H, of.s, of.y, start.astype(of.s.dtype), of.fresh),
        lambda H, offer, solved: block_matrix.take(H, offer, solved, start.astype(H.dtype)),
        powell,
    )


def _follow(
    layers: Sequence[Layer], states: States, seen: Mapping[str, _Seen], root: jax.Array
) -> dict[str, BlockState]:
    """Input factors that know the largest curvature only, made anew from A.

    A first batch is gone through `STARTS` times, since the iteration begins with random rows.
    """

    def offer(H: Nystrom, A: jax.Array, of_layer: _Seen, again: jax.Array) -> nystrom.Offer:
        damping = jnp.where(is_damping(root), root, 1).astype(A.dtype)
        return nystrom.offer(H, A, of_layer.sketches, damping, of_layer.first & ~again)

    def take(H: Nystrom, of_layer: _Seen, offer: nystrom.Offer, roots: jax.Array):
        made, usable = nystrom.take(H, offer, roots)
        wanted = of_layer.refusal == pairs.UPDATED
        return jax.tree.map(lambda new, held: jnp.where(wanted, new, held), made, H), usable

    def once(i: jax.Array, made: dict[str, Any]) -> dict[str, Any]:
        offers = {
            layer.path: layer.over_blocks(functools.partial(offer, again=i > 0))(
                made[layer.path][0], states[layer.path].input_moment, seen[layer.path]
            )
            for layer in layers
        }
        roots = nystrom.inverse_roots({path: offer.grams for path, offer in offers.items()})
        return {
            layer.path: layer.over_blocks(take)(
                made[layer.path][0], seen[layer.path], offers[layer.path], roots[layer.path]
            )
            for layer in layers
        }

    def count(state: BlockState, of_layer: _Seen, made: tuple[Nystrom, jax.Array]) -> BlockState:
        H, usable = made
        status, nothing = jnp.where(usable, pairs.UPDATED, pairs.NOT_FINITE), jnp.zeros((), bool)
        taken = Taken(status[None], nothing[None], nothing)
        counts = state.counts + counted("input", taken, of_layer.refusal)
        return state._replace(input=H, counts=counts)

    begun = {
        path: (state.input, jnp.zeros(state.stage.shape, bool)) for path, state in states.items()
    }
    first = jnp.any(jnp.stack([jnp.any(of_layer.first) for of_layer in seen.values()]))
    made = jax.lax.fori_loop(0, jnp.where(first, STARTS, 1), once, begun)
    return {
        layer.path: layer.over_blocks(count)(states[layer.path], seen[layer.path], made[layer.path])
        for layer in layers
    }
