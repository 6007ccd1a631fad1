"""Factors as a multiple of the identity and a few rows: ``c I + W^T C W``.

A factor of m pairs (`generations`) is such a matrix of 2m rows: with S and Y for the pairs as rows,
and D and R as in `lbfgs`,

    W = [S; Y],    C = [[R^-T (D + c Y Y^T) R^-1, -c R^-T], [-c R^-1, 0]]

(Byrd, Nocedal and Schnabel 1994, theorem 2.2). Multiplied out like this, a product with a large
matrix M from both sides reads M twice and writes once. The two squares of `lbfgs.apply` go over it
eight times, and keep more digits along directions in which H is small: here the relative error
there is that of the dtype times the largest eigenvalue over the one in question. That is little
where every pair was damped against the factor it went into, as in `generations`; a limited memory
whose oldest pairs were dropped has no such bound, and stays with the squares.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kfqn_optax.lbfgs import Memory
from kfqn_optax.pairs import matmul


class LowRank(NamedTuple):
    """``scale I + rows^T core rows``, [d, d].

    Attributes:
        scale: c, [].
        rows: W, [k, d].
        core: C, symmetric, [k, k].
    """

    scale: jax.Array
    rows: jax.Array
    core: jax.Array


def of(H: Memory) -> LowRank:
    """A factor of pairs, with k twice their number."""
    c = jnp.ones((), H.s.dtype) if H.scale is None else H.scale
    middle = jnp.diag(H.sy) + c * matmul(H.y, H.y.T)
    first = matmul(matmul(H.R_inverse.T, middle), H.R_inverse)
    side = -c * H.R_inverse
    core = jnp.block([[first, side.T], [side, jnp.zeros_like(side)]])
    return LowRank(c, jnp.concatenate([H.s, H.y]), core)


def apply_to_rows(H: LowRank, vectors: jax.Array) -> jax.Array:
    """H times the rows of ``vectors``, [k, d] -> [k, d]."""
    return H.scale * vectors + matmul(matmul(vectors, H.rows.T), matmul(H.core, H.rows))


def both_sides(H_a: LowRank, parts: Sequence[jax.Array], H_g: LowRank) -> list[jax.Array]:
    """``H_a M H_g``, of an M that lies in parts.

    With ``T = W_a M`` and ``U = M W_g^T``, small, this is

        c_a c_g M + W_a^T C_a (c_g T + T W_g^T C_g W_g) + c_a U C_g W_g.

    Args:
        H_a: on [d_in].
        parts: matrices that make up M one below the other, [rows of the part, d_out].
        H_g: on [d_out].

    Returns:
        The parts of the product, in the same shapes.
    """
    after = matmul(H_g.core, H_g.rows)
    ends = np.cumsum([len(part) for part in parts])
    W = jnp.split(H_a.rows, ends[:-1], axis=1)
    T = functools.reduce(jnp.add, map(matmul, W, parts))
    T = H_g.scale * T + matmul(matmul(T, H_g.rows.T), after)
    right = jnp.concatenate([matmul(H_a.core, T), after])
    return [
        H_a.scale * H_g.scale * part
        + matmul(jnp.concatenate([W_i.T, H_a.scale * matmul(part, H_g.rows.T)], axis=1), right)
        for W_i, part in zip(W, parts, strict=True)
    ]
