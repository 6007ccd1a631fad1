"""Block K-BFGS: several pairs a step for each factor, and steps as long as the loss allows.

K-BFGS with four changes. Each factor takes q pairs a step, from sums over the examples with random
signs (`sketch`), instead of one from their mean. Both factors start from their damping alone, so
nothing is inverted. (Or the input factor knows the directions of largest curvature only, `nystrom`,
which makes steps cheaper.) The output factor forgets what it learned more than some steps ago, and
is kept as pairs and not as a matrix (`generations`). And the length of the step comes from a
parabola through what is measured at the probe anyway (`trust`): the learning rate is the share of
the way to the parabola's minimum, half of it unless told otherwise. A step after which the loss is
much higher is not taken.
"""

import functools
from collections.abc import Iterable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from kfqn_optax import block_state, block_step, checks, trust
from kfqn_optax import layers as layers_lib
from kfqn_optax.block_step import ScaleByBlockKBFGSState, Settings
from kfqn_optax.checks import MISSING
from kfqn_optax.layers import Layer, named_leaves
from kfqn_optax.optimizer import whole
from kfqn_optax.options import Number, ScalarOrSchedule, known_size
from kfqn_optax.statistics import CurvatureFn
from kfqn_optax.transform import initial, is_placeholder, layers_present, placeholder_state


def scale_by_block_kbfgs(
    learning_rate: ScalarOrSchedule = 0.5,
    damping: ScalarOrSchedule = 0.03,
    *,
    pairs: Number = 8,
    window: Number = 16,
    input_rank: Number | None = None,
    momentum: Number = 0.9,
    factor_decay: Number = 0.9,
    powell: Number = 0.2,
    update_every: ScalarOrSchedule | None = None,
    max_factor_dim: Number | None = None,
    layers: Iterable[Layer] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Preconditions the gradients of layers by block K-BFGS, and makes them as long as is wise.

    The updates that come in are gradients G (momentum is taken here, since the length of the step
    needs G itself), those that leave are ``a H_a M H_g``, to be scaled by minus the learning rate.
    In a step that is not taken, and where a gradient is not finite, they are 0.

    ``update(updates, state, params, *, curvature_fn, **extra_args)`` measures at ``params`` and at
    the probe. A tenth of the batch is enough for ``curvature_fn`` (100 of 1000 examples in all our
    measurements); these must be among the examples of the gradient. Its loss must see them along
    the first axis of what the layers are given. With ``curvature_fn=None`` the step is made with
    what is known and taken unseen. A ``curvature_fn`` of the user's own must take the keyword
    arguments of `curvature_fn`'s.

    Args:
        learning_rate: what the step to the minimum of the parabola is multiplied by; a number or a
            schedule. (The minimum is that of this batch: steps all the way to it keep the loss
            some percent above what half as long ones reach.) No step goes beyond the minimum: more
            than 1 is as 1. It must be the one that scales the updates afterwards.
        damping: lambda; a number above 0, or a schedule. sqrt(lambda) on each side.
        pairs: q, how many pairs each factor takes in a step; a whole number of at least 1.
        window: the output factors know the pairs of the last ``window / 2`` to ``window`` measured
            steps and nothing of those before; a multiple of 2.
        input_rank: k; the input factors know A along k directions, which follow its largest
            eigenvalues, and take their mean for all others. Then the direction costs
            ``16 d_in d_out k`` FLOPs or so in place of ``2 d_in^2 d_out``, and the pairs are for
            the output side alone. None for matrices; a whole number of at least 1.
        momentum: decay of M, in [0, 1); M is corrected for its start from 0.
        factor_decay: decay of the running average A, in [0, 1); the first averages are plain means.
        powell: mu_1 of Powell's damping, in (0, 1).
        update_every: k; curvature is measured, and the factors change, in steps whose number is a
            multiple of k; the others are made as with ``curvature_fn=None``. A whole number of at
            least 1, or a schedule of such. None: in each of the first 200 steps and in every 4th
            after them, since curvature changes fast at first and measuring it is a fifth of a step.
            A step is measured in any case where the last one measured was not taken, or found the
            loss a tenth above what the one before it had ended with.
        max_factor_dim: layers with a longer side (None: 8192) are refused.
        layers: which layers, from `find_layers`; by default every ``kernel`` with two axes.
            Embeddings are refused.

    Returns:
        The transformation, with errors as for `scale_by_kbfgs`.

    References:
        Goldfarb, Ren, Bahamou, `Practical Quasi-Newton Methods for Training Deep Neural Networks
        <https://arxiv.org/abs/2006.08877>`_, 2020, for the factors; Gao, Goldfarb, `Block BFGS
        Methods <https://arxiv.org/abs/1609.00318>`_, 2018, and Gower, Goldfarb, Richtarik,
        `Stochastic Block BFGS <https://arxiv.org/abs/1603.09649>`_, 2016, for several pairs at
        once. Their use for both factors, and the length of the step, are this library's.
    """
    settings = Settings(
        learning_rate=learning_rate,
        damping=damping,
        pairs=pairs,
        window=window,
        input_rank=input_rank,
        momentum=momentum,
        factor_decay=factor_decay,
        powell=powell,
        update_every=update_every,
        max_factor_dim=max_factor_dim,
    )
    given = layers_lib.as_layers(layers)
    count_of_pairs = known_size("pairs", pairs)
    init_layer = functools.partial(
        block_state.init,
        pairs_of_step=count_of_pairs,
        window=known_size("window", window),
        input_rank=None if input_rank is None else known_size("input_rank", input_rank),
    )

    def init_fn(params: Any) -> ScaleByBlockKBFGSState:
        def make(count: Any, held: Any, momentum: Any) -> ScaleByBlockKBFGSState:
            none = jnp.zeros((), jnp.int32)
            return ScaleByBlockKBFGSState(
                count, held, momentum, none, trust.init(_loss_dtype(held))
            )

        if is_placeholder(params):
            names = [name for layer in given or () for name in layer.parameter_paths]
            return placeholder_state(
                lambda n, held: make(n, held, n if given is None else dict.fromkeys(names, n)),
                given,
                lambda layer: init_layer(layer, jnp.float32),
            )
        check_sides = functools.partial(
            checks.check_sides, method="block K-BFGS", max_factor_dim=max_factor_dim
        )
        held = initial(params, given, init_layer, check_sides)
        leaves = named_leaves(params)
        names = [n for layer in layers_present(given, leaves) for n in layer.parameter_paths]
        momentum = {
            name: jnp.zeros_like(leaves[name], layers_lib.factor_dtype(leaves[name].dtype))
            for name in names
        }
        return make(jnp.zeros((), jnp.int32), held, momentum)

    def update_fn(
        updates: Any,
        state: ScaleByBlockKBFGSState,
        params: Any = None,
        *,
        curvature_fn: CurvatureFn | None = MISSING,
        **extra_args: Any,
    ) -> tuple[Any, ScaleByBlockKBFGSState]:
        del extra_args
        count = jnp.asarray(optax.safe_increment(state.count))
        gradients = named_leaves(updates)
        present = layers_present(given, gradients)
        checks.check_state(present, state.layers, gradients)
        if not present:
            return updates, state._replace(count=count)
        checks.check_arguments(params, curvature_fn, present, "block K-BFGS")
        averaged, usable = block_step.average(settings, updates, state)

        def step(fn: CurvatureFn | None) -> tuple[Any, ScaleByBlockKBFGSState]:
            measured = None
            if fn is not None:
                measured = fn(
                    params, moments=list(state.layers), sketches=count_of_pairs, gradient=True
                )
                checks.check_statistics(
                    present, measured, given is None, named_leaves(params), state.layers
                )
            return block_step.step(
                settings,
                present,
                updates,
                averaged,
                usable,
                params,
                measured,
                fn,
                count_of_pairs,
            )

        if curvature_fn is None or settings.measures_always():
            stepped, new = step(curvature_fn)
        else:
            stepped, new = jax.lax.cond(
                settings.measures(state.count) | state.trust.doubt,
                lambda: step(curvature_fn),
                lambda: step(None),
            )
        return stepped, new._replace(count=count)

    return optax.GradientTransformationExtraArgs(cast(Any, init_fn), cast(Any, update_fn))


def _loss_dtype(held: Any) -> Any:
    """Of the numbers of `trust`: float64 if all layers are."""
    dtypes = {
        leaf.dtype for leaf in jax.tree.leaves(held) if jnp.issubdtype(leaf.dtype, jnp.floating)
    }
    return jnp.float64 if dtypes == {jnp.dtype("float64")} else jnp.float32


def block_kbfgs(
    learning_rate: ScalarOrSchedule = 0.5,
    damping: ScalarOrSchedule = 0.03,
    *,
    pairs: Number = 8,
    window: Number = 16,
    input_rank: Number | None = None,
    momentum: Number = 0.9,
    weight_decay: Number = 0.0,
    factor_decay: Number = 0.9,
    powell: Number = 0.2,
    update_every: ScalarOrSchedule | None = None,
    max_factor_dim: Number | None = None,
    layers: Iterable[Layer] | None = None,
    fallback: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Block K-BFGS, with settings that are meant to be left alone (`scale_by_block_kbfgs`).

    Args:
        learning_rate: what the step to the minimum of the parabola is multiplied by; a number or a
            schedule. More than 1 is as 1.
        damping: lambda; a number above 0, or a schedule.
        pairs: q, how many pairs each factor takes in a step.
        window: the output factors know the pairs of the last ``window / 2`` to ``window`` measured
            steps.
        input_rank: along how many directions the input factors know A; None for matrices.
        momentum: decay of M, in [0, 1).
        weight_decay: tau, at least 0; ``tau`` times kernel and bias enters the gradient.
        factor_decay: decay of the running second moment of layer inputs, in [0, 1).
        powell: mu_1 of Powell's damping, in (0, 1).
        update_every: curvature is measured in every so many steps; a number or a schedule. None:
            in each of the first 200 steps, in every 4th after them; and wherever the last
            measurement was not as expected.
        max_factor_dim: layers with a longer side (None: 8192) are refused.
        layers: which layers, from `find_layers`; by default every ``kernel`` with two axes.
        fallback: what updates all other parameters; ``optax.adam(1e-3)`` by default.

    Returns:
        A transformation to be used like `kbfgs`, with a ``curvature_fn`` of a tenth of the batch:

            tx.update(grads, state, params,
                      curvature_fn=kfqn.curvature_fn(loss_fn, params, batch[:100]))
    """
    scale = scale_by_block_kbfgs(
        learning_rate,
        damping,
        pairs=pairs,
        window=window,
        input_rank=input_rank,
        momentum=momentum,
        factor_decay=factor_decay,
        powell=powell,
        update_every=update_every,
        max_factor_dim=max_factor_dim,
        layers=layers,
    )
    others = optax.adam(1e-3) if fallback is None else fallback
    return whole(scale, learning_rate, None, weight_decay, layers, others)
