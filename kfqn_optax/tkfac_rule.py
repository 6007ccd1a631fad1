"""Trace-restricted K-FAC: a Kronecker approximation of the Fisher matrix with the same trace.

K-FAC takes the mean of a product for the product of means. Here a layer's block ``F = E[a a^T (x)
g g^T]`` is approximated by ``delta Phi (x) Psi``, where Phi and Psi have trace 1 and

    delta = E[|a|^2 |g|^2]     Phi = E[|g|^2 a a^T] / delta     Psi = E[|a|^2 g g^T] / delta

so that ``trace(F) = delta`` and each factor is F's own partial trace (arXiv 2011.10741). What is
averaged from step to step are the numerators, ``delta Phi`` and ``delta Psi``, so this stays true
of the running averages; delta is the trace of either.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from kfqn_optax.layers import Layer
from kfqn_optax.moments import Damped, Moments
from kfqn_optax.natural import Rule, ScaleByKFACState, Settings, natural_gradient
from kfqn_optax.optimizer import whole
from kfqn_optax.options import Number, ScalarOrSchedule
from kfqn_optax.statistics import LayerStatistics


class ScaleByTKFACState(ScaleByKFACState):
    """State of `scale_by_tkfac`; its moments are the numerators ``delta Phi`` and ``delta Psi``."""

    __slots__ = ()


def _asked(paths: Sequence[str]) -> dict[str, Any]:
    return {"moments": [], "joint_moments": paths}


def _moments(measured: LayerStatistics) -> Moments:
    joint = measured.joint_moments
    return Moments(joint and joint.input, joint and joint.output, measured.rows)


RULE = Rule("TKFAC", ScaleByTKFACState, _asked, _moments, lookups=False)


def damped(Phi: jax.Array, Psi: jax.Array, root: jax.Array) -> Damped:
    """What is inverted, so that the product of the inverses is TKFAC's direction.

    ``(1/delta) (Psi + e I)^-1 G (Phi + e I)^-1`` with ``e = sqrt(lambda / delta)`` is the product
    of the inverses of ``sqrt(delta) Phi + sqrt(lambda) I`` and the same of Psi.

    Args:
        Phi: ``delta Phi``, [d_in, d_in].
        Psi: ``delta Psi``, [d_out, d_out].
        root: sqrt(lambda).
    """
    delta = jnp.trace(Phi)
    scale = jnp.where(delta > 0, jax.lax.rsqrt(jnp.where(delta > 0, delta, 1)), 0)
    return Damped(scale * Phi, root, scale * Psi, root)


def scale_by_tkfac(
    learning_rate: ScalarOrSchedule,
    damping: ScalarOrSchedule = 3.0,
    *,
    factor_decay: Number = 0.9,
    inverse_every: Number = 20,
    norm_constraint: Number | None = None,
    max_factor_dim: Number | None = None,
    layers: Iterable[Layer] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Preconditions the updates of layers by their two trace-restricted factors.

    As `scale_by_kfac`, with the direction ``(1/delta) (Phi + e I)^-1 M (Psi + e I)^-1``, ``e =
    sqrt(lambda / delta)``. The expectations are means over examples and sums over positions, so
    they are those of a Fisher matrix without products of different positions. Embeddings are
    refused. Defaults are those of `scale_by_kfac`, not the paper's, which we do not know.

    Args:
        learning_rate: of the step; only ``norm_constraint`` reads it. A number or a schedule.
        damping: lambda; a number above 0, or a schedule.
        factor_decay: decay of the running averages of the numerators, in [0, 1).
        inverse_every: how often inverses are made, see `scale_by_kfac`.
        norm_constraint: see `scale_by_kbfgs`.
        max_factor_dim: layers with a longer side (None: 8192) are refused.
        layers: which layers, from `find_layers`; by default every ``kernel`` with two axes.

    Returns:
        The transformation, to be used like `scale_by_kfac`.

    References:
        Gao, Liu, Huang, Wang, Wang, Xu, Yu, `A Trace-restricted Kronecker-Factored Approximation to
        Natural Gradient <https://arxiv.org/abs/2011.10741>`_, AAAI 2021.
    """
    settings = Settings(
        learning_rate, damping, factor_decay, inverse_every, norm_constraint, max_factor_dim
    )
    return natural_gradient(RULE, settings, damped, layers)


def tkfac(
    learning_rate: ScalarOrSchedule,
    damping: ScalarOrSchedule = 3.0,
    *,
    momentum: Number = 0.9,
    weight_decay: Number = 0.0,
    factor_decay: Number = 0.9,
    inverse_every: Number = 20,
    norm_constraint: Number | None = None,
    max_factor_dim: Number | None = None,
    layers: Iterable[Layer] | None = None,
    fallback: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Trace-restricted K-FAC, built as `kfac` is, with `scale_by_tkfac` in the middle.

    Momentum is taken before the factors, as in `kbfgs`; the paper takes it after them.

    Args:
        learning_rate: alpha; a number at least 0, or a schedule.
        damping: lambda; a number above 0, or a schedule.
        momentum: decay of M, in [0, 1).
        weight_decay: tau, at least 0; ``tau`` times kernel and bias enters the gradient.
        factor_decay: decay of the running averages of the numerators, in [0, 1).
        inverse_every: how often inverses are made, see `scale_by_kfac`.
        norm_constraint: as in `kbfgs`.
        max_factor_dim: layers with a longer side (None: 8192) are refused.
        layers: which layers, from `find_layers`; by default every ``kernel`` with two axes.
        fallback: what updates all other parameters; ``optax.adam(learning_rate)`` by default.

    Returns:
        A transformation to be used like `kfac`.

    References:
        Gao, Liu, Huang, Wang, Wang, Xu, Yu, `A Trace-restricted Kronecker-Factored Approximation to
        Natural Gradient <https://arxiv.org/abs/2011.10741>`_, AAAI 2021.
    """
    scale = scale_by_tkfac(
        learning_rate,
        damping,
        factor_decay=factor_decay,
        inverse_every=inverse_every,
        norm_constraint=norm_constraint,
        max_factor_dim=max_factor_dim,
        layers=layers,
    )
    return whole(scale, learning_rate, momentum, weight_decay, layers, fallback)
