"""From gradients and factors to the preconditioned gradients, layer by layer."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kfqn_optax import inverse
from kfqn_optax import layers as layers_lib
from kfqn_optax.inverse import Factor
from kfqn_optax.layers import Layer
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
        P = {layer: P_of * scale.astype(P_of.dtype) for layer, P_of in P.items()}
    return leaves(P)


def direction(
    layers: Sequence[Layer], states: Mapping[str, Any], gradients: Mapping[str, jax.Array]
) -> tuple[dict[Layer, jax.Array], jax.Array]:
    """``P = H_a M H_g`` of each layer as a matrix, and ``<M, P>`` of all of them together.

    ``<M, P>`` is the curvature along P that the factors promise, ``<P, H^-1 P>``.

    Args:
        layers: see `precondition`.
        states: the same.
        gradients: M.
    """

    def of_one(H_a: Factor, H_g: Any, M: jax.Array) -> jax.Array:
        return inverse.apply_to_rows(H_g, inverse.apply(H_a, M))

    M = {layer: layers_lib.to_matrix(layer, gradients) for layer in layers}
    P = {
        layer: layer.over_blocks(of_one)(states[layer.path].input, states[layer.path].output, M_of)
        for layer, M_of in M.items()
    }
    return P, jnp.asarray(sum(jnp.vdot(M[layer], P[layer]) for layer in layers))


def leaves(P: Mapping[Layer, jax.Array]) -> dict[str, jax.Array]:
    """Matrices of layers by parameter path, in the shapes of the parameters."""
    return {
        name: leaf
        for layer, P_of in P.items()
        for name, leaf in layers_lib.from_matrix(layer, P_of).items()
    }
