"""The inverse of one side of a layer, in whichever way it is kept.

Dense, a matrix updated by BFGS (`bfgs`); limited-memory, a few stored pairs (`lbfgs`), which may be
those of two `generations`; the directions of largest curvature alone (`nystrom`); or diagonal, for
the input side of an embedding: its one-hot inputs have a diagonal second moment, whose inverse can
simply be written down. What a state holds tells which it is.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfqn_optax import bfgs, generations, lbfgs, low_rank, nystrom
from kfqn_optax.generations import Generations
from kfqn_optax.lbfgs import Memory
from kfqn_optax.low_rank import LowRank
from kfqn_optax.nystrom import Nystrom


class Diagonal(NamedTuple):
    """The inverse of a diagonal matrix.

    Attributes:
        inverse: its diagonal, [d].
    """

    inverse: jax.Array


Factor = jax.Array | Memory | Generations | Nystrom | Diagonal


def apply(H: Factor, vectors: jax.Array) -> jax.Array:
    """H times a vector [d] or the columns of a matrix [d, k]."""
    if isinstance(H, Diagonal):
        return H.inverse.reshape(-1, *[1] * (vectors.ndim - 1)) * vectors
    if isinstance(H, Nystrom):
        return low_rank.apply_to_rows(as_low_rank(H), vectors.T).T
    if isinstance(H, Generations):
        H = generations.elder(H)
    return lbfgs.apply(H, vectors) if isinstance(H, Memory) else bfgs.apply(H, vectors)


def apply_to_rows(H: jax.Array | Memory | Generations | Nystrom, vectors: jax.Array) -> jax.Array:
    """H times the rows of a matrix, [k, d]; H is symmetric."""
    if isinstance(H, Nystrom | Generations):
        return low_rank.apply_to_rows(as_low_rank(H), vectors)
    if isinstance(H, Memory):
        return lbfgs.apply_to_rows(H, vectors)
    return bfgs.apply_to_rows(H, vectors)


def as_low_rank(H: Nystrom | Generations) -> LowRank:
    """A factor of directions, or of pairs that were never dropped, as ``c I + W^T C W``."""
    if isinstance(H, Nystrom):
        return nystrom.as_low_rank(H)
    return low_rank.of(generations.elder(H))


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


def remake(
    factors: Mapping[Any, Remake], times: float = 4, besides: int = 0
) -> dict[Any, jax.Array]:
    """``(A + damping I)^-1`` where it is wanted, and the factors held elsewhere, by key.

    Factors of similar sizes share one compiled inverse (`_share`), which takes them in turn: on a
    CPU, batched calls of LAPACK side by side in one program can wait for each other forever.

    Args:
        factors: by key.
        times: how much padding may cost, see `_share`.
        besides: the same.
    """
    alike: dict[Any, dict[Any, Remake]] = {}
    for key, (wanted, damping, A, held) in factors.items():
        d = held.shape[-1]
        row = Remake(
            wanted.reshape(-1), damping.reshape(-1), A.reshape(-1, d, d), held.reshape(-1, d, d)
        )
        alike.setdefault(held.dtype, {})[key] = row
    results = {}
    for rows in alike.values():
        shapes = {key: (len(row.held), row.held.shape[-1]) for key, row in rows.items()}
        for group in _share(shapes, times, besides):
            for key, H in _inverses({key: rows[key] for key in group}).items():
                wanted, _, _, held = rows[key]
                made = jnp.where(wanted[:, None, None], H, held)
                results[key] = made.reshape(factors[key].held.shape)
    return results


def _share(
    shapes: Mapping[Any, tuple[int, int]], times: float = 4, besides: int = 0
) -> list[list[Any]]:
    """Which factors' matrices are padded to the largest of them, to be inverted by one program.

    A compiled inverse takes about as long to make as a hundred to run, so few are wanted where they
    run once.

    Args:
        shapes: number of matrices and their size d, by key.
        times: the padded inverses may take so many times what they would take by themselves,
        besides: and this more, in units of d^3.
    """
    groups: list[list[Any]] = []
    largest = own = padded = 0
    for key in sorted(shapes, key=lambda key: -shapes[key][1]):
        count, d = shapes[key]
        own, padded = own + count * d**3, padded + count * largest**3
        if not groups or padded > times * own + besides:
            groups.append([])
            largest, own, padded = d, count * d**3, count * d**3
        groups[-1].append(key)
    return groups


def _inverses(rows: Mapping[Any, Remake]) -> dict[Any, jax.Array]:
    """``(A + damping I)^-1`` of every matrix that is wanted, in turn, [n, d, d]; by key."""
    largest = max(row.held.shape[-1] for row in rows.values())

    def pad(A: jax.Array) -> jax.Array:
        more = largest - A.shape[-1]
        return jnp.pad(A, ((0, 0), (0, more), (0, more)))

    def of_one(row: tuple) -> jax.Array:
        wanted, damping, A = row
        return jax.lax.cond(wanted, lambda: bfgs.inverse(A, damping).astype(A.dtype), lambda: A)

    stacked = [(wanted, damping, pad(A)) for wanted, damping, A, _ in rows.values()]
    made = jax.lax.map(of_one, jax.tree.map(lambda *x: jnp.concatenate(x), *stacked))
    inverses, at = {}, 0
    for key, row in rows.items():
        count, d, _ = row.held.shape
        inverses[key] = made[at : at + count, :d, :d]
        at += count
    return inverses


def size(H: Factor) -> int:
    """d, the number of rows of H."""
    if isinstance(H, Diagonal):
        return H.inverse.shape[-1]
    if isinstance(H, Nystrom):
        return H.rows.shape[-1]
    return H.s.shape[-1] if isinstance(H, Memory | Generations) else H.shape[-1]


def words(H: Factor) -> str:
    """How H is kept, in a few characters."""
    if isinstance(H, Diagonal):
        return f"{size(H)} diagonal"
    if isinstance(H, Memory | Generations):
        return f"{H.s.shape[-2]} pairs of {size(H)}"
    if isinstance(H, Nystrom):
        return f"{H.rows.shape[-2]} directions of {size(H)}"
    return f"{size(H)}^2"
