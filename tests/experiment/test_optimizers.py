"""A config's optimizer does the step that its name promises, weight decay included."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from kfqn_optax.experiment import optimizers

W, G, TAU, LR = 0.5, 2.0, 0.1, 0.01
DECAYED = G + TAU * W  # 2.05


def _two_steps(name):
    config = tiny.config(optimizer=name, learning_rate=LR, weight_decay=TAU, momentum=0.7)
    tx, takes_curvature = optimizers.make_optimizer(config)
    assert not takes_curvature
    params = jnp.full((3,), W, jnp.float32)
    grads = jnp.full((3,), G, jnp.float32)
    state = tx.init(params)
    first, state = tx.update(grads, state, params)
    second, _ = tx.update(grads, state, params)
    return first[0], second[0]


def test_sgdm_is_heavy_ball():
    first, second = _two_steps("sgdm")
    np.testing.assert_allclose(first, -LR * DECAYED, rtol=1e-6)
    np.testing.assert_allclose(second, -LR * 1.7 * DECAYED, rtol=1e-6)


def test_adam():
    # At the first steps with a constant gradient, Adam's corrected averages are g and g^2.
    first, second = _two_steps("adam")
    np.testing.assert_allclose([first, second], [-LR, -LR], rtol=1e-4)


def test_rmsprop():
    first, second = _two_steps("rmsprop")
    np.testing.assert_allclose(first, -LR / np.sqrt(0.1), rtol=1e-4)
    np.testing.assert_allclose(second, -LR / np.sqrt(0.19), rtol=1e-4)


@pytest.mark.parametrize("name", ["adam", "rmsprop"])
def test_weight_decay_is_part_of_the_gradient(name):
    """Both divide by the gradient's size; with g = 0 the decay alone makes a step as large."""
    config = tiny.config(optimizer=name, learning_rate=LR, weight_decay=TAU)
    tx = optimizers.make_optimizer(config).transformation
    params = jnp.full((3,), W, jnp.float32)
    updates, _ = tx.update(jnp.zeros_like(params), tx.init(params), params)
    np.testing.assert_allclose(updates, -LR / np.sqrt(1 if name == "adam" else 0.1), rtol=1e-4)


def test_kbfgs_gets_every_number(monkeypatch):
    calls = []
    monkeypatch.setattr(optimizers.kfqn, "kbfgs", lambda *a, **k: calls.append((a, k)))
    numbers = {
        "momentum": 0.11,
        "weight_decay": 0.12,
        "factor_decay": 0.13,
        "pair_decay": 0.14,
        "powell": 0.15,
        "norm_constraint": 0.18,
    }
    config = tiny.config(optimizer="kbfgs", learning_rate=0.16, damping=0.17, **numbers)
    assert optimizers.make_optimizer(config).takes_curvature
    config.norm_constraint = 0.0
    optimizers.make_optimizer(config)
    unlimited = numbers | {"norm_constraint": None}
    assert calls == [((0.16, 0.17), numbers), ((0.16, 0.17), unlimited)]
