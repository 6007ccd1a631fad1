"""Every number of the method is checked, with a message that says what to do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfqn_optax as kfqn


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"learning_rate": -0.1}, ValueError, "learning_rate must be at least 0, got -0.1"),
        ({"learning_rate": float("nan")}, ValueError, "learning_rate must be at least 0, got nan"),
        ({"learning_rate": "0.3"}, TypeError, "learning_rate must be a number at least 0"),
        ({"learning_rate": None}, TypeError, "learning_rate must be a number"),
        ({"learning_rate": np.ones(3)}, ValueError, r"one number, got an array of shape \(3,\)"),
        ({"learning_rate": 1j}, TypeError, "learning_rate must be a real number"),
        ({"learning_rate": object()}, TypeError, "learning_rate must be a number at least 0, got"),
        ({"learning_rate": True}, TypeError, "learning_rate must be a number"),
        ({"damping": 0.0}, ValueError, "damping must be above 0, got 0"),
        ({"damping": -1}, ValueError, "damping must be above 0, got -1"),
        ({"damping": float("inf")}, ValueError, "damping must be above 0, got inf"),
        ({"momentum": 1.0}, ValueError, "momentum must be at least 0 and below 1, got 1"),
        ({"momentum": lambda count: 0.9}, TypeError, "momentum must be a number, not the function"),
        ({"factor_decay": 1.5}, ValueError, "factor_decay must be at least 0 and below 1, got 1.5"),
        ({"pair_decay": -0.1}, ValueError, "pair_decay must be at least 0 and below 1, got -0.1"),
        ({"powell": 0.0}, ValueError, "powell must be between 0 and 1, both excluded, got 0"),
        ({"powell": 1.0}, ValueError, "powell must be between 0 and 1, both excluded, got 1"),
        ({"weight_decay": -1e-5}, ValueError, "weight_decay must be at least 0, got -1e-05"),
        ({"curvature_tolerance": -1.0}, ValueError, "curvature_tolerance must be at least 0"),
        ({"layers": ["Dense_0"]}, TypeError, "layers must hold what kfqn_optax.find_layers"),
    ],
)  # fmt: skip
def test_out_of_range(options, error, message):
    with pytest.raises(error, match=message):
        kfqn.kbfgs(**({"learning_rate": 0.3} | options)).init({"kernel": jnp.ones((2, 2))})


@pytest.mark.parametrize(
    "value", [0.3, np.float32(0.3), jnp.asarray(0.3), optax.constant_schedule(0.3), 1]
)
def test_numbers_arrays_and_schedules_are_welcome(value):
    kfqn.kbfgs(value, damping=value).init({"kernel": jnp.ones((2, 2))})


def test_traced_numbers_are_not_judged():
    """`optax.inject_hyperparams` builds the transformation inside the traced update."""

    @jax.jit
    def build(damping):
        return kfqn.kbfgs(0.3, damping).init({"kernel": jnp.ones((2, 2))})

    build(0.3)
