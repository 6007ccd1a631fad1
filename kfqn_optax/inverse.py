"""The inverse of one side of a layer, in whichever way it is kept.

Dense, a matrix updated by BFGS (`bfgs`); limited-memory, a few stored pairs (`lbfgs`); or diagonal,
for the input side of an embedding: its one-hot inputs have a diagonal second moment, whose inverse
can simply be written down. What a state holds tells which it is.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfqn_optax import bfgs, lbfgs
from kfqn_optax.lbfgs import Memory


class Diagonal(NamedTuple):
    """The inverse of a diagonal matrix.

    Attributes:
        inverse: its diagonal, [d].
    """

    inverse: jax.Array


Factor = jax.Array | Memory | Diagonal


def apply(H: Factor, vectors: jax.Array) -> jax.Array:
    """H times a vector [d] or the columns of a matrix [d, k]."""
    if isinstance(H, Diagonal):
        return H.inverse.reshape(-1, *[1] * (vectors.ndim - 1)) * vectors
    return lbfgs.apply(H, vectors) if isinstance(H, Memory) else bfgs.apply(H, vectors)


def apply_to_rows(H: Factor, vectors: jax.Array) -> jax.Array:
    """H times the rows of a matrix, [k, d]; H is symmetric."""
    if isinstance(H, jax.Array):
        return bfgs.apply_to_rows(H, vectors)
    return apply(H, vectors.T).T


class Remake(NamedTuple):
    """A dense factor that may be made anew from a second moment.

    Attributes:
        wanted: whether it is, [*blocks].
        damping: added to the diagonal of the moment, [*blocks].
        moment: A, [*blocks, d, d].
        held: the factor as it is, [*blocks, d, d].
    """

    wanted: jax.Array
    damping: jax.Array
    moment: jax.Array
    held: jax.Array


def remake(factors: Mapping[Any, Remake]) -> dict[Any, jax.Array]:
    """``(A + damping I)^-1`` where it is wanted, and the factors held elsewhere, by key.

    Factors of one size share one compiled inverse, which takes them in turn: on a CPU, batched
    calls of LAPACK side by side in one program can wait for each other forever.
    """

    def of_one(row: Remake) -> jax.Array:
        made = bfgs.inverse(row.moment, row.damping).astype(row.moment.dtype)
        return jnp.where(row.wanted, made, row.held)

    alike: dict[Any, dict[Any, Remake]] = {}
    for key, (wanted, damping, A, held) in factors.items():
        d = held.shape[-1]
        row = Remake(
            wanted.reshape(-1), damping.reshape(-1), A.reshape(-1, d, d), held.reshape(-1, d, d)
        )
        alike.setdefault((d, held.dtype), {})[key] = row
    results = {}
    for rows in alike.values():
        made = jax.lax.map(of_one, jax.tree.map(lambda *x: jnp.concatenate(x), *rows.values()))
        at = 0
        for key, row in rows.items():
            results[key] = made[at : at + len(row.wanted)].reshape(factors[key].held.shape)
            at += len(row.wanted)
    return results


def size(H: Factor) -> int:
    """d, the number of rows of H."""
    if isinstance(H, Diagonal):
        return H.inverse.shape[-1]
    return H.s.shape[-1] if isinstance(H, Memory) else H.shape[-1]


def words(H: Factor) -> str:
    """How H is kept, in a few characters."""
    if isinstance(H, Diagonal):
        return f"{size(H)} diagonal"
    return f"{H.s.shape[-2]} pairs of {size(H)}" if isinstance(H, Memory) else f"{size(H)}^2"
