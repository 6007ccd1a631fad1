"""K-FAC: the natural gradient in Kronecker factors, as the authors of K-BFGS compare with it.

A layer's block of the Fisher matrix is taken as ``A (x) G``: A the second moment of its inputs, G
that of the gradients of an example's loss at its outputs, where the targets are drawn from the
model's own output distribution (`sampling`). Both are running averages, and both are inverted.
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

SPLITS = ("sqrt", "trace")


def _asked(paths: Sequence[str]) -> dict[str, Any]:
    return {"moments": paths, "output_moments": paths}


def _moments(measured: LayerStatistics) -> Moments:
    return Moments(measured.input_moment, measured.output_moment, measured.rows)


RULE = Rule("K-FAC", ScaleByKFACState, _asked, _moments, lookups=True)


def damped(A: jax.Array, G: jax.Array, root: jax.Array, split: str) -> Damped:
    """A and G with their dampings, whose product is lambda.

    Args:
        A: [d_in, d_in], or its diagonal, [d_in].
        G: [d_out, d_out].
        root: sqrt(lambda).
        split: ``"sqrt"`` or ``"trace"``, see `scale_by_kfac`.
    """
    if split == "sqrt":
        return Damped(A, root, G, root)
    of_input = jnp.mean(A if A.ndim == 1 else jnp.diag(A))
    of_output = jnp.mean(jnp.diag(G))
    usable = (of_input > 0) & (of_output > 0)
    pi = jnp.sqrt(jnp.where(usable, of_input, 1) / jnp.where(usable, of_output, 1))
    return Damped(A, pi * root, G, root / pi)


def scale_by_kfac(
    learning_rate: ScalarOrSchedule,
    damping: ScalarOrSchedule = 3.0,
    *,
    factor_decay: Number = 0.9,
    inverse_every: Number = 20,
    split: str = "sqrt",
    norm_constraint: Number | None = None,
    max_factor_dim: Number | None = None,
    layers: Iterable[Layer] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Preconditions the updates of layers by their two K-FAC factors.

    The updates that come in are M, those that leave are ``(A + lambda_A I)^-1 M (G + lambda_G
    I)^-1``, to be scaled by minus the learning rate; the batch of the step is in A and G already.
    Other parameters pass unchanged. Layers are those of `Layer`, as for `scale_by_kbfgs`: A is a
    mean over examples and a sum over positions, G a mean over both.

    ``update(updates, state, params, *, curvature_fn, **extra_args)`` measures once, at ``params``.
    The loss that ``curvature_fn`` is made of must draw its targets from the model's own output
    distribution; with the targets of the data G is that of the "empirical Fisher", another method.
    With ``curvature_fn=None`` A and G stay as they are in this step. So does all that is kept of
    the layers while a schedule's damping is not a number above 0. A ``curvature_fn`` of the user's
    own must take the keyword arguments of `curvature_fn`'s.

    Args:
        learning_rate: of the step; only ``norm_constraint`` reads it. A number or a schedule.
        damping: lambda; a number above 0, or a schedule.
        factor_decay: decay of the running averages A and G, in [0, 1).
        inverse_every: inverses are made in steps 0 to ``inverse_every`` and then in every
            ``inverse_every``-th; a whole number of at least 1.
        split: of lambda between the sides: ``"sqrt"``, sqrt(lambda) each, as in the code of the
            authors of K-BFGS; ``"trace"``, ``lambda_A = pi sqrt(lambda)`` and ``lambda_G =
            sqrt(lambda) / pi``, pi^2 the ratio of the mean eigenvalues of A and G (section 6.3 of
            the paper below).
        norm_constraint: the most that the squared length of the step in the metric of the factors
            may be, above 0; None for no limit. See `scale_by_kbfgs`.
        max_factor_dim: layers with a longer side (None: 8192) are refused.
        layers: which layers, from `find_layers`; by default every ``kernel`` with two axes.

    Returns:
        The transformation, with errors as for `scale_by_kbfgs`.

    References:
        Martens, Grosse, `Optimizing Neural Networks with Kronecker-factored Approximate Curvature
        <https://arxiv.org/abs/1503.05671>`_, 2015; for convolutions Grosse, Martens
        (`arXiv:1602.01407 <https://arxiv.org/abs/1602.01407>`_). Settings and schedule of inverses
        are those of the code of arXiv 2006.08877.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}.")
    settings = Settings(
        learning_rate, damping, factor_decay, inverse_every, norm_constraint, max_factor_dim
    )
    return natural_gradient(RULE, settings, lambda A, G, root: damped(A, G, root, split), layers)


def kfac(
    learning_rate: ScalarOrSchedule,
    damping: ScalarOrSchedule = 3.0,
    *,
    momentum: Number = 0.9,
    weight_decay: Number = 0.0,
    factor_decay: Number = 0.9,
    inverse_every: Number = 20,
    split: str = "sqrt",
    norm_constraint: Number | None = None,
    max_factor_dim: Number | None = None,
    layers: Iterable[Layer] | None = None,
    fallback: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """K-FAC, built as `kbfgs` is: weight decay, momentum, `scale_by_kfac`, learning rate; fallback.

    Args:
        learning_rate: alpha; a number at least 0, or a schedule.
        damping: lambda; a number above 0, or a schedule. The authors of K-BFGS use 3 with learning
            rate 1 on the MNIST autoencoder.
        momentum: decay of M, in [0, 1): ``M <- momentum M + (1 - momentum) G``.
        weight_decay: tau, at least 0; ``tau`` times kernel and bias enters the gradient.
        factor_decay: decay of the running second moments, in [0, 1).
        inverse_every: how often inverses are made, see `scale_by_kfac`.
        split: of lambda between the sides, ``"sqrt"`` or ``"trace"``; see `scale_by_kfac`.
        norm_constraint: as in `kbfgs`.
        max_factor_dim: layers with a longer side (None: 8192) are refused.
        layers: which layers, from `find_layers`; by default every ``kernel`` with two axes.
        fallback: what updates all other parameters; ``optax.adam(learning_rate)`` by default.

    Returns:
        A transformation to be used like `kbfgs`, with a ``curvature_fn`` of a loss that draws its
        targets; `warm_start` takes such a loss too.

    Examples:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, optax, kfqn_optax as kfqn
        >>> model = nn.Dense(1)
        >>> x = jnp.arange(12.0).reshape(6, 2) / 12
        >>> def loss_fn(params, x, y):
        ...     return 0.5 * jnp.mean((model.apply(params, x) - y) ** 2)
        >>> def sampled_loss_fn(params, x, key):
        ...     outputs = model.apply(params, x)
        ...     return 0.5 * jnp.mean((outputs - kfqn.sample_normal(key, outputs)) ** 2)
        >>> y = x.sum(axis=1, keepdims=True)
        >>> params = model.init(jax.random.key(0), x)
        >>> tx = kfqn.kfac(learning_rate=0.3, damping=0.01)
        >>> state = tx.init(params)
        >>> @jax.jit
        ... def step(params, state, key):
        ...     grads = jax.grad(loss_fn)(params, x, y)
        ...     updates, state = tx.update(
        ...         grads, state, params,
        ...         curvature_fn=kfqn.curvature_fn(sampled_loss_fn, params, x, key))
        ...     return optax.apply_updates(params, updates), state
        >>> before = loss_fn(params, x, y)
        >>> for key in jax.random.split(jax.random.key(1), 30):
        ...     params, state = step(params, state, key)
        >>> bool(loss_fn(params, x, y) < before / 10)
        True

    References:
        Martens, Grosse, `Optimizing Neural Networks with Kronecker-factored Approximate Curvature
        <https://arxiv.org/abs/1503.05671>`_, 2015.
    """
    scale = scale_by_kfac(
        learning_rate,
        damping,
        factor_decay=factor_decay,
        inverse_every=inverse_every,
        split=split,
        norm_constraint=norm_constraint,
        max_factor_dim=max_factor_dim,
        layers=layers,
    )
    return whole(scale, learning_rate, momentum, weight_decay, layers, fallback)
