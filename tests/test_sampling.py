"""Targets drawn from a model's own output distribution."""

import jax
import jax.numpy as jnp
import numpy as np

import kfqn_optax as kfqn


def test_targets_are_drawn_from_the_output_distribution_and_constant():
    logits = jnp.asarray([[0.3, -1.0, 2.0]])
    many = jnp.tile(logits, (40_000, 1))
    keys = jax.random.split(jax.random.key(0), 3)
    drawn = kfqn.sample_bernoulli(keys[0], many)
    assert drawn.dtype == logits.dtype
    np.testing.assert_allclose(drawn.mean(axis=0), jax.nn.sigmoid(logits[0]), atol=0.01)
    shares = np.bincount(kfqn.sample_categorical(keys[1], many), minlength=3) / len(many)
    np.testing.assert_allclose(shares, jax.nn.softmax(logits[0]), atol=0.01)
    normal = kfqn.sample_normal(keys[2], many, scale=0.5)
    np.testing.assert_allclose(normal.mean(axis=0), logits[0], atol=0.01)
    np.testing.assert_allclose(normal.std(axis=0), 0.5, atol=0.01)
    for sample in (kfqn.sample_bernoulli, kfqn.sample_normal):
        slope = jax.grad(lambda z, sample=sample: sample(keys[0], z).sum())(logits)
        np.testing.assert_array_equal(slope, 0)
