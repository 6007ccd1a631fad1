"""Limited-memory factor: an inverse kept as its last p pairs, never as a d x d matrix.

The inverse is what BFGS makes of the identity with the stored pairs, oldest first (L-BFGS with
H_0 = I). Write S and Y for the matrices with the pairs as columns, D for the diagonal of ``S^T Y``
and R for its upper triangle, diagonal included. The compact representation of Byrd, Nocedal and
Schnabel (1994, theorem 2.2, with gamma = 1) is, with its terms grouped as two squares,

    H = V^T V + S R^-T D R^-1 S^T,    V = I - Y R^-1 S^T,

and ``c V^T V`` for the first term where BFGS starts from c I.

Grouped so, it needs no ``Y^T Y``, is symmetric and has no negative eigenvalue whatever rounding
did to R^-1, and costs six matrix products: it is the two-loop recursion with blocks for loops.

`init`, `update`, `apply`: the dense factor has functions of the same names.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kfqn_optax import pairs
from kfqn_optax.pairs import Pair


class Memory(NamedTuple):
    """The last p pairs, and what `apply` needs of their inner products.

    Row i of every field belongs to pair i; a new pair enters at the last row and moves the others
    up by one. The first ``p - count`` rows are empty: zero in every field, R^-1's columns too, so
    that they add nothing to any product. The stored pairs are ``s[p - count:]``, ``y[p - count:]``.

    Attributes:
        s: changes of the point, oldest first, [p, d].
        y: changes of the gradient, oldest first, [p, d].
        sy: the inner products s.y, the diagonal of D, [p].
        R_inverse: R^-1, upper triangular, [p, p].
        count: how many pairs are stored, int32 scalar.
        scale: c, scalar; None for 1.
    """

    s: jax.Array
    y: jax.Array
    sy: jax.Array
    R_inverse: jax.Array
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    scale: jax.Array | None = None


def init(d: int, memory_size: int, dtype: jnp.dtype) -> Memory:
    """No pair yet: the identity on [d], with room for ``memory_size`` (p >= 1) pairs."""
    return Memory(
        s=jnp.zeros((memory_size, d), dtype),
        y=jnp.zeros((memory_size, d), dtype),
        sy=jnp.zeros(memory_size, dtype),
        R_inverse=jnp.zeros((memory_size, memory_size), dtype),
        count=jnp.zeros((), jnp.int32),
    )


def update(H: Memory, pair: Pair, status: jax.Array) -> tuple[Memory, jax.Array]:
    """Stores a pair, or does not; when the memory is full the oldest pair goes.

    The pair is stored as it is, unless the factor with it would be lost to rounding (`_is_lost`):
    then the memory is emptied, and the next pair starts from the identity. Costs O(p^2 d).

    Args:
        H: the factor, with p rows of length d.
        pair: s and y, [d] each, damped.
        status: int32 scalar from `pairs.pair_status`; the pair is stored only if it is 0.

    Returns:
        H, and the status: `pairs.NOT_FINITE` now if the factor with the pair would overflow,
        `pairs.RESET` if the memory was emptied. H comes back bit for bit unless the status is one
        of `pairs.UPDATED` and `pairs.RESET`.
    """
    stored = _push(H, pair)
    verdict = jnp.select(
        [~is_finite(stored), _is_lost(stored)], [pairs.NOT_FINITE, pairs.RESET], pairs.UPDATED
    )
    offered = status == pairs.UPDATED
    status = jnp.where(offered, verdict, status).astype(status.dtype)
    emptied = offered & (status == pairs.RESET)

    def choose(new: jax.Array, old: jax.Array) -> jax.Array:
        kept = jnp.where(emptied, jnp.zeros_like(old), old)
        return jnp.where(status == pairs.UPDATED, new, kept)

    return jax.tree.map(choose, stored, H), status


def _push(H: Memory, pair: Pair) -> Memory:
    """H with the pair as its last row and without its first.

    R^-1 is kept, not R: a new pair appends one column to it,

        [R  S^T y]^-1    [R^-1  -rho R^-1 S^T y]
        [0   s.y ]     = [0            rho     ],    rho = 1 / s.y,

    and without the oldest pair it is its own trailing block, R being triangular. So rounding errors
    of a pair leave with it, and `apply` multiplies where it would have to solve: in float32 that is
    as accurate here (damping keeps R well conditioned: 100 or so with unit diagonal), and quicker.
    """
    s, y = pair
    sy = pairs.dot(s, y)
    rho = 1 / jnp.where(sy > 0, sy, 1)
    R_inverse = H.R_inverse[1:, 1:]
    column = -rho * pairs.matmul(R_inverse, pairs.matmul(H.s[1:], y))
    return Memory(
        s=jnp.concatenate([H.s[1:], s[None]]),
        y=jnp.concatenate([H.y[1:], y[None]]),
        sy=jnp.concatenate([H.sy[1:], sy[None]]),
        R_inverse=jnp.block([[R_inverse, column[:, None]], [jnp.zeros_like(column), rho]]),
        count=jnp.minimum(H.count + 1, len(H.s)),
    )


def is_finite(H: Memory) -> jax.Array:
    """Whether H and all that `apply` forms on the way fit in the dtype, for entries up to 1.

    These signs turn each subtraction in `apply` into an addition of absolute values: nothing
    cancels, and an overflow anywhere on the way comes out as inf or nan.
    """
    signs = Memory(jnp.abs(H.s), -jnp.abs(H.y), H.sy, jnp.abs(H.R_inverse), H.count, H.scale)
    return jnp.all(jnp.isfinite(apply(signs, jnp.ones_like(H.s[0]))))


def _is_lost(H: Memory) -> jax.Array:
    """Whether rounding errors of H are no longer small beside the identity that it starts from.

    Pair i adds to H, in directions that the pairs before it have made, at most ``|s_i|^2 (y_i.H y_i
    + s_i.y_i) / (s_i.y_i)^2``, H that of the pairs before it. Damping keeps this small when the
    pair is made (`Pair`s of 1000 healthy updates: below 11); but once the oldest pair has left, the
    others stand on another H than they were damped with, and where gradients had changed by orders
    of magnitude, H of 10^13 was seen. An error of the relative precision of that is above 1.

    Here ``y.Hy / (s.y)^2`` is ``|Y R^-1 e_i|^2 + |D^1/2 R^-1 e_i|^2``, the diagonal of the middle
    matrix of Byrd, Nocedal and Schnabel. H is lost where a hundred times the relative precision of
    the largest such term is above both 1 and the largest ``|s|^2 / s.y``, which is what the last
    pair asks H to be along s. (In float32 a term of 84,000.)
    """
    lengths = jnp.sqrt(jnp.sum(H.s * H.s, axis=-1))
    columns = H.R_inverse * lengths[None, :]
    through_y = pairs.matmul(columns.T, H.y)
    through_s = jnp.sqrt(H.sy)[:, None] * columns
    terms = jnp.sum(through_y**2, axis=-1) + jnp.sum(through_s**2, axis=0)
    asked = jnp.max(lengths * jnp.diag(columns))
    return 100 * jnp.finfo(H.s.dtype).eps * jnp.max(terms) > jnp.maximum(asked, 1)


def apply(H: Memory, vectors: jax.Array) -> jax.Array:
    """H times the columns of ``vectors``, [d, k] -> [d, k], or times one vector, [d] -> [d].

    In the letters of the two-loop recursion (Nocedal and Wright, algorithm 7.4): the first loop
    is ``alpha = R^-1 S^T v``, ``q = c (v - Y alpha)``; the second ``q + S R^-T (D alpha - Y^T q)``.
    Costs 8 p d k + 4 p^2 k FLOPs.
    """
    if vectors.ndim == 1:
        return apply(H, vectors[:, None])[:, 0]
    alpha = pairs.matmul(H.R_inverse, pairs.matmul(H.s, vectors))
    q = _scaled(H, vectors - pairs.matmul(H.y.T, alpha))
    beta = H.sy[:, None] * alpha - pairs.matmul(H.y, q)
    return q + pairs.matmul(H.s.T, pairs.matmul(H.R_inverse.T, beta))


def apply_to_rows(H: Memory, vectors: jax.Array) -> jax.Array:
    """H times the rows of ``vectors``, [k, d] -> [k, d]: `apply` without transposing them."""
    alpha = pairs.matmul(pairs.matmul(vectors, H.s.T), H.R_inverse.T)
    q = _scaled(H, vectors - pairs.matmul(alpha, H.y))
    beta = H.sy[None, :] * alpha - pairs.matmul(q, H.y.T)
    return q + pairs.matmul(pairs.matmul(beta, H.R_inverse), H.s)


def _scaled(H: Memory, vectors: jax.Array) -> jax.Array:
    return vectors if H.scale is None else H.scale * vectors


def dense(H: Memory) -> jax.Array:
    """The inverse as a matrix, [d, d]."""
    return apply(H, jnp.eye(H.s.shape[-1], dtype=H.s.dtype))
