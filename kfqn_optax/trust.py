"""How long a step along a direction is: a model of the loss, and how far it is trusted.

Along a direction P the loss is taken for a parabola,

    loss(a) = loss(0) - a <G, P> + a^2 / 2 kappa <M, P>.

``<M, P>`` is the curvature that the factors promise (P is ``H M``, so it is ``<P, H^-1 P>``), and
kappa what the promise was worth in the last steps: each step is measured at its end anyway (the
probe), so the parabola through loss, slope and loss at the end tells. The step goes to the minimum
or to a share of the way, and no farther than ``a^2 <M, P> <= radius``. The radius grows and shrinks
as in any trust-region method (Nocedal and Wright, algorithm 4.1), by the ratio of actual to
predicted change, with two differences: a step after which the loss is a little higher is taken all
the same, and the radius does not stay below 2% of the loss. At the start nothing is known, and the
radius is half a percent of the loss. On few examples and a network's loss, a method that never goes
uphill gets stuck. A step after which the loss is much higher is not taken.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

FIRST_RADIUS = 0.005  # as a share of the first loss
MEMORY = 0.8  # decay of the average of log kappa
LARGEST_CHANGE = 10.0  # of kappa in one step
LONGEST = 10.0  # a at most
LARGEST_RISE = 0.1  # of the loss in a step that is taken, as a share of it
LEAST_RADIUS = 0.02  # what the radius grows back to, as a share of the loss


class Trust(NamedTuple):
    """What is remembered from step to step, all scalars.

    Attributes:
        radius: the most that ``a^2 <M, P>`` may be, in units of the loss; no bound until a loss has
            been measured (`begin`).
        kappa: curvature along the direction, as a multiple of what the factors promise.
        steps: how many steps were measured, int32.
        rejected: how many of them were not taken, int32.
        expected: the loss at the end of the last step that was measured, or at its start if it was
            not taken.
        doubt: whether that step was not taken, or began with a loss far above what the one before
            had ended with: what is known no longer holds.
    """

    radius: jax.Array
    kappa: jax.Array
    steps: jax.Array
    rejected: jax.Array
    expected: jax.Array
    doubt: jax.Array


class Proposal(NamedTuple):
    """A step that is proposed, all scalars.

    Attributes:
        length: a, the multiple of P, at least 0.
        squared: a^2 <M, P>.
    """

    length: jax.Array
    squared: jax.Array


def init(dtype: jnp.dtype) -> Trust:
    """Nothing measured yet."""
    return Trust(
        radius=jnp.asarray(_no_bound(dtype), dtype),
        kappa=jnp.ones((), dtype),
        steps=jnp.zeros((), jnp.int32),  # not the same array as the next: states are donated
        rejected=jnp.zeros((), jnp.int32),
        expected=jnp.zeros((), dtype),
        doubt=jnp.zeros((), bool),
    )


def begin(trust: Trust, loss: jax.Array) -> Trust:
    """With a radius for the first step that is measured, from the loss before it.

    A loss that is 0 or not finite tells no radius.
    """
    first = FIRST_RADIUS * jnp.abs(loss)
    told = (trust.steps == 0) & (first > 0) & jnp.isfinite(first)
    return trust._replace(radius=jnp.where(told, first, trust.radius).astype(trust.radius.dtype))


def propose(trust: Trust, slope: jax.Array, curvature: jax.Array, scale: jax.Array) -> Proposal:
    """How far to go along P.

    Args:
        trust: as the last step left it.
        slope: <G, P>, what the loss falls by per unit of a at the start.
        curvature: <M, P>, of the factors.
        scale: the learning rate, by which the step to the minimum is multiplied; 1 if it is more.

    Returns:
        The step; of length 0 where the loss does not fall along P, where a number is not finite,
        and where the step is too small to be computed with.
    """
    usable = (slope > 0) & (curvature > 0) & jnp.isfinite(slope) & jnp.isfinite(curvature)
    curvature = jnp.where(usable, curvature, 1)
    length = jnp.minimum(jnp.where(usable, slope, 0) / (trust.kappa * curvature), LONGEST)
    length = length * jnp.minimum(scale, 1)
    squared = length**2 * curvature
    within = jnp.sqrt(trust.radius / jnp.where(squared > trust.radius, squared, trust.radius))
    length = length * within
    squared = length**2 * curvature
    usable &= squared > _smallest(squared)
    return Proposal(jnp.where(usable, length, 0), jnp.where(usable, squared, 0))


def judge(
    trust: Trust, step: Proposal, slope: jax.Array, before: jax.Array, after: jax.Array
) -> tuple[jax.Array, Trust]:
    """Whether a step is taken, and what it taught.

    Args:
        trust: that the step was proposed with.
        step: the proposal.
        slope: <g, P> on the examples that the two losses are of.
        before: their loss at the parameters.
        after: their loss at the end of the step.

    Returns:
        Whether the step is taken: if the loss is finite and has not risen by more than a tenth. And
        what is remembered now. A step of length 0 changes nothing.
    """
    moved = step.length > 0
    finite = jnp.isfinite(after) & jnp.isfinite(slope)
    change, linear = after - before, -step.length * slope
    predicted = linear + trust.kappa * step.squared / 2
    rounding = 10 * jnp.finfo(before.dtype).eps * jnp.abs(before)
    accepted = finite & (change <= LARGEST_RISE * jnp.abs(before) + rounding)

    squared = jnp.where(moved, step.squared, 1)
    seen = 2 * (change - linear) / squared
    seen = jnp.clip(seen, trust.kappa / LARGEST_CHANGE, trust.kappa * LARGEST_CHANGE)
    decay = jnp.minimum(MEMORY, trust.steps / (trust.steps + 1.0)).astype(seen.dtype)
    kappa = jnp.exp(decay * jnp.log(trust.kappa) + (1 - decay) * jnp.log(seen))

    # Changes that are nothing but rounding are as predicted.
    told = (predicted < 0) & (jnp.abs(change) > rounding)
    ratio = jnp.where(told, change / jnp.where(told, predicted, -1), 1)
    radius = jnp.where(
        (ratio > 0.6) & (predicted < 0) & (step.squared > 0.8 * trust.radius),
        trust.radius * 1.5,
        trust.radius,
    )
    radius = jnp.where((ratio < 0.25) & (step.squared > 0.5 * trust.radius), radius / 1.5, radius)
    least = jnp.minimum(trust.radius * 1.5, LEAST_RADIUS * jnp.abs(before))
    radius = jnp.maximum(radius, least)
    radius = jnp.where(accepted, radius, jnp.minimum(trust.radius, step.squared) / 4)
    least = jnp.maximum(rounding, _smallest(radius))
    radius = jnp.clip(radius, least, _no_bound(radius.dtype))

    expected = jnp.where(accepted, after, before)
    risen = before - trust.expected > LARGEST_RISE * jnp.abs(trust.expected)
    risen &= trust.steps > 0
    new = Trust(
        radius=jnp.where(moved, radius, trust.radius).astype(trust.radius.dtype),
        kappa=jnp.where(moved & finite, kappa, trust.kappa).astype(trust.kappa.dtype),
        steps=trust.steps + moved,
        rejected=trust.rejected + (moved & ~accepted),
        expected=jnp.where(moved, expected, trust.expected).astype(trust.expected.dtype),
        doubt=jnp.where(moved, ~accepted | risen, trust.doubt),
    )
    return accepted & moved, new


def _smallest(number: jax.Array) -> float:
    """The size above which numbers of this dtype can be divided by without loss."""
    return float(jnp.finfo(number.dtype).tiny / jnp.finfo(number.dtype).eps)


def _no_bound(dtype: Any) -> float:
    """A radius that bounds nothing, and still can be multiplied by a number of usual size."""
    return float(jnp.finfo(dtype).max * jnp.finfo(dtype).eps)
