"""Dense factor: an inverse kept as a d x d matrix and updated by the BFGS formula.

`init`, `update`, `apply`: the limited-memory factor has functions of the same names.
"""

import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl

from kfqn_optax import pairs
from kfqn_optax.pairs import Pair


def init(d: int, dtype: jnp.dtype) -> jax.Array:
    """The identity, [d, d]: no curvature has been seen yet."""
    return jnp.eye(d, dtype=dtype)


def inverse(A: jax.Array, damping: jax.Array) -> jax.Array:
    """``(A + damping I)^-1`` for a positive semidefinite A, [d, d].

    Needed once, before the first step. By Cholesky; symmetric to the last bit. Where rounding makes
    that fail (an A whose scale dwarfs the damping), the inverse of the diagonal stands in: a factor
    must be finite and positive definite whatever the data.
    """
    d = A.shape[-1]
    damped = A + damping * jnp.eye(d, dtype=A.dtype)
    lower = jsl.cho_factor(damped, lower=True)
    H = jsl.cho_solve(lower, jnp.eye(d, dtype=A.dtype))
    H = (H + H.T) / 2
    return jnp.where(jnp.isfinite(jnp.sum(H)), H, jnp.diag(1 / jnp.diag(damped)))


def update(H: jax.Array, pair: Pair, status: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One BFGS update of the inverse (Nocedal and Wright, eq. 6.17), or none.

    ``H + (rho y.Hy + 1) rho s s^T - rho (s (Hy)^T + (Hy) s^T)`` with ``rho = 1 / s.y``, written as
    ``H + s w^T + w s^T`` with ``w = (rho y.Hy + 1) rho s / 2 - rho Hy``: one pass over H, and rho^2
    is never formed (it overflows float32 first). Afterwards ``H y = s``.

    Args:
        H: inverse, [d, d], symmetric positive definite.
        pair: s and y, [d] each, damped.
        status: int32 scalar from `pairs.pair_status`; the update happens only if it is 0.

    Returns:
        H, and the status: `pairs.NOT_FINITE` now if the update itself would overflow. H comes back
        bit for bit unless the status is 0.
    """
    step, status = change(pair, apply(H, pair.y), status)
    return add(H, step), status


def change(pair: Pair, Hy: jax.Array, status: jax.Array) -> tuple[Pair, jax.Array]:
    """The vectors of one BFGS update: `update` is this and `add`.

    Args:
        pair: s and y, [d] each, damped.
        Hy: the inverse times y, [d].
        status: int32 scalar from `pairs.pair_status`.

    Returns:
        s and w of ``H + s w^T + w s^T``, both 0 unless the status is 0; and the status.
    """
    s, y = pair
    sy = pairs.dot(s, y)
    rho = 1 / jnp.where(sy > 0, sy, 1)
    w = (rho * pairs.dot(y, Hy) + 1) * rho / 2 * s - rho * Hy
    largest = 2 * jnp.max(jnp.abs(s)) * jnp.max(jnp.abs(w))  # bounds every entry of the change
    overflows = ~jnp.isfinite(largest)
    status = jnp.where((status == pairs.UPDATED) & overflows, pairs.NOT_FINITE, status)
    accept = status == pairs.UPDATED
    return Pair(jnp.where(accept, s, 0), jnp.where(accept, w, 0)), status


def add(H: jax.Array, step: Pair) -> jax.Array:
    """``H + s w^T + w s^T``: one pass over H, [d, d]."""
    s, w = step
    return H + (s[:, None] * w[None, :] + w[:, None] * s[None, :])


def apply(H: jax.Array, vectors: jax.Array) -> jax.Array:
    """H times a vector [d], or the columns of ``vectors``, [d, k] -> [d, k]."""
    return pairs.matvec(H, vectors) if vectors.ndim == 1 else pairs.matmul(H, vectors)


def apply_to_rows(H: jax.Array, vectors: jax.Array) -> jax.Array:
    """H, symmetric, times the rows of ``vectors``, [k, d] -> [k, d]."""
    return pairs.matmul(vectors, H)
