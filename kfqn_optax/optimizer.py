"""Whole optimizers: weight decay and momentum before the factors, a fallback beside."""

from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from kfqn_optax import checks
from kfqn_optax import layers as layers_lib
from kfqn_optax.layers import Layer, named_leaves
from kfqn_optax.methods import scale_by_kbfgs, scale_by_kbfgs_l, scale_by_kfqn
from kfqn_optax.options import Number, ScalarOrSchedule, check, check_decay
from kfqn_optax.statistics import running_average
from kfqn_optax.transform import layers_present

KBFGS, FALLBACK = "kbfgs", "fallback"


class MomentumState(NamedTuple):
    """State of the momentum in `kbfgs`, `kbfgs_l` and `kfqn`.

    Attributes:
        momentum: M, running average of the gradient, like the parameters, in the factors' dtype.
    """

    momentum: Any


def kbfgs(
    learning_rate: ScalarOrSchedule,
    damping: ScalarOrSchedule = 0.3,
    *,
    momentum: Number = 0.9,
    weight_decay: Number = 0.0,
    factor_decay: Number = 0.9,
    pair_decay: Number = 0.9,
    powell: Number = 0.2,
    curvature_tolerance: Number = 1e-4,
    norm_constraint: Number | None = None,
    update_every: Number = 1,
    max_factor_dim: Number | None = None,
    layers: Iterable[Layer] | None = None,
    fallback: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """K-BFGS, the Kronecker-factored quasi-Newton method of Goldfarb, Ren and Bahamou (2020).

    Weight decay is added to the gradient, then momentum ``M <- momentum M + (1 - momentum) G`` is
    taken (not bias-corrected), then `scale_by_kbfgs`, then the learning rate. Every parameter that
    is in no layer goes to ``fallback``, with a state of its own and without the
    weight decay and momentum given here. ``summary(opt_state, params)`` prints which goes where.

    Args:
        learning_rate: alpha; a number at least 0, or a schedule.
        damping: lambda; a number above 0, or a schedule. 0.3 is what the authors use with learning
            rate 0.3 on autoencoders; smaller is faster until it diverges.
        momentum: decay of M, in [0, 1).
        weight_decay: tau, at least 0; ``tau`` times kernel and bias enters the gradient.
        factor_decay: decay of the running second moment of layer inputs, in [0, 1).
        pair_decay: decay of the running averages of s and y, in [0, 1).
        powell: mu_1 of Powell's damping, in (0, 1).
        curvature_tolerance: a pair is refused unless ``s.y > tolerance |s|^2 |v|``; at least 0.
        norm_constraint: the most that the squared length of the step in the metric of the factors
            may be, above 0, in units of the loss (see `scale_by_kbfgs`). None, the default, is
            K-BFGS as published.
        update_every: k; curvature is measured, and the factors change, in every k-th step only,
            beginning with the first; a whole number of at least 1 (see `scale_by_kbfgs`).
        max_factor_dim: a side of a layer longer than this (None: 8192) keeps 100 pairs instead of
            a matrix.
        layers: which layers, from `find_layers`. By default every ``kernel`` with two axes in the
            parameters is a dense layer; a kernel with more axes is then an error.
        fallback: what updates all other parameters; ``optax.adam(learning_rate)`` by default.

    Returns:
        A transformation whose ``update`` needs ``params`` and the extra argument ``curvature_fn``:

            tx.update(grads, state, params, curvature_fn=kfqn.curvature_fn(loss_fn, params, batch))

        See `scale_by_kbfgs` for ``curvature_fn=None`` and for errors.

    Raises:
        TypeError, ValueError: for an argument that is not a number or out of range, by name.

    Examples:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, optax, kfqn_optax as kfqn
        >>> model = nn.Dense(1)
        >>> x = jnp.arange(12.0).reshape(6, 2) / 12
        >>> def loss_fn(params, x):
        ...     return jnp.mean((model.apply(params, x) - x.sum(axis=1, keepdims=True)) ** 2)
        >>> params = model.init(jax.random.key(0), x)
        >>> tx = kfqn.kbfgs(learning_rate=0.3)
        >>> state = tx.init(params)
        >>> @jax.jit
        ... def step(params, state):
        ...     grads = jax.grad(loss_fn)(params, x)
        ...     updates, state = tx.update(
        ...         grads, state, params, curvature_fn=kfqn.curvature_fn(loss_fn, params, x))
        ...     return optax.apply_updates(params, updates), state
        >>> before = loss_fn(params, x)
        >>> for _ in range(30):
        ...     params, state = step(params, state)
        >>> bool(loss_fn(params, x) < before / 10)
        True

    References:
        Goldfarb, Ren, Bahamou, `Practical Quasi-Newton Methods for Training Deep Neural Networks
        <https://arxiv.org/abs/2006.08877>`_, NeurIPS 2020.
    """
    scale = scale_by_kbfgs(
        learning_rate,
        damping,
        factor_decay=factor_decay,
        pair_decay=pair_decay,
        powell=powell,
        curvature_tolerance=curvature_tolerance,
        norm_constraint=norm_constraint,
        update_every=update_every,
        max_factor_dim=max_factor_dim,
        layers=layers,
    )
    return whole(scale, learning_rate, momentum, weight_decay, layers, fallback)


def kbfgs_l(
    learning_rate: ScalarOrSchedule,
    damping: ScalarOrSchedule = 0.3,
    *,
    memory_size: Number = 100,
    momentum: Number = 0.9,
    weight_decay: Number = 0.0,
    factor_decay: Number = 0.9,
    pair_decay: Number = 0.9,
    powell: Number = 0.2,
    curvature_tolerance: Number = 1e-4,
    norm_constraint: Number | None = None,
    update_every: Number = 1,
    max_factor_dim: Number | None = None,
    layers: Iterable[Layer] | None = None,
    fallback: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """K-BFGS(L): `kbfgs` with limited memory on the output side (`scale_by_kbfgs_l`).

    Args:
        learning_rate: alpha; a number at least 0, or a schedule.
        damping: lambda; a number above 0, or a schedule.
        memory_size: p, pairs kept by each output factor, a whole number of at least 1. It decides
            the shapes of the state: with ``optax.inject_hyperparams`` and a jitted ``init``, name
            it in ``static_args``.
        momentum: decay of M, in [0, 1).
        weight_decay: tau, at least 0; ``tau`` times kernel and bias enters the gradient.
        factor_decay: decay of the running second moment of layer inputs, in [0, 1).
        pair_decay: decay of the running averages of s and y, in [0, 1).
        powell: mu_1 of Powell's damping, in (0, 1).
        curvature_tolerance: a pair is stored if ``s.y > tolerance |s|^2 |v|``; at least 0.
        norm_constraint: as in `kbfgs`.
        update_every: as in `kbfgs`.
        max_factor_dim: an input side longer than this (None: 8192) keeps 100 pairs too.
        layers: which layers, from `find_layers`; by default every ``kernel`` with two axes.
        fallback: what updates all other parameters; ``optax.adam(learning_rate)`` by default.

    Returns:
        A transformation to be used like `kbfgs`, with the same errors.

    References:
        Goldfarb, Ren, Bahamou, `Practical Quasi-Newton Methods for Training Deep Neural Networks
        <https://arxiv.org/abs/2006.08877>`_, NeurIPS 2020.
    """
    scale = scale_by_kbfgs_l(
        learning_rate,
        damping,
        memory_size=memory_size,
        factor_decay=factor_decay,
        pair_decay=pair_decay,
        powell=powell,
        curvature_tolerance=curvature_tolerance,
        norm_constraint=norm_constraint,
        update_every=update_every,
        max_factor_dim=max_factor_dim,
        layers=layers,
    )
    return whole(scale, learning_rate, momentum, weight_decay, layers, fallback)


def kfqn(
    learning_rate: ScalarOrSchedule,
    damping: ScalarOrSchedule = 0.3,
    *,
    split: str = "sqrt_t",
    momentum: Number = 0.9,
    weight_decay: Number = 0.0,
    pair_decay: Number = 0.9,
    powell: Number = 0.2,
    norm_constraint: Number | None = None,
    update_every: Number = 1,
    input_memory: Number | None = None,
    output_memory: Number | None = None,
    max_factor_dim: Number | None = None,
    layers: Iterable[Layer] | None = None,
    fallback: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """KF-QN, the successor of K-BFGS made for convolutions (`scale_by_kfqn`).

    Args:
        learning_rate: alpha; a number at least 0, or a schedule.
        damping: lambda; a number above 0, or a schedule.
        split: of lambda between the sides, by the number T of positions an example has:
            ``"sqrt_t"``, sqrt(lambda T) and sqrt(lambda / T); ``"sqrt"``, sqrt(lambda) each.
        momentum: decay of M, in [0, 1).
        weight_decay: tau, at least 0; ``tau`` times kernel and bias enters the gradient.
        pair_decay: decay of the running averages of s and y, in [0, 1).
        powell: mu_1 of Powell's damping, in (0, 1).
        norm_constraint: as in `kbfgs`.
        update_every: as in `kbfgs`.
        input_memory: pairs kept for a limited-memory input factor; None for a dense one.
        output_memory: the same for the output factor.
        max_factor_dim: a dense side longer than this (None: 8192) keeps 100 pairs instead.
        layers: which layers, from `find_layers`; by default every ``kernel`` with two axes.
        fallback: what updates all other parameters; ``optax.adam(learning_rate)`` by default.

    Returns:
        A transformation to be used like `kbfgs`, with the same errors.

    References:
        Ren, Bahamou, Goldfarb, `Kronecker-factored Quasi-Newton Methods for Deep Learning
        <https://arxiv.org/abs/2102.06737>`_, 2021.
    """
    scale = scale_by_kfqn(
        learning_rate,
        damping,
        split=split,
        pair_decay=pair_decay,
        powell=powell,
        norm_constraint=norm_constraint,
        update_every=update_every,
        input_memory=input_memory,
        output_memory=output_memory,
        max_factor_dim=max_factor_dim,
        layers=layers,
    )
    return whole(scale, learning_rate, momentum, weight_decay, layers, fallback)


def whole(
    scale: optax.GradientTransformation,
    learning_rate: ScalarOrSchedule,
    momentum: Number | None,
    weight_decay: Number,
    layers: Iterable[Layer] | None,
    fallback: optax.GradientTransformation | None,
) -> optax.GradientTransformationExtraArgs:
    """Weight decay, momentum, ``scale`` and the learning rate for the layers; a fallback beside.

    Without a momentum (None) ``scale`` is given the gradient.
    """
    if momentum is not None:
        check_decay("momentum", momentum)
    check("weight_decay", weight_decay, lambda v: v >= 0, "at least 0")
    given = layers_lib.as_layers(layers)
    no_decay = isinstance(weight_decay, (int, float)) and weight_decay == 0
    chosen = optax.chain(
        optax.identity() if no_decay else optax.add_decayed_weights(cast(Any, weight_decay)),
        optax.identity() if momentum is None else _momentum(momentum),
        scale,
        optax.scale_by_learning_rate(cast(Any, learning_rate)),
    )
    others = optax.adam(cast(Any, learning_rate)) if fallback is None else fallback

    def labels(tree: Any) -> Any:
        leaves = named_leaves(tree)
        checks.check_real(leaves)
        mine = {p for layer in layers_present(given, leaves) for p in layer.parameter_paths}
        return jax.tree_util.tree_map_with_path(
            lambda path, _: KBFGS if layers_lib.path_name(path) in mine else FALLBACK, tree
        )

    return optax.partition({KBFGS: chosen, FALLBACK: others}, labels)


def _momentum(decay: Number) -> optax.GradientTransformation:
    """``M <- decay M + (1 - decay) G``, kept in the factors' dtype; not bias-corrected.

    As ``optax.ema(decay, debias=False)``, which however keeps bfloat16 averages of bfloat16
    gradients.
    """

    def init_fn(params: Any) -> MomentumState:
        return MomentumState(
            jax.tree.map(lambda p: jnp.zeros(p.shape, layers_lib.factor_dtype(p.dtype)), params)
        )

    def update_fn(updates: Any, state: MomentumState, params: Any = None):
        del params
        updates = jax.tree.map(
            lambda m, g: running_average(m, g.astype(m.dtype), decay),
            state.momentum,
            updates,
        )
        return updates, MomentumState(updates)

    return optax.GradientTransformation(init_fn, cast(Any, update_fn))
