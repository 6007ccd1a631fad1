"""Curvature pairs (s, y): how they are made and how they are damped.

A quasi-Newton factor H learns from pairs: ``s``, a change of the point, and ``y``, the change of
the gradient that went with it. After an update with (s, y) the factor maps y to s. H stays positive
definite only if ``s.y > 0``, which a neural network does not promise, so pairs are damped first:
pair in, pair out, with a guaranteed lower bound on ``s.y``. Vectors have shape [d]; nothing here
knows which side of which layer they belong to.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

UPDATED = 0
NOT_POSITIVE = 1  # s.y <= 0
TOO_SMALL = 2  # s.y <= tolerance |s|^2 |v|, or too small to be exact
NOT_FINITE = 4  # or too large to be computed with
NOT_MEASURED = 5  # no pair was offered: the layer took no part in this pass
ROUNDING = 6  # no pair was offered: the mean cotangents are nothing but rounding
RESET = 7  # the factor was lost in rounding, and starts anew (see `bfgs.update`, `lbfgs.update`)

STATUS_WORDS = {
    UPDATED: "updated",
    NOT_POSITIVE: "skipped: s.y <= 0",
    TOO_SMALL: "skipped: s.y too small for |s|",
    NOT_FINITE: "skipped: not finite",
    NOT_MEASURED: "not measured",
    ROUNDING: "skipped: only rounding",
    RESET: "reset: positive definiteness lost in rounding",
}


class Pair(NamedTuple):
    """A curvature pair.

    Attributes:
        s: change of the point, shape [d].
        y: change of the gradient, shape [d].
    """

    s: jax.Array
    y: jax.Array


def hessian_action(s: jax.Array, As: jax.Array, damping: ArrayLike) -> Pair:
    """The pair of the input side: ``s = H a``, ``y = (A + damping I) s``.

    The matrix to invert is known here, so y is exact and no difference has to be taken (the paper's
    "Hessian action", section 3).

    Args:
        s: the inverse as it stands times the mean input a, [d].
        As: the second moment A times s, [d].
        damping: lambda_A, added to the diagonal of A.

    Returns:
        The pair; ``s.y >= damping |s|^2`` because A is positive semidefinite.
    """
    return Pair(s, As + damping * s)


def damp_powell(pair: Pair, Hy: jax.Array, mu: ArrayLike) -> tuple[Pair, jax.Array]:
    """Powell's damping on the inverse: moves s towards ``Hy`` until ``s.y >= mu y.Hy``.

    ``s <- t s + (1 - t) Hy`` with ``t = (1 - mu) y.Hy / (y.Hy - s.y)``, when ``s.y <= mu y.Hy``;
    the result has ``s.y = mu y.Hy``. (Algorithm 3 of the paper, first half.)

    Where ``y.Hy`` is not above 0 (y = 0: a dead layer, or a step of length 0) there is nothing to
    damp with: the pair comes back as it is. (If s is 0 too, `pair_status` refuses it; if not, the
    second damping makes a y of s.) Where an inner product
    overflows, so that nobody knows whether to damp, s comes back as nan, and is refused too.

    Args:
        pair: s and y, [d] each.
        Hy: the inverse times y, [d].
        mu: mu_1, in (0, 1).

    Returns:
        The pair, and whether it was damped (a boolean scalar).
    """
    s, y = pair
    sy, yHy = dot(s, y), dot(y, Hy)
    gap = yHy - sy
    finite = jnp.isfinite(gap)
    damped = (sy <= mu * yHy) & (yHy > 0) & finite
    t = (1 - mu) * yHy / jnp.where(damped, gap, 1)
    s_damped = jnp.where(damped, t * s + (1 - t) * Hy, s)
    return Pair(jnp.where(finite, s_damped, jnp.nan), y), damped


def damp_second(pair: Pair, mu: ArrayLike) -> tuple[Pair, jax.Array]:
    """The second damping: moves y towards s until ``s.y >= mu |s|^2``.

    ``y <- t y + (1 - t) s`` with ``t = (1 - mu) |s|^2 / (|s|^2 - s.y)``, when ``s.y <= mu |s|^2``;
    the result has ``s.y = mu |s|^2``. (Algorithm 3 of the paper, second half.)

    For ``mu > 1`` this is no average of y and s any more: t is below 0 or above 1, without limit
    where the denominator vanishes, and the long y that comes of it ruins the factor, in float64
    too. There, and where the denominator is too small to divide by, we reach the same
    ``s.y = mu |s|^2`` by adding the missing multiple of s to y. The paper takes mu < 1 for granted
    and the authors' code divides all the same.

    Args:
        pair: s and y, [d] each.
        mu: mu_2, above 0.

    Returns:
        The pair, and whether it was damped (a boolean scalar).
    """
    s, y = pair
    sy, ss = dot(s, y), dot(s, s)
    damped = (sy <= mu * ss) & (ss > 0)
    gap = ss - sy
    divisible = (jnp.abs(gap) > jnp.sqrt(jnp.finfo(s.dtype).eps) * ss) & (jnp.asarray(mu) <= 1)
    t = (1 - mu) * ss / jnp.where(divisible, gap, 1)
    shift = mu - sy / jnp.where(ss > 0, ss, 1)
    y_damped = jnp.where(divisible, t * y + (1 - t) * s, y + shift * s)
    return Pair(s, jnp.where(damped, y_damped, y)), damped


def damp_shift(pair: Pair, mu: ArrayLike) -> Pair:
    """The Levenberg-Marquardt term: ``y <- y + mu s``, always (arXiv 2102.06737).

    After Powell's damping, ``s.y >= mu |s|^2`` for certain, whatever mu above 0.
    """
    return Pair(pair.s, pair.y + mu * pair.s)


def damp_double(
    pair: Pair, Hy: jax.Array, mu1: ArrayLike, mu2: ArrayLike
) -> tuple[Pair, jax.Array, jax.Array]:
    """Powell's damping on s, then the second damping on y (the paper's "double damping").

    Returns:
        The pair; whether Powell's damping acted; whether the second damping acted.
    """
    pair, by_powell = damp_powell(pair, Hy, mu1)
    pair, by_second = damp_second(pair, mu2)
    return pair, by_powell, by_second


def pair_status(pair: Pair, reference: jax.Array, tolerance: ArrayLike) -> jax.Array:
    """Whether a pair may enter a factor: 0 if it may, else the reason why not.

    Args:
        pair: the damped pair, [d] each.
        reference: v of the test ``s.y > tolerance |s|^2 |v|``, [d]: the mean cotangent on the
            output side, the mean input on the input side.
        tolerance: 1e-4 in the authors' code.

    Inner products near the ends of the dtype's range are inexact (addends are flushed to zero, 1 /
    s.y is), so ``s.y`` has to keep a distance of the relative precision from both: in float32 it
    must lie between 1e-31 and 4e31. Larger ones count as not finite, smaller ones as too small.

    Returns:
        int32 scalar: one of the constants of this module. The codes are those of the authors' code.
    """
    sy, ss = dot(*pair), dot(pair.s, pair.s)
    bound = tolerance * ss * jnp.sqrt(dot(reference, reference))
    numbers = jnp.finfo(sy.dtype)
    finite = (jnp.abs(sy) < numbers.max * numbers.eps) & jnp.isfinite(bound)
    reasons = [~finite, sy <= 0, (sy <= bound) | (sy < numbers.tiny / numbers.eps)]
    return jnp.select(reasons, [NOT_FINITE, NOT_POSITIVE, TOO_SMALL], UPDATED).astype(jnp.int32)


def matmul(left: jax.Array, right: jax.Array) -> jax.Array:
    """Matrix [r, d] times matrix [d, k], at the device's highest precision."""
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)


def matvec(matrix: jax.Array, vector: jax.Array) -> jax.Array:
    """Matrix [r, d] times vector [d].

    As a sum of products and not as a call of a matrix product: as fast, since memory is what it
    waits for, full precision on every device, and four times quicker to compile on a CPU.
    """
    return jnp.sum(matrix * vector[None, :], axis=-1)


def dot(left: jax.Array, right: jax.Array) -> jax.Array:
    """Inner product of two vectors [d], at the device's highest precision."""
    return jnp.dot(left, right, precision=jax.lax.Precision.HIGHEST)
