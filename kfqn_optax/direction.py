"""From gradients and factors to the preconditioned gradients, layer by layer."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kfqn_optax import inverse, low_rank
from kfqn_optax import layers as layers_lib
from kfqn_optax.generations import Generations
from kfqn_optax.inverse import Factor
from kfqn_optax.layers import Layer
from kfqn_optax.nystrom import Nystrom
from kfqn_optax.options import Number


def precondition(
    layers: Sequence[Layer],
    states: Mapping[str, Any],
    gradients: Mapping[str, jax.Array],
    learning_rate: Number,
    limit: Number | None,
) -> dict[str, jax.Array]:
    """The preconditioned gradients of all layers, ``P = H_a M H_g``, within a limit.

    The paper's direction is ``- H_g M H_a`` of the transposed M (Algorithm 2); the sign is left to
    the learning rate, as everywhere in Optax.

    The squared length of the step in the metric of the factors is ``learning_rate^2 <P, H^-1 P>``,
    which is ``learning_rate^2 <M, P>``. Where it is above the limit, all P are scaled down together
    until it is the limit. Where it is not finite, because it overflows or because some M is not, it
    is above any limit: P is scaled to 0, and stays what it is where it is not a number.

    Args:
        layers: which layers.
        states: their factors by layer path, `input` and `output` of each state.
        gradients: M by parameter path; each layer's kernel and bias are read.
        learning_rate: alpha.
        limit: of the squared length, above 0; None for no limit.

    Returns:
        By parameter path, in the dtype of the factors and the shapes of the parameters.
    """
    P, promised = direction(layers, states, gradients)
    if limit is not None:
        squared = learning_rate**2 * promised
        scale = jnp.where(squared > limit, jnp.sqrt(limit / jnp.where(squared > 0, squared, 1)), 1)
        scale = jnp.where(jnp.isfinite(squared), scale, 0)
        P = {name: leaf * scale.astype(leaf.dtype) for name, leaf in P.items()}
    return P


def direction(
    layers: Sequence[Layer], states: Mapping[str, Any], gradients: Mapping[str, jax.Array]
) -> tuple[dict[str, jax.Array], jax.Array]:
    """``P = H_a M H_g`` of each layer, and ``<M, P>`` of all of them together.

    ``<M, P>`` is the curvature along P that the factors promise, ``<P, H^-1 P>``.

    Args:
        layers: see `precondition`.
        states: the same.
        gradients: M.

    Returns:
        P as `precondition` returns it, and ``<M, P>``, [].
    """
    P: dict[str, jax.Array] = {}
    promised = []
    for layer in layers:
        H_a, H_g = states[layer.path].input, states[layer.path].output
        if isinstance(H_a, Nystrom):
            M = list(layers_lib.to_matrices(layer, gradients).values())
            P_of = layer.over_blocks(_by_parts)(H_a, M, H_g)
            P |= layers_lib.from_matrices(layer, P_of)
        else:
            M = [layers_lib.to_matrix(layer, gradients)]
            P_of = [layer.over_blocks(_whole)(H_a, M[0], H_g)]
            P |= layers_lib.from_matrix(layer, P_of[0])
        promised += [jnp.vdot(*both) for both in zip(M, P_of, strict=True)]
    return P, jnp.asarray(sum(promised))


def _whole(H_a: Factor, M: jax.Array, H_g: Any) -> jax.Array:
    return inverse.apply_to_rows(H_g, inverse.apply(H_a, M))


def _by_parts(H_a: Nystrom, M: list[jax.Array], H_g: Generations) -> list[jax.Array]:
    """For kernel and bias, without making one matrix of them."""
    return low_rank.both_sides(inverse.as_low_rank(H_a), M, inverse.as_low_rank(H_g))
