"""Several BFGS updates of an inverse, one after the other, in coordinates.

A step of K-BFGS learns one pair for each factor. Here q pairs come at once: they are taken one
after the other, each damped by what the factor H is by then. All vectors that this takes are sums
of the 2q rows s_1, ..., s_q, Hy_1, ..., Hy_q, H as it was before. So the inner products of these
rows with y_1, ..., y_q are all that is read, and the pairs of all layers go through one small
program. How a factor is kept decides what its rows are and what becomes of the result: a matrix
(`block_matrix`) is updated, `generations` of pairs take them in.
"""

from collections.abc import Hashable, Mapping
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from kfqn_optax import pairs
from kfqn_optax.options import Number


class Solved(NamedTuple):
    """q pairs, damped, and their updates of the inverse.

    Attributes:
        s: coordinates of each s, damped, [q, 2q]: a sum of the 2q rows; 0 for a pair left out.
        other: those of the other half of each update, H becomes ``H + s other^T + other s^T``,
            [q, 2q]; 0 for a pair left out.
        sy: the inner products s.y, [q]; 0 for a pair left out.
        R_inverse: the inverse of the upper triangle of ``s_i . y_j``, [q, q]; rows and columns of a
            pair left out are 0.
        status: whether each may enter the factor, or why not (see `pairs`), int32, [q].
        damped: which of those that may Powell's damping changed, bool, [q].
    """

    s: jax.Array
    other: jax.Array
    sy: jax.Array
    R_inverse: jax.Array
    status: jax.Array
    damped: jax.Array


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


def taken(status: jax.Array, damped: jax.Array, fits: jax.Array, reset: jax.Array) -> Taken:
    """What became of the pairs of a `Solved`: none was taken where the factor would overflow."""
    refused = ~fits & (status == pairs.UPDATED)
    return Taken(jnp.where(refused, pairs.NOT_FINITE, status), damped & fits, reset)


def solve(products: jax.Array, usable: jax.Array, powell: Number) -> Solved:
    """BFGS with pairs (s_1, y_1), ..., (s_q, y_q), in this order.

    Each is damped first (`pairs.damp_powell`), which keeps ``s.y`` at or above ``powell y.Hy``, and
    so the factor positive definite. A pair with ``y.Hy`` not above 0 (y = 0: a layer that no
    example reaches), or with an ``s.y`` too near to the ends of the dtype's range, is left out, as
    by `pairs.pair_status`.

    Args:
        products: of the rows s_1, ..., s_q, Hy_1, ..., Hy_q with y_1, ..., y_q, [2q, q].
        usable: whether s and y of a pair are finite, bool, [q]; where not, they are 0 in products.
        powell: mu_1 of Powell's damping, in (0, 1).
    """
    dtype, q = products.dtype, products.shape[-1]
    numbers = jnp.finfo(dtype)

    def take(carry: tuple, i: jax.Array) -> tuple[tuple, tuple[jax.Array, ...]]:
        """One pair; H is ``H + B^T C B`` by now, B the rows, and the pair's own Hy ``B^T w``."""
        C, T, vs = carry
        of_pair = products[:, i]
        e = jax.nn.one_hot(i, 2 * q, dtype=dtype)
        w = jax.nn.one_hot(q + i, 2 * q, dtype=dtype) + pairs.matvec(C, of_pair)
        sy, yHy = of_pair[i], jnp.sum(of_pair * w)
        by_powell = sy <= powell * yHy
        t = (1 - powell) * yHy / jnp.where(by_powell, yHy - sy, 1)
        v = jnp.where(by_powell, t * e + (1 - t) * w, e)
        sy = jnp.where(by_powell, powell * yHy, sy)
        rho = 1 / jnp.where(sy > 0, sy, 1)
        u = (1 + rho * yHy) * rho / 2 * v - rho * w
        small, large = sy <= numbers.tiny / numbers.eps, sy >= numbers.max * numbers.eps
        column = -rho * pairs.matvec(T, pairs.matvec(vs, of_pair))
        sizes = [jnp.sum(jnp.abs(x)) for x in (v, u, column)]
        fits = jnp.isfinite(sizes[0] * sizes[1]) & jnp.isfinite(sizes[2]) & ~large
        reasons = [~usable[i], yHy <= 0, small, ~fits]
        words = [pairs.NOT_FINITE, pairs.NOT_POSITIVE, pairs.TOO_SMALL, pairs.NOT_FINITE]
        status = jnp.select(reasons, words, pairs.UPDATED).astype(jnp.int32)
        ok = status == pairs.UPDATED
        v, u = jnp.where(ok, v, 0), jnp.where(ok, u, 0)
        at_i = jax.nn.one_hot(i, q, dtype=dtype)
        column = jnp.where(ok, column + rho * at_i, 0)
        C = C + v[:, None] * u[None, :] + u[:, None] * v[None, :]
        carry = C, T + column[:, None] * at_i[None, :], vs + at_i[:, None] * v[None, :]
        return carry, (u, jnp.where(ok, sy, 0), status, ok & by_powell)

    empty = [jnp.zeros(shape, dtype) for shape in ((2 * q, 2 * q), (q, q), (q, 2 * q))]
    (_, R_inverse, s), (other, sy, status, damped) = jax.lax.scan(take, tuple(empty), jnp.arange(q))
    return Solved(s, other, sy, R_inverse, status, damped)


Key = TypeVar("Key", bound=Hashable)


def solve_all(
    products: Mapping[Key, jax.Array], usable: Mapping[Key, jax.Array], powell: Number
) -> dict[Key, Solved]:
    """`solve` for many factors in one loop (one for each dtype).

    Args:
        products: by key, [..., 2q, q], the same q for all.
        usable: by key, [..., q].
        powell: mu_1.
    """
    alike: dict[jnp.dtype, list[Key]] = {}
    for key, array in products.items():
        alike.setdefault(array.dtype, []).append(key)
    solved = {}
    for keys in alike.values():
        rows = [products[key].reshape(-1, *products[key].shape[-2:]) for key in keys]
        flags = [usable[key].reshape(-1, usable[key].shape[-1]) for key in keys]
        together = jax.vmap(lambda one, flag: solve(one, flag, powell))(
            jnp.concatenate(rows), jnp.concatenate(flags)
        )
        at = 0
        for key, mine in zip(keys, rows, strict=True):
            shape, begin, end = products[key].shape[:-2], at, at + len(mine)
            solved[key] = jax.tree.map(
                lambda x, shape=shape, begin=begin, end=end: x[begin:end].reshape(
                    *shape, *x.shape[1:]
                ),
                together,
            )
            at = end
    return solved
