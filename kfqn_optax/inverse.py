"""The inverse of one side of a layer, in whichever way it is kept.

Dense, a matrix updated by BFGS (`bfgs`); limited-memory, a few stored pairs (`lbfgs`); or diagonal,
for the input side of an embedding: its one-hot inputs have a diagonal second moment, whose inverse
can simply be written down. What a state holds tells which it is.
"""

from typing import NamedTuple

import jax

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
    if isinstance(H, Diagonal):
        return vectors * H.inverse[None, :]
    if isinstance(H, Memory):
        return lbfgs.apply_to_rows(H, vectors)
    return bfgs.apply_to_rows(H, vectors)


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
