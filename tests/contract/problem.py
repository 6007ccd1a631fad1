"""The problem of all checks, and the steps that an optimizer takes on it.

The model is small: one dense layer, and before it a scale that is no layer. A batch has a weight,
so that a gradient can be zero or not finite.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from contract.optimizers import Optimizer


class Model(nn.Module):
    """One layer, and one parameter that is none."""

    dtype: Any

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (1, 3), self.dtype)
        return jnp.tanh(nn.Dense(2, dtype=self.dtype, param_dtype=self.dtype)(x * scale))


def loss_fn(params, x, targets, weight):
    out = Model(x.dtype).apply(params, x)
    return weight * jnp.mean(jnp.sum((out - targets) ** 2, axis=-1))


def initial(dtype: Any = jnp.float64) -> Any:
    return Model(dtype).init(jax.random.key(0), jnp.ones((8, 3), dtype))


@functools.cache
def batch_of(seed: int, weight: float = 1.0, dtype: Any = jnp.float64) -> tuple[jax.Array, ...]:
    """Eight inputs and targets, and the weight."""
    rng = np.random.default_rng(seed)
    arrays = rng.normal(size=(8, 3)), rng.uniform(size=(8, 2)), weight
    return tuple(jnp.asarray(a, dtype) for a in arrays)


BATCHES = [batch_of(0), batch_of(1), batch_of(2)]


def step_of(optimizer: Optimizer, tx: Any, loss_fn: Callable = loss_fn, more: Any = None):
    """A train step: the gradient's mean over some batches, the extra arguments of the last."""

    def step(params, state, *batches):
        each = [jax.grad(loss_fn)(params, *batch) for batch in batches]
        grads = jax.tree.map(lambda *g: sum(g) / len(g), *each)
        extra = optimizer.extra(loss_fn, params, *batches[-1]) | (more or {})
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state, updates

    return step


def run(tx: Any, step: Callable, feed: list, params: Any, jitted_init: bool = False) -> list:
    """Parameters, state and updates after each step."""
    results = [(params, (jax.jit(tx.init) if jitted_init else tx.init)(params), None)]
    for batches in feed:
        results.append(step(*results[-1][:2], *batches))
    return results[1:]


@functools.cache
def alone(optimizer: Optimizer) -> tuple[list, int]:
    """What the optimizer does by itself on `BATCHES`, and the number of programs compiled."""
    tx = optimizer.make()
    step = jax.jit(step_of(optimizer, tx))
    results = run(tx, step, [(batch,) for batch in BATCHES], initial())
    return results, step._cache_size()
