"""A factor that knows the largest curvature only: a Nyström approximation, inverted.

The second moment A of a layer's inputs has a few large eigenvalues and many small ones. From k rows
Omega, which span about the space of the largest, A is taken for

    A ~ Z^T B^-1 Z + tail I,    Z = Omega A,    B = Omega A Omega^T,

with the mean of what that leaves out, ``tail``, in all directions. By Woodbury's identity its
damped inverse is, with ``delta = damping + tail``,

    H = (I - Q^T Q) / delta,    Q = L^-1 Z,    L L^T = delta B + Z Z^T.

Only Q is kept, [k, d], and it is the next step's Omega: that is subspace iteration, which follows
the largest eigenvalues as A changes. Elimination goes from the first row to the last, so the first
rows come to be the first eigenvectors, and the last make room for sketches of the batch in each
step. Rows of Q are shorter than 1 by what delta is beside their eigenvalue; a row that is lost in
rounding is 0. Rows near 0 are made up with random signs: so directions get in that A has not shown
before. Nothing asks Omega to be orthogonal.

The approximation is Nyström's (Frangella, Tropp, Udell, `Randomized Nyström Preconditioning
<https://arxiv.org/abs/2110.02820>`_, 2023); its use for a factor, kept from step to step, is ours.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kfqn_optax.low_rank import LowRank
from kfqn_optax.pairs import matmul

ROUNDING = 500  # of a pivot that would be 1, in units of the relative precision


class Nystrom(NamedTuple):
    """The inverse ``scale (I - rows^T rows)``, [d, d]; all singular values of Q are below 1.

    Attributes:
        rows: Q, [k, d].
        scale: 1 / delta, [].
        tail: mean eigenvalue of A in the directions left out, [].
    """

    rows: jax.Array
    scale: jax.Array
    tail: jax.Array


class Offer(NamedTuple):
    """What is to be factorized, and what with the result becomes the factor.

    A and its damping are divided by the largest entry of A, so that no square overflows.

    Attributes:
        grams: ``delta B + Z Z^T`` and ``Omega Omega^T``, each between rows scaled so that its
            diagonal is 1, [2, k, k].
        rows: Z between the scales of the first, [k, d].
        known: B between those of the second, [k, k].
        delta: damping and tail, [].
        trace: of A, [].
        unit: the largest entry, [].
    """

    grams: jax.Array
    rows: jax.Array
    known: jax.Array
    delta: jax.Array
    trace: jax.Array
    unit: jax.Array


def init(d: int, rank: int, dtype: jnp.dtype) -> Nystrom:
    """The identity on [d]; room for min(rank, d) directions."""
    rows = jnp.zeros((min(rank, d), d), dtype)
    return Nystrom(rows, jnp.ones((), dtype), jnp.zeros((), dtype))


def as_low_rank(H: Nystrom) -> LowRank:
    """The same as ``c I + W^T C W``."""
    return LowRank(H.scale, H.rows, -H.scale * jnp.eye(len(H.rows), dtype=H.rows.dtype))


def offer(
    H: Nystrom, A: jax.Array, sketches: jax.Array, damping: jax.Array, first: jax.Array | bool
) -> Offer:
    """The products with A that the next factor is made of. Costs 2 k d (d + 2 k) FLOPs.

    Args:
        H: the factor, on [d].
        A: the second moment, [d, d], symmetric positive semidefinite.
        sketches: of the batch, [q, d]; they take the place of the last q rows, of half at most.
        damping: lambda_A, above 0.
        first: whether H knows nothing yet.
    """
    k, d = H.rows.shape
    q = min(len(sketches), k // 2) if k < d else 0
    rows = H.rows[: k - q]
    # 1 for a row that is lost, 0.004 for one whose eigenvalue is delta: that one keeps its place.
    missing = jnp.maximum(1 - jnp.sum(rows * rows, axis=1, keepdims=True), 0) ** 8
    rows = rows + missing * _signs(rows.shape, rows.dtype) / np.sqrt(d)
    Omega = jnp.concatenate([rows, _unit(sketches[:q])])
    diagonal = jnp.diagonal(A)
    unit = jnp.where(jnp.max(diagonal) > 0, jnp.max(diagonal), 1)
    trace = jnp.sum(diagonal / unit)
    delta = damping / unit + jnp.where(first, trace / d * (1 - k / d), H.tail / unit)
    Z = matmul(Omega, A / unit)
    B = matmul(Z, Omega.T)
    gram, by = _to_unit_diagonal(delta * (B + B.T) / 2 + matmul(Z, Z.T))
    overlap, by_length = _to_unit_diagonal(matmul(Omega, Omega.T))
    return Offer(
        grams=jnp.stack([gram, overlap]),
        rows=by[:, None] * Z,
        known=by_length[:, None] * B * by_length[None, :],
        delta=delta,
        trace=trace,
        unit=unit,
    )


def take(H: Nystrom, offer: Offer, roots: jax.Array) -> tuple[Nystrom, jax.Array]:
    """The factor that was offered, and whether it is finite; if not, H as it was.

    Args:
        H: the factor before.
        offer: from `offer`.
        roots: from `inverse_roots`, [2, k, k].
    """
    k, d = H.rows.shape
    rows, scale = matmul(roots[0], offer.rows), 1 / (offer.delta * offer.unit)
    held = jnp.sum(matmul(roots[1], offer.known) * roots[1])
    tail = jnp.maximum(offer.trace - held, 0) / max(d - k, 1) * offer.unit
    usable = jnp.isfinite(jnp.sum(rows) + scale + tail) & (scale > 0)
    new = Nystrom(rows, scale, tail)
    return jax.tree.map(
        lambda x, held: jnp.where(usable, x.astype(held.dtype), held), new, H
    ), usable


def inverse_roots(grams: Mapping[Any, jax.Array]) -> dict[Any, jax.Array]:
    """``L^-1`` of each ``L L^T``, by elimination, all at once; by key.

    Where a pivot is no more than what rounding leaves of 1, its row depends on those before it; it
    is left out, and has a row of zeros.

    Args:
        grams: positive semidefinite with a diagonal of 1 or 0, [..., k, k]; k may differ.

    Returns:
        Lower triangles in the same shapes.
    """
    k = max(gram.shape[-1] for gram in grams.values())

    def padded(gram: jax.Array) -> jax.Array:
        more = k - gram.shape[-1]
        return jnp.pad(gram.reshape(-1, *gram.shape[-2:]), ((0, 0), (0, more), (0, more)))

    rows = {key: padded(gram) for key, gram in grams.items()}
    G = jnp.concatenate(list(rows.values()))
    least = ROUNDING * float(jnp.finfo(G.dtype).eps)

    def eliminate(j: jax.Array, both: jax.Array) -> jax.Array:
        row = jax.lax.dynamic_index_in_dim(both, j, axis=1)
        pivot = jax.lax.dynamic_index_in_dim(row, j, axis=2)
        row = jnp.where(pivot > least, row * jax.lax.rsqrt(jnp.where(pivot > 0, pivot, 1)), 0)
        of_row = jnp.arange(k)[None, :, None]
        below = jnp.where(of_row > j, jnp.swapaxes(row[:, :, :k], 1, 2), 0)
        here = of_row == j
        return jnp.where(here, row, both - below * row)

    both = jnp.concatenate([G, jnp.tile(jnp.eye(k, dtype=G.dtype), (len(G), 1, 1))], axis=2)
    both = jax.lax.fori_loop(0, k, eliminate, both)
    roots, at = {}, 0
    for key, gram in grams.items():
        own, end = gram.shape[-1], at + len(rows[key])
        roots[key] = both[at:end, :own, k : k + own].reshape(gram.shape)
        at = end
    return roots


def _signs(shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Signs without order, the same always."""
    i, j = (jax.lax.broadcasted_iota(jnp.uint32, shape, axis) for axis in (0, 1))
    bits = (i * np.uint32(shape[1]) + j + np.uint32(1)) * np.uint32(2654435761)
    bits = (bits ^ (bits >> 15)) * np.uint32(2246822519)
    bits = (bits ^ (bits >> 13)) * np.uint32(3266489917)
    return jnp.where(bits >> 31 == 1, 1, -1).astype(dtype)


def _unit(rows: jax.Array) -> jax.Array:
    """Rows divided by their largest entries; rows of zeros, or not finite, as zeros."""
    largest = jnp.max(jnp.abs(rows), axis=1, keepdims=True)
    usable = (largest > 0) & jnp.isfinite(largest)
    return jnp.where(usable, rows / jnp.where(usable, largest, 1), 0)


def _to_unit_diagonal(gram: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A matrix of inner products between rows scaled to length 1, and the scales; 0 for no row."""
    squares = jnp.diagonal(gram)
    by = jnp.where(squares > 0, jax.lax.rsqrt(jnp.where(squares > 0, squares, 1)), 0)
    return by[:, None] * gram * by[None, :], by
