"""From gradients and factors to the preconditioned gradients, layer by layer."""

from collections.abc import Mapping

import jax

from kfqn_optax import bfgs, layers
from kfqn_optax.factors import LayerState
from kfqn_optax.layers import Layer


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
        By parameter path, in the dtype of the factors: kernel [d_in - bias, d_out], bias [d_out].
    """
    M = layers.to_matrix(layer, gradients)
    return layers.from_matrix(layer, bfgs.apply(state.output, bfgs.apply(state.input, M).T).T)
