"""Mini-block Fisher: many small blocks of the outer products of the mini-batch's mean gradient.

Nothing is captured: the statistic is made of the gradient itself. A filter of a convolution, which
goes from one input channel to one output channel, is a vector v of k^2 numbers and has a block ``F
= v v^T``; a dense layer has one block, ``F = G^T G / d_in`` for its gradient G, [d_in, d_out]: the
mean over its inputs of the outer products of what goes out of each. F is a running average, and
its damped inverse, made now and then, is multiplied with the momentum (arXiv 2202.04124).
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from kfqn_optax import checks
from kfqn_optax import layers as layers_lib
from kfqn_optax.inverse import Remake, remake
from kfqn_optax.layers import Layer, named_leaves
from kfqn_optax.optimizer import whole
from kfqn_optax.options import (
    MAX_FACTOR_DIM,
    Number,
    ScalarOrSchedule,
    check,
    check_decay,
    check_size,
    known_size,
    value_at,
)
from kfqn_optax.statistics import running_average
from kfqn_optax.transform import is_placeholder, layers_present, like


class MiniBlockState(NamedTuple):
    """The curvature of one layer, in the dtype of the factors.

    Attributes:
        inverse: of the damped blocks: [d_out, d_out]; of a convolution [channels, features, k, k],
            k the number of pixels of its window. An axis of `Layer.blocks` in front, if there are.
        moment: the blocks F, never damped, in the same shape.
        momentum: running average of the gradient, [*blocks, d_in, d_out].
    """

    inverse: jax.Array
    moment: jax.Array
    momentum: jax.Array


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

    def start(layer: Layer, dtype: Any) -> MiniBlockState:
        shape = _block_shape(layer)
        return MiniBlockState(
            inverse=jnp.broadcast_to(jnp.eye(shape[-1], dtype=dtype), shape),
            moment=jnp.zeros(shape, dtype),
            momentum=jnp.zeros((*_leading(layer), layer.d_in, layer.d_out), dtype),
        )

    def init_fn(params: Any) -> ScaleByMBFState:
        if is_placeholder(params):
            count = jax.ShapeDtypeStruct((), jnp.int32)
            none: Any = jax.eval_shape(lambda: {x.path: start(x, jnp.float32) for x in given or ()})
            return ScaleByMBFState(cast(Any, count), cast(Any, count) if given is None else none)
        leaves = named_leaves(params)
        checks.check_real(leaves)
        present = layers_present(given, leaves)
        layers_lib.check_layers(present, leaves)
        _check_layers(present, max_factor_dim)
        dtypes = {x.path: layers_lib.factor_dtype(leaves[x.kernel_path].dtype) for x in present}
        return ScaleByMBFState(
            count=jnp.zeros((), jnp.int32),
            layers={layer.path: start(layer, dtypes[layer.path]) for layer in present},
        )

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
        every = jnp.asarray(inverse_every).astype(jnp.int32)
        due = (state.count <= every) | (state.count % every == 0)

        G = {layer.path: layers_lib.to_matrix(layer, gradients) for layer in present}
        M = {
            path: running_average(state.layers[path].momentum, of_layer, momentum)
            for path, of_layer in G.items()
        }
        F = {
            layer.path: _average(
                state.layers[layer.path].moment, _moment(layer, G[layer.path]), factor_decay
            )
            for layer in present
        }
        K = jax.lax.cond(
            due,
            lambda: _inverses(present, state.layers, F, damped),
            lambda: {path: state.layers[path].inverse for path in F},
        )
        directions = {
            name: leaf
            for layer in present
            for name, leaf in layers_lib.from_matrix(
                layer, _apply(layer, K[layer.path], M[layer.path])
            ).items()
        }
        held = {
            path: MiniBlockState(inverse=K[path], moment=F[path], momentum=M[path]) for path in F
        }
        return like(updates, gradients | directions, dtypes=updates), ScaleByMBFState(count, held)

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


# --- one layer ------------------------------------------------------------------------------------


def _without_conv_bias(layers: Iterable[Layer] | None) -> tuple[Layer, ...] | None:
    """The layers, where a convolution's bias is none of it."""
    given = layers_lib.as_layers(layers)
    return given and tuple(
        dataclasses.replace(layer, bias=None) if layer.kind == "conv" else layer for layer in given
    )


def _leading(layer: Layer) -> tuple[int, ...]:
    return () if layer.blocks is None else (layer.blocks,)


def _window(layer: Layer) -> tuple[int, int]:
    """Of a convolution: the pixels of its window, and the channels of a group."""
    sizes = [size for part in layer.kernel.split for size in part]
    *window, channels = (sizes[axis] for axis in layer.kernel.rows)
    return math.prod(window), channels


def _block_shape(layer: Layer) -> tuple[int, ...]:
    if layer.kind != "conv":
        return (*_leading(layer), layer.d_out, layer.d_out)
    pixels, channels = _window(layer)
    return (*_leading(layer), channels, layer.d_out, pixels, pixels)


def _filters(layer: Layer, matrix: jax.Array) -> jax.Array:
    """Of a convolution: its filters as vectors, [*blocks, channels, features, pixels]."""
    split = matrix.reshape(*_leading(layer), *_window(layer), layer.d_out)
    return jnp.moveaxis(split, -3, -1)


def _moment(layer: Layer, gradient: jax.Array) -> jax.Array:
    """The blocks of one gradient, [*blocks, d_in, d_out]."""
    highest = jax.lax.Precision.HIGHEST
    if layer.kind == "conv":
        v = _filters(layer, gradient)
        return v[..., :, None] * v[..., None, :]
    return jnp.einsum("...io,...ip->...op", gradient, gradient, precision=highest) / layer.d_in


def _apply(layer: Layer, K: jax.Array, momentum: jax.Array) -> jax.Array:
    """The preconditioned momentum, [*blocks, d_in, d_out]."""
    highest = jax.lax.Precision.HIGHEST
    if layer.kind == "conv":
        v = _filters(layer, momentum)
        product = jnp.einsum("...kl,...l->...k", K, v, precision=highest)
        return jnp.moveaxis(product, -1, -3).reshape(momentum.shape)
    return jnp.matmul(momentum, K, precision=highest)


def _average(held: jax.Array, new: jax.Array, decay: Number) -> jax.Array:
    """F with a gradient's; the first is taken as it is, and none that is not finite."""
    old = jnp.where(jnp.any(held != 0), jnp.asarray(decay, held.dtype), 0)
    mixed = (old * held + (1 - old) * new).astype(held.dtype)
    return jnp.where(jnp.isfinite(jnp.sum(new)), mixed, held)


def _inverses(
    layers: Iterable[Layer],
    states: dict[str, MiniBlockState],
    F: dict[str, jax.Array],
    damping: jax.Array,
) -> dict[str, jax.Array]:
    dense, made = {}, {}
    for layer in layers:
        path, of_layer = layer.path, F[layer.path]
        number = damping.astype(of_layer.dtype)
        if layer.kind == "conv":
            made[path] = inverses_of_small(of_layer, number)
        else:
            shape = _leading(layer)
            wanted, of_each = jnp.ones(shape, bool), jnp.broadcast_to(number, shape)
            dense[path] = Remake(wanted, of_each, of_layer, states[path].inverse)
    made |= remake(dense)
    return {path: made[path] for path in F}


def inverses_of_small(F: jax.Array, damping: jax.Array) -> jax.Array:
    """``(F + damping I)^-1`` of very many very small positive semidefinite matrices, [..., k, k].

    By k symmetric sweeps, each over all matrices at once, without a call of LAPACK for each. Where
    a pivot is no more than rounding leaves of the largest (an F whose scale dwarfs the damping),
    the inverse of the diagonal stands in.
    """
    k = F.shape[-1]

    def of_one(matrix: jax.Array) -> jax.Array:
        def sweep(i: int, carry: tuple) -> tuple:
            S, least = carry
            at = jnp.arange(k) == i
            column = jax.lax.dynamic_index_in_dim(S, i, axis=-1, keepdims=False)
            pivot, rest, unit = column[i], jnp.where(at, 0, column), at.astype(S.dtype)
            inner = jnp.where(at[:, None] | at[None, :], 0, S - jnp.outer(rest, rest) / pivot)
            crossed = jnp.outer(rest, unit) + jnp.outer(unit, rest) - jnp.outer(unit, unit)
            return inner + crossed / pivot, jnp.minimum(least, pivot)

        damped = matrix + damping * jnp.eye(k, dtype=F.dtype)
        largest = jnp.max(jnp.diag(damped))
        made, least = jax.lax.fori_loop(0, k, sweep, (damped, largest))
        usable = least > 10 * k * jnp.finfo(F.dtype).eps * largest
        return jnp.where(usable, -made, jnp.diag(1 / jnp.diag(damped)))

    return jax.vmap(of_one)(F.reshape(-1, k, k)).reshape(F.shape)


# --- refusals -------------------------------------------------------------------------------------


def _check_layers(present: Iterable[Layer], max_factor_dim: Number | None) -> None:
    given = max_factor_dim
    longest = MAX_FACTOR_DIM if given is None else known_size("max_factor_dim", given)
    advice = "Leave it out with layers=, and it goes to the fallback."
    for layer in present:
        if layer.lookup:
            raise ValueError(
                f"layer {layer.path!r} is an embedding; MBF does not know its lookups. {advice}"
            )
        if layer.kind != "conv" and layer.d_out > longest:
            raise ValueError(
                f"layer {layer.path!r} has an output side of length {layer.d_out}, for which MBF "
                f"would keep two matrices of that size; max_factor_dim is {longest}. {advice}"
            )


def _check_state(present: tuple[Layer, ...], state: ScaleByMBFState) -> None:
    expected = {layer.path: _block_shape(layer) for layer in present}
    found = {path: of_layer.moment.shape for path, of_layer in state.layers.items()}
    wrong = sorted(path for path in expected | found if expected.get(path) != found.get(path))
    if wrong:
        raise ValueError(
            f"the state of MBF was made for other parameters: layer {wrong[0]!r} has blocks "
            f"{expected.get(wrong[0], 'none')} in the gradients and {found.get(wrong[0], 'none')} "
            "in the state. Call tx.init(params) on the parameters that are trained."
        )
