"""Dense factor: an inverse kept as a d x d matrix and updated by the BFGS formula.

`init`, `update`, `apply`: the limited-memory factor has functions of the same names.
"""

from typing import NamedTuple

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

    Needed once, before the first step; by K-FAC and its kin now and then. By Cholesky; symmetric to
    the last bit. Where rounding makes that fail (an A whose scale dwarfs the damping), the inverse
    of the diagonal stands in: a factor must be finite and positive definite whatever the data.
    """
    d = A.shape[-1]
    damped = A + damping * jnp.eye(d, dtype=A.dtype)
    lower = jsl.cho_factor(damped, lower=True)
    H = jsl.cho_solve(lower, jnp.eye(d, dtype=A.dtype))
    H = (H + H.T) / 2
    return jnp.where(jnp.isfinite(jnp.sum(H)), H, jnp.diag(1 / jnp.diag(damped)))


class Change(NamedTuple):
    """One update, ``H + s w^T + w s^T``.

    Attributes:
        s: [d].
        w: [d].
        scale: where it is above 0, H is first replaced by this multiple of the identity, [].
    """

    s: jax.Array
    w: jax.Array
    scale: jax.Array


def update(H: jax.Array, pair: Pair, status: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One BFGS update of the inverse (Nocedal and Wright, eq. 6.17), or none.

    ``H + (rho y.Hy + 1) rho s s^T - rho (s (Hy)^T + (Hy) s^T)`` with ``rho = 1 / s.y``, written as
    ``H + s w^T + w s^T`` with ``w = (rho y.Hy + 1) rho s / 2 - rho Hy``: one pass over H, and rho^2
    is never formed (it overflows float32 first). Afterwards ``H y = s``.

    A factor that rounding has ruined, or that this update would ruin, is given up (`change` says
    how that shows): the update then starts from ``(s.y / y.y) I`` in its place, as BFGS starts in
    Nocedal and Wright, eq. 6.20.

    Args:
        H: inverse, [d, d], symmetric positive definite.
        pair: s and y, [d] each, damped.
        status: int32 scalar from `pairs.pair_status`; the update happens only if it is 0.

    Returns:
        H, and the status: `pairs.NOT_FINITE` now if the update itself would overflow,
        `pairs.RESET` if H was given up. H comes back bit for bit unless the status is one of
        `pairs.UPDATED` and `pairs.RESET`.
    """
    step, status = change(pair, apply(H, pair.y), status)
    return add(H, step), status


def change(pair: Pair, Hy: jax.Array, status: jax.Array) -> tuple[Change, jax.Array]:
    """The vectors of one BFGS update: `update` is this and `add`.

    They show what has become of H. ``y.Hy`` is negative only if H is not positive definite. And an
    update takes H along y from ``y.Hy`` down to ``s.y``: where that is less than 100 times the
    relative precision of what it was, it leaves not two digits, and what rounding leaves in their
    place can be negative. (In float32 that is a factor of 84,000; damped output pairs stay below
    some hundreds, but the second moment of an input that was dead can grow so fast.)

    Args:
        pair: s and y, [d] each, damped.
        Hy: the inverse times y, [d].
        status: int32 scalar from `pairs.pair_status`.

    Returns:
        The change, nothing unless the status is 0; and the status.
    """
    s, y = pair
    sy, yHy = pairs.dot(s, y), pairs.dot(y, Hy)
    precision = jnp.finfo(s.dtype).eps
    reset = (yHy < 0) | (100 * precision * yHy > sy)
    scale = jnp.where(reset, sy / pairs.dot(y, y), 0)
    Hy, yHy = jnp.where(reset, scale * y, Hy), jnp.where(reset, sy, yHy)
    rho = 1 / jnp.where(sy > 0, sy, 1)
    w = (rho * yHy + 1) * rho / 2 * s - rho * Hy
    largest = 2 * jnp.max(jnp.abs(s)) * jnp.max(jnp.abs(w))  # bounds every entry of the change
    usable = jnp.isfinite(largest) & (~reset | ((scale > 0) & jnp.isfinite(scale)))
    accept = status == pairs.UPDATED
    status = jnp.where(accept & ~usable, pairs.NOT_FINITE, status)
    accept &= usable
    # Adding -0 changes no bit, adding 0 takes the sign of -0.
    step = Change(jnp.where(accept, s, 0), jnp.where(accept, w, -0.0), jnp.where(accept, scale, 0))
    return step, jnp.where(accept & reset, pairs.RESET, status)


def add(H: jax.Array, step: Change) -> jax.Array:
    """``H + s w^T + w s^T``: one pass over H, [d, d]."""
    s, w, scale = step
    H = jnp.where(scale > 0, scale * jnp.eye(len(s), dtype=H.dtype), H)
    return H + (s[:, None] * w[None, :] + w[:, None] * s[None, :])


def apply(H: jax.Array, vectors: jax.Array) -> jax.Array:
    """H times a vector [d], or the columns of ``vectors``, [d, k] -> [d, k]."""
    return pairs.matvec(H, vectors) if vectors.ndim == 1 else pairs.matmul(H, vectors)


def apply_to_rows(H: jax.Array, vectors: jax.Array) -> jax.Array:
    """H, symmetric, times the rows of ``vectors``, [k, d] -> [k, d]."""
    return pairs.matmul(vectors, H)
