"""Networks and losses against NumPy."""

import jax
import numpy as np
import pytest

from kfqn_optax.experiment.problems import squared_norm
from kfqn_optax.experiment.problems.autoencoder import AUTOENCODERS, AutoencoderProblem

WIDTHS = (12, 9, 3, 9, 12)


def _numpy_forward(params, images):
    """The same network in float64: relu after every layer but the code and the output."""
    layers = params["params"]
    x = np.asarray(images, np.float64)
    for number in range(len(layers)):
        layer = layers[f"Dense_{number}"]
        x = x @ np.asarray(layer["kernel"], np.float64) + np.asarray(layer["bias"], np.float64)
        if number not in (len(layers) // 2 - 1, len(layers) - 1):
            x = np.maximum(x, 0)
    return x


@pytest.fixture
def images():
    return np.random.default_rng(0).uniform(size=(5, 12)).astype(np.float32)


def test_widths():
    assert AUTOENCODERS["mnist"].widths == (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
    assert AUTOENCODERS["fashion_mnist"] == AUTOENCODERS["mnist"]
    assert AUTOENCODERS["faces"].widths == (625, 2000, 1000, 500, 30, 500, 1000, 2000, 625)
    half = (784, 400, 200, 100, 50, 25)
    assert AUTOENCODERS["curves"].widths == (*half, 6, *reversed(half))
    assert [name for name, problem in AUTOENCODERS.items() if not problem.binary] == ["faces"]


def test_initial_parameters_fill_their_bounds():
    variables, _ = AutoencoderProblem((100, 400, 20, 400, 100), binary=True).init(seed=3)
    params = variables["params"]
    for number, (fan_in, units) in enumerate([(100, 400), (400, 20), (20, 400), (400, 100)]):
        bound = fan_in**-0.5
        layer = params[f"Dense_{number}"]
        assert layer["kernel"].shape == (fan_in, units)
        for values in (np.asarray(layer["kernel"]), np.asarray(layer["bias"])):
            assert values.dtype == np.float32
            assert np.all(np.abs(values) <= bound)
            assert values.max() > 0.75 * bound
            assert values.min() < -0.75 * bound
        # A uniform law on [-b, b] has the standard deviation b / sqrt(3).
        np.testing.assert_allclose(layer["kernel"].std(), bound / np.sqrt(3), rtol=0.03)


def test_seed_decides_the_parameters():
    problem = AutoencoderProblem(WIDTHS, binary=True)
    one, same, other = (problem.init(seed)[0] for seed in (1, 1, 2))
    assert jax.tree.all(jax.tree.map(np.array_equal, one, same))
    assert not any(jax.tree.leaves(jax.tree.map(np.array_equal, one, other)))


def test_binary_errors(images):
    problem = AutoencoderProblem(WIDTHS, binary=True)
    params = jax.tree.map(lambda leaf: 3 * leaf, problem.init(0)[0])
    logits = _numpy_forward(params, images)
    p = 1 / (1 + np.exp(-logits))
    cross_entropy = -(images * np.log(p) + (1 - images) * np.log(1 - p)).sum(axis=1)

    losses, squares = problem.errors(params, images)
    np.testing.assert_allclose(losses, cross_entropy, rtol=1e-5)
    np.testing.assert_allclose(squares, ((p - images) ** 2).mean(axis=1), rtol=1e-5)
    np.testing.assert_allclose(problem.loss(params, images)[0], cross_entropy.mean(), rtol=1e-5)
    assert losses.dtype == squares.dtype == np.float32


def test_squared_errors(images):
    problem = AutoencoderProblem(WIDTHS, binary=False)
    params = jax.tree.map(lambda leaf: 3 * leaf, problem.init(0)[0])
    squared = (_numpy_forward(params, images) - images) ** 2

    losses, squares = problem.errors(params, images)
    np.testing.assert_allclose(losses, 0.5 * squared.sum(axis=1), rtol=1e-5)
    np.testing.assert_allclose(squares, squared.mean(axis=1), rtol=1e-5)
    np.testing.assert_allclose(problem.loss(params, images)[0], losses.mean(), rtol=1e-6)


def test_squared_norm_counts_biases():
    params, _ = AutoencoderProblem(WIDTHS, binary=True).init(0)
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(params)]
    assert len(leaves) == 8
    np.testing.assert_allclose(squared_norm(params), sum((x**2).sum() for x in leaves), rtol=1e-6)


@pytest.mark.parametrize("binary", [True, False])
def test_a_key_draws_the_targets_from_the_outputs(images, binary):
    """The mean gradient at the outputs vanishes: that of the drawn loss has mean 0 there."""
    problem = AutoencoderProblem((12, 2, 12), binary)
    params, _ = problem.init(0)
    many = np.repeat(images[:1], 4000, axis=0)
    drawn = jax.jit(jax.grad(lambda p, key: problem.loss(p, many, (), key)[0]))
    bias = drawn(params, jax.random.key(1))["params"]["Dense_1"]["bias"]
    plain = jax.grad(lambda p: problem.loss(p, many)[0])(params)["params"]["Dense_1"]["bias"]
    assert np.abs(bias).max() < 0.06 < np.abs(plain).max()
    assert np.abs(bias).max() > 0
