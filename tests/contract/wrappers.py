"""Checks: other transformations of Optax around the optimizer, beside it and behind it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from contract.optimizers import Optimizer, line_search_arguments
from contract.problem import BATCHES, alone, batch_of, initial, loss_fn, run, step_of
from contract.trees import close, zero

MASK = {"params": {"Dense_0": True, "scale": False}}


def chain(optimizer: Optimizer) -> None:
    """Among transformations that change nothing in total, two steps are those of it alone."""
    tx = optax.chain(optax.scale(2.0), optax.scale(0.5), optimizer.make(), optax.identity())
    step = jax.jit(step_of(optimizer, tx))
    results = run(tx, step, [(batch,) for batch in BATCHES[:2]], initial())
    for actual, expected in zip(results, alone(optimizer)[0], strict=False):
        close(actual[2], expected[2], "updates")


@functools.cache
def _frozen(optimizer: Optimizer) -> list:
    """The layer's updates when the scale is no parameter at all."""
    full, tx = initial(), optimizer.make()

    def loss_of_layer(params, *batch):
        return loss_fn({"params": {**full["params"], **params["params"]}}, *batch)

    step = jax.jit(step_of(optimizer, tx, loss_of_layer))
    layer = {"params": {"Dense_0": full["params"]["Dense_0"]}}
    results = run(tx, step, [(batch,) for batch in BATCHES[:2]], layer)
    return [updates["params"]["Dense_0"] for *_, updates in results]


def _is_frozen(optimizer: Optimizer, tx: Any) -> None:
    step = jax.jit(step_of(optimizer, tx))
    results = run(tx, step, [(batch,) for batch in BATCHES[:2]], initial())
    for (*_, updates), expected in zip(results, _frozen(optimizer), strict=True):
        close(updates["params"]["Dense_0"], expected, "updates")
        assert zero(updates["params"]["scale"]), "a frozen parameter moved"


def masked(optimizer: Optimizer) -> None:
    """With one parameter masked out and frozen, as if that parameter were a constant."""
    others = jax.tree.map(lambda mine: not mine, MASK)
    inner = optax.masked(optimizer.make(), MASK)
    _is_frozen(optimizer, optax.chain(inner, optax.masked(optax.set_to_zero(), others)))


def partition(optimizer: Optimizer) -> None:
    """The same by ``optax.partition``."""
    labels = jax.tree.map(lambda mine: "mine" if mine else "other", MASK)
    transforms = {"mine": optimizer.make(), "other": optax.set_to_zero()}
    _is_frozen(optimizer, optax.partition(transforms, labels))


@functools.cache
def _large_steps(optimizer: Optimizer) -> list:
    """Two steps on the mean gradient of two batches, with the extra arguments of the second."""
    tx = optimizer.make()
    step = jax.jit(step_of(optimizer, tx))
    return run(tx, step, [BATCHES[:2], (BATCHES[2], BATCHES[0])], initial())


def _accumulates(optimizer: Optimizer, tx: Any, get_state: Callable) -> None:
    step = jax.jit(step_of(optimizer, tx))
    feed = [(batch,) for batch in (*BATCHES, BATCHES[0])]
    results = run(tx, step, feed, initial())
    start = optimizer.make().init(initial())
    expected = _large_steps(optimizer)
    for k, (_, state, updates) in enumerate(results):
        steps = (k + 1) // 2
        close(get_state(state), expected[steps - 1][1] if steps else start, "states")
        if k % 2:
            close(updates, expected[steps - 1][2], "updates")
        else:
            assert zero(updates), "a step between moved"


def multi_steps(optimizer: Optimizer) -> None:
    """Every second step is that on the mean gradient, with the second's extra arguments."""
    tx = optax.MultiSteps(optimizer.make(), 2, accumulator_dtype=jnp.float64)
    _accumulates(optimizer, tx, lambda state: state.inner_opt_state)


def multi_steps_in_chain(optimizer: Optimizer) -> None:
    """The same with ``MultiSteps`` as one link of a chain."""
    tx = optax.MultiSteps(optimizer.make(), 2, accumulator_dtype=jnp.float64)
    tx = optax.chain(optax.identity(), tx)
    _accumulates(optimizer, tx, lambda state: state[1].inner_opt_state)


def apply_if_finite(optimizer: Optimizer) -> None:
    """A batch that makes everything NaN moves nothing, and the next step is as without it."""
    tx = optax.apply_if_finite(optimizer.make(), 2)
    step = jax.jit(step_of(optimizer, tx))
    feed = [(BATCHES[0],), (batch_of(1, jnp.nan),), (BATCHES[1],)]
    first, bad, second = run(tx, step, feed, initial())
    expected = alone(optimizer)[0]
    assert zero(bad[2]), "a step that is not finite moved"
    close(bad[1].inner_state, expected[0][1], "states after a NaN")
    close(first[2], expected[0][2], "updates")
    close(second[2], expected[1][2], "updates after a NaN")


def inject_hyperparams(optimizer: Optimizer) -> None:
    """The same steps, ``init`` under jit; and a learning rate of 0, set later, stops it."""
    injected = optax.inject_hyperparams(optimizer.factory, static_args=optimizer.static)
    tx = injected(**optimizer.numbers)
    step = jax.jit(step_of(optimizer, tx))
    feed = [(batch,) for batch in BATCHES[:2]]
    results = run(tx, step, feed, initial(), jitted_init=True)
    for actual, expected in zip(results, alone(optimizer)[0], strict=False):
        close(actual[2], expected[2], "updates", rtol=1e-5)
    params, state, _ = results[-1]
    rate = state.hyperparams["learning_rate"]
    state.hyperparams["learning_rate"] = jnp.zeros_like(rate)
    assert zero(step(params, state, BATCHES[2])[2]), "a learning rate set to 0 does not stop it"
    assert step._cache_size() == 1, "another hyperparameter compiles again"


def map_params(optimizer: Optimizer) -> None:
    """``optax.tree.map_params`` finds the parameters' shapes in the state, and only those."""
    tx, params = optimizer.make(), initial()
    state = tx.init(params)
    close(optax.tree.map_params(tx, lambda leaf: leaf, state), state, "states")

    def pair(leaf, p):
        if isinstance(leaf, optax.MaskedNode):
            return leaf
        assert leaf.shape == p.shape, f"a leaf of shape {leaf.shape} for a parameter's {p.shape}"
        return "parameter"

    marked = optax.tree.map_params(
        tx,
        pair,
        state,
        params,
        transform_non_params=lambda rest: jax.tree.map(lambda _: "other", rest),
        is_leaf=lambda node: isinstance(node, optax.MaskedNode),
    )
    assert set(jax.tree.leaves(marked)) <= {"parameter", "other"}, "a leaf was left out"
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(state)]
    for path, mark in zip(paths, jax.tree.leaves(marked), strict=True):
        factor = "layers" in path
        assert mark == "other" or not factor, f"{path} is no parameter"


def schedules(optimizer: Optimizer) -> None:
    """A learning rate that falls to 0 after two steps: the first two as without it, then none."""
    rate = optimizer.numbers["learning_rate"]
    numbers = {"learning_rate": lambda count: jnp.where(count < 2, rate, 0.0)}
    tx = dataclasses.replace(optimizer, numbers={**optimizer.numbers, **numbers}).make()
    step = jax.jit(step_of(optimizer, tx))
    results = run(tx, step, [(batch,) for batch in BATCHES], initial())
    for actual, expected in zip(results[:2], alone(optimizer)[0], strict=False):
        close(actual[2], expected[2], "updates")
    assert zero(results[2][2]), "a learning rate of 0 moves"


# --- those that change what a step is -------------------------------------------------------------


def flatten(optimizer: Optimizer) -> None:
    """All parameters as one vector."""
    tx, params = optax.flatten(optimizer.make()), initial()
    step = jax.jit(step_of(optimizer, tx))
    close(step(params, tx.init(params), BATCHES[0])[2], alone(optimizer)[0][0][2], "updates")


def inside_sam(optimizer: Optimizer) -> None:
    """As the outer optimizer of ``optax.contrib.sam``: the call alone."""
    tx, params = optax.contrib.sam(optimizer.make(), optax.sgd(0.05)), initial()
    jax.eval_shape(step_of(optimizer, tx), params, tx.init(params), BATCHES[0])


def line_search(optimizer: Optimizer) -> None:
    """Before a line search whose ``value_fn`` is a function of the parameters: the call alone."""
    search = optax.scale_by_backtracking_linesearch(3)
    tx, params = optax.chain(optimizer.make(), search), initial()
    more = line_search_arguments(loss_fn, params, *BATCHES[0])
    step = step_of(optimizer, tx, more=more)
    jax.eval_shape(step, params, tx.init(params), BATCHES[0])
