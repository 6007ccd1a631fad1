"""Checks: what Optax asks of contributed optimizers, by its own tests."""

import functools
import importlib
import inspect
import itertools
import sys
import unittest
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import optax
from absl.testing import parameterized

from contract.optimizers import Optimizer

TARGETS = ("parabola", "rosenbrock", "matrix_parabola", "mixed_tensor_target")
DTYPES = {
    "test_optimizers": ["float32"],
    "test_state_shape_dtype_shard_stability": ["float16", "bfloat16", "float32", "float64"],
}  # of the others: bfloat16 and float32


@functools.cache
def common_tests() -> tuple[Any, dict[str, Callable]]:
    """Optax's own tests, as functions with the optimizer as an argument."""
    name = "optax.contrib._common_test"
    with mock.patch.object(parameterized, "product", return_value=lambda test: test):
        module = importlib.import_module(name)
        sys.modules.pop(name)
    case = module.ContribTest
    return module, {n: getattr(case, n) for n in dir(case) if n.startswith("test_")}


def common_test(optimizer: Optimizer) -> None:
    """The tests of ``optax/contrib/_common_test.py``, as they are.

    Their parameters are bare arrays, no layers: our methods act as their fallback.
    """
    _, tests = common_tests()
    for name in tests:
        one_common_test(optimizer, name)


def one_common_test(optimizer: Optimizer, name: str) -> None:
    """One of them, with everything it is to be tried with."""
    module, tests = common_tests()
    wanted = inspect.signature(tests[name]).parameters
    given = {
        "opt_name": optimizer.name,
        "opt_kwargs": optimizer.numbers,
        "wrapper_name": None,
        "wrapper_kwargs": None,
    }
    options = {
        "target": [getattr(module, f"_setup_{target}") for target in TARGETS],
        "dtype": [getattr(jnp, dtype) for dtype in DTYPES.get(name, ["bfloat16", "float32"])],
        "wrap": [False],
    }
    names = [key for key in options if key in wanted]
    choices = [
        dict(zip(names, values, strict=True))
        for values in itertools.product(*(options[key] for key in names))
    ]
    factory = optimizer.factory
    if name.startswith("test_optimizers_accept_learning_rate_schedule"):

        def factory(learning_rate: optax.ScalarOrSchedule, **numbers):
            return optimizer.factory(learning_rate, **numbers)

    x64 = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", False)
    try:
        with mock.patch.object(module, "_get_opt_factory", return_value=factory):
            for choice in choices:
                arguments = {k: v for k, v in (given | choice).items() if k in wanted}
                getattr(module.ContribTest(name), name)(**arguments)
    except unittest.SkipTest as skip:
        raise AssertionError(f"skipped: {skip}") from skip
    finally:
        jax.config.update("jax_enable_x64", x64)
