"""Several BFGS updates of a dense inverse in one pass over it.

A step of K-BFGS learns one pair for each factor. Here q pairs come at once: they are taken one
after the other, each damped by what the factor is by then, but in coordinates. The factor is
``H + B^T C B``, B the 2q rows of all s and all Hy, C a small matrix that starts at 0, and each pair
changes C alone. So H is read twice and written once, whatever q is.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kfqn_optax import pairs
from kfqn_optax.options import Number


class Taken(NamedTuple):
    """What became of q pairs.

    Attributes:
        status: whether each entered the factor, or why not (see `pairs`), int32, [q].
        damped: which of those that entered Powell's damping changed, bool, [q].
        reset: whether the factor was lost before, and starts anew from a multiple of the identity.
    """

    status: jax.Array
    damped: jax.Array
    reset: jax.Array


def update(
    H: jax.Array, s: jax.Array, y: jax.Array, powell: Number, start: Number
) -> tuple[jax.Array, Taken]:
    """BFGS with pairs (s_1, y_1), ..., (s_q, y_q), in this order.

    Each is damped first (`pairs.damp_powell`), which keeps ``s.y`` at or above ``powell y.Hy``, and
    so the factor positive definite. A pair with ``y.Hy`` not above 0 (y = 0: a layer that no
    example reaches), or with an ``s.y`` too near to the ends of the dtype's range, is left out, as
    by `pairs.pair_status`. If some ``y.Hy`` is below 0 or not finite, though y is, rounding has
    ruined the factor: it is made ``start`` times the identity before it takes the pairs.

    Args:
        H: inverse, [d, d], symmetric positive definite.
        s: changes of the point, [q, d].
        y: changes of the gradient, [q, d], with whatever damping they have by themselves.
        powell: mu_1 of Powell's damping, in (0, 1).
        start: the scale of a factor that starts anew, above 0.

    Returns:
        H, symmetric to the last bit; as it was if no pair could be taken or the update would
        overflow.
    """
    usable = jnp.all(jnp.isfinite(s) & jnp.isfinite(y), axis=-1, keepdims=True)
    s, y = jnp.where(usable, s, 0), jnp.where(usable, y, 0)
    Hy = pairs.matmul(y, H)
    yHy = jnp.sum(y * Hy, axis=-1)
    reset = jnp.any((yHy < 0) | ~jnp.isfinite(yHy)) & jnp.isfinite(jnp.sum(y * y))
    H = jnp.where(reset, start * jnp.eye(H.shape[-1], dtype=H.dtype), H)
    Hy = jnp.where(reset, start * y, Hy)

    q = len(s)
    B = jnp.concatenate([s, Hy])
    By = pairs.matmul(B, y.T)
    numbers = jnp.finfo(H.dtype)

    def take(C: jax.Array, i: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """One pair, in coordinates of B: its s is the i-th row, its Hy is ``B^T w``."""
        products = By[:, i]
        e = jax.nn.one_hot(i, 2 * q, dtype=H.dtype)
        w = jax.nn.one_hot(q + i, 2 * q, dtype=H.dtype) + pairs.matvec(C, products)
        sy, yHy = products[i], jnp.sum(products * w)
        by_powell = sy <= powell * yHy
        t = (1 - powell) * yHy / jnp.where(by_powell, yHy - sy, 1)
        v = jnp.where(by_powell, t * e + (1 - t) * w, e)
        sy = jnp.where(by_powell, powell * yHy, sy)
        rho = 1 / jnp.where(sy > 0, sy, 1)
        u = (1 + rho * yHy) * rho / 2 * v - rho * w
        small, large = sy <= numbers.tiny / numbers.eps, sy >= numbers.max * numbers.eps
        ok = jnp.isfinite(jnp.sum(jnp.abs(v)) * jnp.sum(jnp.abs(u))) & ~large
        reasons = [~usable[i, 0], yHy <= 0, small, ~ok]
        words = [pairs.NOT_FINITE, pairs.NOT_POSITIVE, pairs.TOO_SMALL, pairs.NOT_FINITE]
        status = jnp.select(reasons, words, pairs.UPDATED).astype(jnp.int32)
        ok = status == pairs.UPDATED
        v, u = jnp.where(ok, v, 0), jnp.where(ok, u, 0)
        C = C + v[:, None] * u[None, :] + u[:, None] * v[None, :]
        return C, (v, u, status, ok & by_powell)

    _, (v, u, status, damped) = jax.lax.scan(
        take, jnp.zeros((2 * q, 2 * q), H.dtype), jnp.arange(q)
    )
    V, U = pairs.matmul(v, B), pairs.matmul(u, B)
    fits = jnp.isfinite(2 * q * jnp.max(jnp.abs(V)) * jnp.max(jnp.abs(U)))
    V, U = jnp.where(fits, V, 0), jnp.where(fits, U, 0)
    change = pairs.matmul(V.T, U)
    new = H + (change + change.T)
    status = jnp.where(fits | (status != pairs.UPDATED), status, pairs.NOT_FINITE)
    return new, Taken(status, damped & fits, reset)
