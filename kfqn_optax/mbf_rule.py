"""The mini-block Fisher method: momentum, multiplied by the inverses of a layer's mini-blocks.

The blocks are made of the gradient itself, see `mini_block`; nothing is measured beside it.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from kfqn_optax import checks, mini_block
from kfqn_optax import layers as layers_lib
from kfqn_optax.layers import Layer, named_leaves
from kfqn_optax.mini_block import MiniBlockState
from kfqn_optax.optimizer import whole
from kfqn_optax.options import (
    Number,
    ScalarOrSchedule,
    check,
    check_decay,
    check_size,
    inverses_due,
    is_damping,
    value_at,
)
from kfqn_optax.statistics import running_average
from kfqn_optax.transform import initial, is_placeholder, layers_present, like, placeholder_state


class ScaleByMBFState(NamedTuple):
    """State of `scale_by_mbf`.

    Attributes:
        count: number of steps taken, int32; inverses are made by it.
        layers: curvature by layer path.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    layers: dict[str, MiniBlockState]


def scale_by_mbf(
    damping: ScalarOrSchedule,
    *,
    momentum: Number = 0.9,
    factor_decay: Number = 0.9,
    inverse_every: Number = 25,
    max_factor_dim: Number | None = None,
    layers: Iterable[Layer] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Momentum on the updates of layers, multiplied by the inverses of their mini-blocks.

    The updates that come in must be the gradient itself: its outer products enter the blocks, and
    the momentum ``M <- momentum M + (1 - momentum) G`` is taken here. Those that leave are ``M (F +
    lambda I)^-1`` for a dense layer, and the same filter by filter for a convolution. Other
    parameters, biases of convolutions among them, pass unchanged. Embeddings are refused.

    ``update(updates, state, params=None, **extra_args)`` needs no parameters and measures nothing.
    In a step in which a schedule's damping is not a number above 0, blocks and inverses stay as
    they are; the momentum goes on.

    Args:
        damping: lambda, in units of a squared gradient, above 0; a number or a schedule. Which
            suits a problem is known only from trying: the authors looked between 1e-5 and 1e-2 for
            autoencoders.
        momentum: decay of M, in [0, 1). The authors sum, ``M <- momentum M + G``: the same at a
            learning rate ``1 - momentum`` times ours.
        factor_decay: decay of the running averages F, in [0, 1). The first gradient is taken as it
            is.
        inverse_every: inverses are made in steps 0 to ``inverse_every`` and then in every
            ``inverse_every``-th.
        max_factor_dim: dense layers with a longer output side (None: 8192) are refused.
        layers: which layers, from `find_layers`; by default every ``kernel`` with two axes.

    Returns:
        The transformation.

    References:
        Bahamou, Goldfarb, Ren, `A Mini-Block Fisher Method for Deep Neural Networks
        <https://arxiv.org/abs/2202.04124>`_, AISTATS 2023; the block of a dense layer is the mean
        over its inputs.
    """
    check("damping", damping, lambda v: v > 0, "above 0", schedule=True)
    check_decay("momentum", momentum)
    check_decay("factor_decay", factor_decay)
    check_size("inverse_every", inverse_every)
    if max_factor_dim is not None:
        check_size("max_factor_dim", max_factor_dim)
    given = _without_conv_bias(layers)

    def init_fn(params: Any) -> ScaleByMBFState:
        if is_placeholder(params):
            return placeholder_state(
                ScaleByMBFState, given, lambda layer: mini_block.init(layer, jnp.float32)
            )
        check_sides = functools.partial(
            checks.check_sides, method="MBF", max_factor_dim=max_factor_dim, sides=_sides
        )
        held = initial(params, given, mini_block.init, check_sides)
        return ScaleByMBFState(jnp.zeros((), jnp.int32), held)

    def update_fn(
        updates: Any, state: ScaleByMBFState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, ScaleByMBFState]:
        del params, extra_args
        count = jnp.asarray(optax.safe_increment(state.count))
        gradients = named_leaves(updates)
        present = layers_present(given, gradients)
        _check_state(present, state)
        if not present:
            return updates, ScaleByMBFState(count, state.layers)
        damped = jnp.asarray(value_at(damping, state.count))
        usable = is_damping(damped)

        G = {layer.path: layers_lib.to_matrix(layer, gradients) for layer in present}
        M = {
            path: running_average(state.layers[path].momentum, of_layer, momentum)
            for path, of_layer in G.items()
        }
        held = {layer.path: state.layers[layer.path].moment for layer in present}
        F = {
            layer.path: jnp.where(
                usable,
                mini_block.average(
                    held[layer.path], mini_block.moment(layer, G[layer.path]), factor_decay
                ),
                held[layer.path],
            )
            for layer in present
        }
        starts = [~jnp.any(held[path] != 0) & jnp.any(F[path] != 0) for path in F]
        K = jax.lax.cond(
            usable & (inverses_due(state.count, inverse_every) | jnp.any(jnp.stack(starts))),
            lambda: mini_block.inverses(present, state.layers, F, damped),
            lambda: {path: state.layers[path].inverse for path in F},
        )
        directions = {
            name: leaf
            for layer in present
            for name, leaf in layers_lib.from_matrix(
                layer, mini_block.apply(layer, K[layer.path], M[layer.path])
            ).items()
        }
        learned = {
            path: MiniBlockState(inverse=K[path], moment=F[path], momentum=M[path]) for path in F
        }
        updates = like(updates, gradients | directions, dtypes=updates)
        return updates, ScaleByMBFState(count, learned)

    return optax.GradientTransformationExtraArgs(cast(Any, init_fn), cast(Any, update_fn))


def mbf(
    learning_rate: ScalarOrSchedule,
    damping: ScalarOrSchedule,
    *,
    momentum: Number = 0.9,
    weight_decay: Number = 0.0,
    factor_decay: Number = 0.9,
    inverse_every: Number = 25,
    max_factor_dim: Number | None = None,
    layers: Iterable[Layer] | None = None,
    fallback: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The mini-block Fisher method: weight decay, `scale_by_mbf`, learning rate; a fallback beside.

    Its ``update`` needs no ``curvature_fn``. The weight decay is in the blocks too.

    Args:
        learning_rate: alpha; a number at least 0, or a schedule.
        damping: lambda; see `scale_by_mbf`.
        momentum: decay of M, in [0, 1).
        weight_decay: tau, at least 0; ``tau`` times kernel and bias enters the gradient.
        factor_decay: decay of the running averages F, in [0, 1).
        inverse_every: how often inverses are made, see `scale_by_mbf`.
        max_factor_dim: dense layers with a longer output side (None: 8192) are refused.
        layers: which layers, from `find_layers`; by default every ``kernel`` with two axes.
        fallback: what updates all other parameters, biases of convolutions among them;
            ``optax.adam(learning_rate)`` by default.

    Returns:
        An ordinary transformation.

    References:
        Bahamou, Goldfarb, Ren, `A Mini-Block Fisher Method for Deep Neural Networks
        <https://arxiv.org/abs/2202.04124>`_, AISTATS 2023.
    """
    scale = scale_by_mbf(
        damping,
        momentum=momentum,
        factor_decay=factor_decay,
        inverse_every=inverse_every,
        max_factor_dim=max_factor_dim,
        layers=layers,
    )
    check("learning_rate", learning_rate, lambda v: v >= 0, "at least 0", schedule=True)
    return whole(scale, learning_rate, None, weight_decay, _without_conv_bias(layers), fallback)


def _without_conv_bias(layers: Iterable[Layer] | None) -> tuple[Layer, ...] | None:
    """The layers, where a convolution's bias is none of it."""
    given = layers_lib.as_layers(layers)
    return given and tuple(
        dataclasses.replace(layer, bias=None) if layer.kind == "conv" else layer for layer in given
    )


def _sides(layer: Layer) -> list[int]:
    """The sides for which matrices are kept: a convolution has small ones, one for each filter."""
    return [] if layer.kind == "conv" else [layer.d_out]


def _check_state(present: tuple[Layer, ...], state: ScaleByMBFState) -> None:
    expected = {layer.path: mini_block.block_shape(layer) for layer in present}
    found = {path: of_layer.moment.shape for path, of_layer in state.layers.items()}
    wrong = sorted(path for path in expected | found if expected.get(path) != found.get(path))
    if wrong:
        raise ValueError(
            f"the state of MBF was made for other parameters: layer {wrong[0]!r} has blocks "
            f"{expected.get(wrong[0], 'none')} in the gradients and {found.get(wrong[0], 'none')} "
            "in the state. Call tx.init(params) on the parameters that are trained."
        )
