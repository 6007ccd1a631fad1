"""The preconditioners of the family: `scale_by_kbfgs`, `scale_by_kbfgs_l`, `scale_by_kfqn`.

Each says which numbers its method has and what they mean; `transform` takes the step.
"""

from collections.abc import Iterable

import optax

from kfqn_optax.layers import Layer
from kfqn_optax.options import Number, Options, ScalarOrSchedule
from kfqn_optax.transform import quasi_newton


def scale_by_kbfgs(
    learning_rate: ScalarOrSchedule,
    damping: ScalarOrSchedule = 0.3,
    *,
    factor_decay: Number = 0.9,
    pair_decay: Number = 0.9,
    powell: Number = 0.2,
    curvature_tolerance: Number = 1e-4,
    norm_constraint: Number | None = None,
    update_every: Number = 1,
    max_factor_dim: Number | None = None,
    layers: Iterable[Layer] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Preconditions the updates of layers by their two K-BFGS factors.

    Algorithm 2 of the paper without weight decay, momentum and the step itself: the updates that
    come in are M, those that leave are ``H_a M H_g``, to be scaled by minus the learning rate.
    Other parameters pass unchanged. Layers are those of `Layer`: dense, convolutions, projections
    of attention, embeddings. The input side of an embedding's lookups, whose second moment is
    diagonal, is inverted exactly; an embedding that is also an output layer (``attend``) is
    preconditioned as that output layer, its lookups not measured.

    ``update(updates, state, params, *, curvature_fn, **extra_args)`` measures the curvature twice,
    by ``curvature_fn(params)`` and at the probe, ``params`` minus ``learning_rate`` times the
    updates that leave. With ``curvature_fn=None`` the factors stay as they are for this step.
    Unknown extra arguments are ignored. A ``curvature_fn`` of the user's own takes the keyword
    arguments of `curvature_fn`'s, or at least passes them on; without them it may take the
    parameters alone, as long as every side is dense and stored.

    ``norm_constraint`` limits the step. With P the preconditioned M, ``learning_rate^2 <M, P>`` is
    the squared length of the step in the metric of the factors; where it is above the limit, P of
    all layers is scaled down together until that length is the limit (as K-FAC implementations do).
    It is in units of the loss: half of it is the curvature term of the factors' quadratic model.
    The published method has no such limit and can diverge from one batch to the next, at the
    authors' own settings too.

    Factors and averages are float32 for parameters of float32 or fewer bits, float64 for float64;
    the updates that leave have the parameter's dtype.

    Args:
        learning_rate: of the step at whose end the curvature is measured; give the same to
            ``optax.scale_by_learning_rate`` behind this. A number or a schedule.
        damping: lambda; a number above 0, or a schedule.
        factor_decay: decay of the running second moment of layer inputs, in [0, 1).
        pair_decay: decay of the running averages of s and y, in [0, 1).
        powell: mu_1 of Powell's damping, in (0, 1).
        curvature_tolerance: a pair is refused unless ``s.y > tolerance |s|^2 |v|``; at least 0.
        norm_constraint: the most that the squared length of the step in the metric of the factors
            may be, above 0. None, the default, is K-BFGS as published.
        update_every: k. Curvature is measured, and the factors change, in steps 0, k, 2k, ... only;
            the steps between cost a gradient and the direction. The averages A, s and y take in
            those steps alone, so they reach k times as far back. A whole number of at least 1.
        max_factor_dim: a side of a layer longer than this keeps no matrix but `lbfgs` pairs, 100 of
            them; its second moment is then never formed. A whole number of at least 1; None for
            8192.
        layers: which layers, from `find_layers`; by default every ``kernel`` with two axes.

    Returns:
        The transformation. Its ``init`` raises for a layer that cannot be told from its parameters
        alone and for parameters that are not real floating-point numbers. Its ``update`` raises
        ``TypeError`` when ``curvature_fn`` is left out, and ``ValueError`` when the parameters, the
        statistics and the state do not have the same layers. A tree without layers needs neither
        ``params`` nor ``curvature_fn``.

    References:
        Goldfarb, Ren, Bahamou, `Practical Quasi-Newton Methods for Training Deep Neural Networks
        <https://arxiv.org/abs/2006.08877>`_, NeurIPS 2020, Algorithm 2.
    """
    options = Options(
        learning_rate,
        damping,
        factor_decay,
        pair_decay,
        powell,
        curvature_tolerance,
        norm_constraint,
        update_every,
        max_factor_dim=max_factor_dim,
    )
    return quasi_newton(options, layers)


def scale_by_kbfgs_l(
    learning_rate: ScalarOrSchedule,
    damping: ScalarOrSchedule = 0.3,
    *,
    memory_size: Number = 100,
    factor_decay: Number = 0.9,
    pair_decay: Number = 0.9,
    powell: Number = 0.2,
    curvature_tolerance: Number = 1e-4,
    norm_constraint: Number | None = None,
    update_every: Number = 1,
    max_factor_dim: Number | None = None,
    layers: Iterable[Layer] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """`scale_by_kbfgs` with limited memory on the output side: K-BFGS(L).

    The output factor H_g is the product of the last ``memory_size`` damped pairs with the identity,
    never a matrix; it equals that of K-BFGS until the memory is full. State per layer:
    ``2 memory_size d_out`` numbers and small matrices in place of ``d_out^2``. A pair is stored if
    ``s.y > curvature_tolerance |s|^2 |g|`` and finite; the oldest goes first. The input factor
    stays a dense BFGS matrix.

    Args:
        learning_rate: of the step at whose end the curvature is measured; a number or a schedule.
        damping: lambda; a number above 0, or a schedule.
        memory_size: p, pairs kept, a whole number of at least 1; 100 in the paper's runs. It
            decides the shapes of the state: under ``optax.inject_hyperparams`` with a jitted
            ``init``, name it in ``static_args``.
        factor_decay: decay of the running second moment of layer inputs, in [0, 1).
        pair_decay: decay of the running averages of s and y, in [0, 1).
        powell: mu_1 of Powell's damping, in (0, 1).
        curvature_tolerance: see above; at least 0.
        norm_constraint: limit of the step's squared length in the metric of the factors, above 0;
            None for no limit. See `scale_by_kbfgs`.
        update_every: the factors change in every so many steps only; see `scale_by_kbfgs`.
        max_factor_dim: an input side longer than this (None: 8192) keeps 100 pairs too.
        layers: which layers, from `find_layers`; by default every ``kernel`` with two axes.

    Returns:
        The transformation; ``update`` and errors as for `scale_by_kbfgs`.

    References:
        Goldfarb, Ren, Bahamou, `Practical Quasi-Newton Methods for Training Deep Neural Networks
        <https://arxiv.org/abs/2006.08877>`_, NeurIPS 2020, section 4 (limited memory).
    """
    options = Options(
        learning_rate,
        damping,
        factor_decay,
        pair_decay,
        powell,
        curvature_tolerance,
        norm_constraint,
        update_every,
        output_memory=memory_size,
        max_factor_dim=max_factor_dim,
    )
    return quasi_newton(options, layers)


def scale_by_kfqn(
    learning_rate: ScalarOrSchedule,
    damping: ScalarOrSchedule = 0.3,
    *,
    split: str = "sqrt_t",
    pair_decay: Number = 0.9,
    powell: Number = 0.2,
    norm_constraint: Number | None = None,
    update_every: Number = 1,
    input_memory: Number | None = None,
    output_memory: Number | None = None,
    max_factor_dim: Number | None = None,
    layers: Iterable[Layer] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Preconditions the updates of layers by their two KF-QN factors (the later paper's variant).

    Made for convolutions, and the same for every kind of layer. As `scale_by_kbfgs`, except that

    * A is never stored: the product ``A s`` that the input factor learns from is of the current
      examples, at the cost of one more output channel, and without unfolding images to patches;
      only the first step forms A, to start the input factor from its inverse;
    * the second damping is the Levenberg-Marquardt term ``y + lambda_G s``, always;
    * a pair is refused only if ``s.y <= 0`` or not finite;
    * lambda is split by the number T of positions an example has in the layer (pixels, tokens):
      ``lambda_A = sqrt(lambda T)``, ``lambda_G = sqrt(lambda / T)``.

    Args:
        learning_rate: of the step at whose end the curvature is measured; a number or a schedule.
        damping: lambda; a number above 0, or a schedule.
        split: ``"sqrt_t"``, as above; or ``"sqrt"``, both sqrt(lambda), as in the first version of
            the paper.
        pair_decay: decay of the running averages of s and y, in [0, 1).
        powell: mu_1 of Powell's damping, in (0, 1).
        norm_constraint: limit of the step's squared length in the metric of the factors, above 0;
            None for no limit. See `scale_by_kbfgs`.
        update_every: the factors change in every so many steps only; see `scale_by_kbfgs`.
        input_memory: pairs kept for a limited-memory input factor (from the identity); None for a
            dense one.
        output_memory: the same for the output factor.
        max_factor_dim: a dense side longer than this (None: 8192) keeps 100 pairs instead.
        layers: which layers, from `find_layers`; by default every ``kernel`` with two axes.

    Returns:
        The transformation; ``update`` and errors as for `scale_by_kbfgs`. Its ``curvature_fn`` must
        take the keyword arguments ``moments`` and ``vectors``, as `curvature_fn`'s do.

    References:
        Ren, Bahamou, Goldfarb, `Kronecker-factored Quasi-Newton Methods for Deep Learning
        <https://arxiv.org/abs/2102.06737>`_, 2021. What its text leaves open follows the authors'
        published code of that time.
    """
    options = Options(
        learning_rate,
        damping,
        pair_decay=pair_decay,
        powell=powell,
        curvature_tolerance=0.0,
        norm_constraint=norm_constraint,
        update_every=update_every,
        input_memory=input_memory,
        output_memory=output_memory,
        max_factor_dim=max_factor_dim,
        matrix_free=True,
        shift=True,
        split=split,
    )
    return quasi_newton(options, layers)
