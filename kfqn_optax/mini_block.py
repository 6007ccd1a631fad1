"""What the mini-block Fisher method keeps of a layer: small blocks, and their damped inverses.

Nothing is captured: the statistic is made of the gradient itself. A filter of a convolution, which
goes from one input channel to one output channel, is a vector v of k^2 numbers and has a block ``F
= v v^T``; a dense layer has one block, ``F = G^T G / d_in`` for its gradient G, [d_in, d_out]: the
mean over its inputs of the outer products of what goes out of each. F is a running average, and
its damped inverse, made now and then, is multiplied with the momentum (arXiv 2202.04124).
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfqn_optax.inverse import Remake, remake
from kfqn_optax.layers import Layer
from kfqn_optax.options import Number
from kfqn_optax.statistics import is_usable


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


def init(layer: Layer, dtype: Any) -> MiniBlockState:
    """Inverses the identity, blocks and momentum 0."""
    shape = block_shape(layer)
    return MiniBlockState(
        inverse=jnp.broadcast_to(jnp.eye(shape[-1], dtype=dtype), shape),
        moment=jnp.zeros(shape, dtype),
        momentum=jnp.zeros((*_leading(layer), layer.d_in, layer.d_out), dtype),
    )


def _leading(layer: Layer) -> tuple[int, ...]:
    return () if layer.blocks is None else (layer.blocks,)


def _window(layer: Layer) -> tuple[int, int]:
    """Of a convolution: the pixels of its window, and the channels of a group."""
    sizes = [size for part in layer.kernel.split for size in part]
    *window, channels = (sizes[axis] for axis in layer.kernel.rows)
    return math.prod(window), channels


def block_shape(layer: Layer) -> tuple[int, ...]:
    """Shape of a layer's blocks, see `MiniBlockState`."""
    if layer.kind != "conv":
        return (*_leading(layer), layer.d_out, layer.d_out)
    pixels, channels = _window(layer)
    return (*_leading(layer), channels, layer.d_out, pixels, pixels)


def _filters(layer: Layer, matrix: jax.Array) -> jax.Array:
    """Of a convolution: its filters as vectors, [*blocks, channels, features, pixels]."""
    split = matrix.reshape(*_leading(layer), *_window(layer), layer.d_out)
    return jnp.moveaxis(split, -3, -1)


def moment(layer: Layer, gradient: jax.Array) -> jax.Array:
    """The blocks of one gradient, [*blocks, d_in, d_out]."""
    highest = jax.lax.Precision.HIGHEST
    if layer.kind == "conv":
        v = _filters(layer, gradient)
        return v[..., :, None] * v[..., None, :]
    return jnp.einsum("...io,...ip->...op", gradient, gradient, precision=highest) / layer.d_in


def apply(layer: Layer, K: jax.Array, momentum: jax.Array) -> jax.Array:
    """The preconditioned momentum, [*blocks, d_in, d_out]."""
    highest = jax.lax.Precision.HIGHEST
    if layer.kind == "conv":
        v = _filters(layer, momentum)
        product = jnp.einsum("...kl,...l->...k", K, v, precision=highest)
        return jnp.moveaxis(product, -1, -3).reshape(momentum.shape)
    return jnp.matmul(momentum, K, precision=highest)


def average(held: jax.Array, new: jax.Array, decay: Number) -> jax.Array:
    """F with a gradient's; the first is taken as it is, and none that `is_usable` refuses."""
    old = jnp.where(jnp.any(held != 0), jnp.asarray(decay, held.dtype), 0)
    mixed = (old * held + (1 - old) * new).astype(held.dtype)
    return jnp.where(is_usable(new), mixed, held)


def inverses(
    layers: Iterable[Layer],
    states: dict[str, MiniBlockState],
    F: dict[str, jax.Array],
    damping: jax.Array,
) -> dict[str, jax.Array]:
    """``(F + damping I)^-1`` of every layer's blocks, by layer path."""
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
