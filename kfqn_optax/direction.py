"""From gradients and factors to the preconditioned gradients, layer by layer."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from kfqn_optax import inverse, layers
from kfqn_optax.inverse import Factor
from kfqn_optax.layer_state import LayerState
from kfqn_optax.layers import Layer
from kfqn_optax.options import Number


def precondition(
    layer: Layer, state: LayerState, gradients: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """One layer's preconditioned gradient, ``H_a M H_g``.

    The paper's direction is ``- H_g M H_a`` of the transposed M (Algorithm 2); the sign is left to
    the learning rate, as everywhere in Optax.

    Args:
        layer: which layer.
        state: its factors.
        gradients: by parameter path; the layer's kernel and bias are read.

    Returns:
        By parameter path, in the dtype of the factors and the shapes of the parameters.
    """

    def of_one(H_a: Factor, H_g: Factor, M: jax.Array) -> jax.Array:
        return inverse.apply(H_g, inverse.apply(H_a, M).T).T

    M = layers.to_matrix(layer, gradients)
    return layers.from_matrix(layer, layer.over_blocks(of_one)(state.input, state.output, M))


def constrain(
    directions: Mapping[str, jax.Array],
    gradients: Mapping[str, jax.Array],
    learning_rate: Number,
    limit: Number | None,
) -> dict[str, jax.Array]:
    """All directions P, scaled down together so that the step is no longer than a limit.

    Its squared length in the metric of the factors is ``learning_rate^2 <P, H^-1 P>``, which is
    ``learning_rate^2 <M, P>`` as long as P is not scaled.

    Args:
        directions: P by parameter path.
        gradients: M by parameter path, for those paths at least.
        learning_rate: alpha.
        limit: of the squared length, above 0; None for no limit.
    """
    if limit is None:
        return dict(directions)
    inner = sum(jnp.vdot(gradients[name].astype(p.dtype), p) for name, p in directions.items())
    squared = learning_rate**2 * inner
    scale = jnp.where(squared > limit, jnp.sqrt(limit / jnp.where(squared > 0, squared, 1)), 1)
    return {name: p * scale.astype(p.dtype) for name, p in directions.items()}
