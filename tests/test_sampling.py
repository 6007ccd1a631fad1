"""Targets drawn from a model's own output distribution."""

import jax
import jax.numpy as jnp
import numpy as np

import kfqn_optax as kfqn


def test_targets_are_drawn_from_the_output_distribution_and_constant():
    logits = jnp.asarray([[0.3, -1.0, 2.0]])

    @jax.jit
    def draw(logits):
        many = jnp.tile(logits, (40_000, 1))
        keys = jax.random.split(jax.random.key(0), 3)
        return (
            kfqn.sample_bernoulli(keys[0], many),
            kfqn.sample_categorical(keys[1], many),
            kfqn.sample_normal(keys[2], many, scale=0.5),
        )

    @jax.jit
    @jax.grad
    def slope(logits):
        binary, _, normal = draw(logits)
        return binary.sum() + normal.sum()

    binary, classes, normal = map(np.asarray, draw(logits))
    assert binary.dtype == normal.dtype == logits.dtype
    assert classes.dtype == np.int32
    chances = np.exp(logits[0])
    np.testing.assert_allclose(binary.mean(axis=0), chances / (1 + chances), atol=0.01)
    shares = np.bincount(classes, minlength=3) / len(classes)
    np.testing.assert_allclose(shares, chances / chances.sum(), atol=0.01)
    np.testing.assert_allclose(normal.mean(axis=0), logits[0], atol=0.01)
    np.testing.assert_allclose(normal.std(axis=0), 0.5, atol=0.01)
    np.testing.assert_array_equal(slope(logits), 0)
