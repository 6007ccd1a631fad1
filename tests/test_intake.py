"""The start of the input factors: many sizes, few compiled inverses."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import relative

from kfqn_optax import intake, inverse, layer_state
from kfqn_optax.layer_state import RUNNING
from kfqn_optax.layers import dense
from kfqn_optax.options import Options


def test_each_layer_gets_the_inverse_of_its_own_matrix():
    """Sizes that share an inverse by padding, and some that do not."""
    options, rng = Options(0.1), np.random.default_rng(0)
    layers, states = [], {}
    for path, d in {"a": 7, "b": 40, "c": 38, "d": 1, "e": 7}.items():
        x = rng.normal(size=(d, 2 * d))
        layers.append(dense(path, (d, 3), bias=False))
        state = layer_state.init(layers[-1], jnp.float64, options)
        states[path] = layer_state.warm(state, jnp.asarray(x @ x.T / d), jnp.ones(()))
    running = {path: state._replace(stage=jnp.asarray(RUNNING)) for path, state in states.items()}
    before = states | {"e": running["e"]}  # layer e is past its start and keeps what it has
    made, _ = intake.start(layers, before, running, {}, options, jnp.sqrt(0.3))
    for path in "abcd":
        moment = np.asarray(states[path].input_moment)
        expected = np.linalg.inv(moment + np.sqrt(0.3) * np.eye(len(moment)))
        assert relative(made[path], expected) < 1e-10
    np.testing.assert_array_equal(made["e"], states["e"].input)


def test_a_warm_start_that_is_not_stored_comes_before_the_batch():
    """It lies in the factor's place, and the first batch does not enter; without it, that does."""
    options, rng = Options(0.1, matrix_free=True), np.random.default_rng(0)
    layers = [dense(path, (3, 2), bias=False) for path in ("warm", "cold")]
    A, batch = (jnp.asarray(x @ x.T) for x in rng.normal(size=(2, 3, 5)))
    states = {layer.path: layer_state.init(layer, jnp.float64, options) for layer in layers}
    states["warm"] = layer_state.warm(states["warm"], A, jnp.ones(()))
    begun = {path: state._replace(stage=jnp.asarray(RUNNING)) for path, state in states.items()}
    moments = {path: batch for path in states}
    made, _ = intake.start(layers, states, begun, moments, options, jnp.sqrt(0.3))
    for path, moment in {"warm": A, "cold": batch}.items():
        expected = np.linalg.inv(np.asarray(moment) + np.sqrt(0.3) * np.eye(3))
        assert relative(made[path], expected) < 1e-10, path


@pytest.mark.parametrize(("times", "besides"), [(4, 0), (1.3, 300**3)])
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3000)), min_size=1, max_size=12))
def test_padding_costs_no_more_than_it_may(times, besides, sizes):
    shapes = {str(i): size for i, size in enumerate(sizes)}
    groups = inverse._share(shapes, times, besides)
    assert sorted(path for group in groups for path in group) == sorted(shapes)
    for group in groups:
        own = sum(shapes[path][0] * shapes[path][1] ** 3 for path in group)
        largest = max(shapes[path][1] for path in group)
        assert sum(shapes[path][0] for path in group) * largest**3 <= times * own + besides
