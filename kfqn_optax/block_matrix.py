"""A dense factor of block K-BFGS: q BFGS updates in one pass over the matrix.

The updates change the factor by ``B^T C B``, B the 2q rows of all s and all Hy (`block_bfgs`). So
the matrix is read twice and written once, whatever q is.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kfqn_optax import pairs
from kfqn_optax.block_bfgs import Solved, Taken, taken
from kfqn_optax.options import Number


class Offer(NamedTuple):
    """q pairs beside the matrix that is to take them.

    Attributes:
        products: of the rows with the y, [2q, q].
        usable: which pairs are finite, [q].
        rows: s_1, ..., s_q, Hy_1, ..., Hy_q, [2q, d].
        anew: whether the matrix starts anew, from a multiple of the identity.
        reset: whether it does so because rounding has ruined it.
    """

    products: jax.Array
    usable: jax.Array
    rows: jax.Array
    anew: jax.Array
    reset: jax.Array


def offer(
    H: jax.Array, s: jax.Array, y: jax.Array, start: Number, fresh: jax.Array | bool = False
) -> Offer:
    """The products that `block_bfgs.solve` reads.

    If some ``y.Hy`` is below 0 or not finite, though y is, rounding has ruined the factor: it is
    ``start`` times the identity before it takes the pairs.

    Args:
        H: inverse, [d, d], symmetric positive definite.
        s: changes of the point, [q, d].
        y: changes of the gradient, [q, d], with whatever damping they have by themselves.
        start: the scale of a factor that starts anew, above 0.
        fresh: whether it does so whatever H is.
    """
    usable = jnp.all(jnp.isfinite(s) & jnp.isfinite(y), axis=-1)
    s, y = (jnp.where(usable[:, None], x, 0) for x in (s, y))
    Hy = pairs.matmul(y, H)
    yHy = jnp.sum(y * Hy, axis=-1)
    reset = jnp.any((yHy < 0) | ~jnp.isfinite(yHy)) & jnp.isfinite(jnp.sum(y * y))
    anew = reset | fresh
    rows = jnp.concatenate([s, jnp.where(anew, start * y, Hy)])
    return Offer(pairs.matmul(rows, y.T), usable, rows, anew, reset & ~jnp.asarray(fresh))


def take(H: jax.Array, offer: Offer, solved: Solved, start: Number) -> tuple[jax.Array, Taken]:
    """The matrix after the pairs, symmetric to the last bit, and what became of them.

    It is as it was if no pair could be taken or the update would overflow.
    """
    H = jnp.where(offer.anew, start * jnp.eye(len(H), dtype=H.dtype), H)
    s, other = (pairs.matmul(x, offer.rows) for x in (solved.s, solved.other))
    count = 2 * len(solved.s)
    fits = jnp.isfinite(count * jnp.max(jnp.abs(s)) * jnp.max(jnp.abs(other)))
    s, other = jnp.where(fits, s, 0), jnp.where(fits, other, 0)
    change = pairs.matmul(s.T, other)
    return H + (change + change.T), taken(solved.status, solved.damped, fits, offer.reset)
