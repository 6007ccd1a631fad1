"""Targets drawn from a model's own output distribution, for the loss that a natural gradient wants.

Each is the distribution whose negative log-likelihood is the loss named. What is drawn is a
constant to differentiation.
"""

import jax
import jax.numpy as jnp


def sample_bernoulli(key: jax.Array, logits: jax.Array) -> jax.Array:
    """Zeros and ones, for binary cross-entropy with logits.

    Args:
        key: a random key.
        logits: of any shape.

    Returns:
        Draws in the shape and dtype of ``logits``.
    """
    logits = jax.lax.stop_gradient(logits)
    return jax.random.bernoulli(key, jax.nn.sigmoid(logits)).astype(logits.dtype)


def sample_categorical(key: jax.Array, logits: jax.Array) -> jax.Array:
    """Classes, for softmax cross-entropy with integer labels.

    Args:
        key: a random key.
        logits: [..., classes].

    Returns:
        Draws, int32 [...].
    """
    drawn = jax.random.categorical(key, jax.lax.stop_gradient(logits))
    return drawn.astype(jnp.int32)


def sample_normal(key: jax.Array, means: jax.Array, scale: float = 1.0) -> jax.Array:
    """Normal numbers around the outputs, for a squared error.

    Args:
        key: a random key.
        means: the outputs, of any shape.
        scale: standard deviation: 1 for half the squared error, summed over the outputs of an
            example; ``sqrt(1 / (2 c))`` for c times the squared error.

    Returns:
        Draws in the shape and dtype of ``means``.
    """
    means = jax.lax.stop_gradient(means)
    return means + scale * jax.random.normal(key, means.shape, means.dtype)
