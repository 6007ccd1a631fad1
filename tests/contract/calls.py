"""Checks: ``init`` and ``update`` under transformations of JAX, and with unusual arguments."""

import warnings

import jax
import jax.numpy as jnp
import optax

from contract.optimizers import Optimizer
from contract.problem import BATCHES, alone, batch_of, initial, loss_fn, step_of
from contract.trees import close, finite, types, zero


def scan(optimizer: Optimizer) -> None:
    """All steps in one ``lax.scan`` are the steps one by one."""
    tx, params = optimizer.make(), initial()
    step = step_of(optimizer, tx)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *BATCHES)
    body = lambda carry, batch: (step(*carry, batch)[:2], None)  # noqa: E731
    carry, _ = jax.jit(lambda carry: jax.lax.scan(body, carry, stacked))((params, tx.init(params)))
    close(carry, alone(optimizer)[0][-1][:2], "results")


def donation(optimizer: Optimizer) -> None:
    """Parameters and state may be donated: every array is used, and nothing changes."""
    tx, params = optimizer.make(), jax.tree.map(jnp.copy, initial())
    state = tx.init(params)
    step = jax.jit(step_of(optimizer, tx), donate_argnums=(0, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a donated buffer that is of no use is a warning
        result = step(params, state, BATCHES[0])
    kept = [leaf for leaf in jax.tree.leaves((params, state)) if not leaf.is_deleted()]
    assert not any(leaf.ndim for leaf in kept), "an array was not donated"
    close(result, alone(optimizer)[0][0], "results")


def one_program(optimizer: Optimizer) -> None:
    """The first step and all later ones, and a run started anew, are one program."""
    results, programs = alone(optimizer)
    assert programs == 1, f"{programs} programs for {len(results)} steps"
    start = optimizer.make().init(initial())
    assert types(start) == types(results[-1][1]), "the state changes its types"


def cond(optimizer: Optimizer) -> None:
    """In ``lax.cond``, a step or none: types stay, in four precisions, whatever the loss is in."""
    tx = optimizer.make()
    for dtype in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64):
        params, batch = initial(dtype), batch_of(0, dtype=dtype)
        state = tx.init(params)
        other = jnp.bfloat16 if dtype == jnp.float16 else jnp.float16

        def in_other(params, *batch, other=other):
            return loss_fn(params, *batch).astype(other)

        step = step_of(optimizer, tx, in_other)

        def maybe(params, state, step=step, batch=batch):
            taken = lambda: step(params, state, batch)[:2]  # noqa: E731
            return jax.lax.cond(jnp.sum(batch[0]) > 0, taken, lambda: (params, state))

        after = jax.eval_shape(maybe, params, state)
        assert types(after) == types((params, state)), f"types change in {jnp.dtype(dtype)}"
        updates = jax.eval_shape(step, params, state, batch)[2]
        assert types(updates) == types(params), f"updates are not in {jnp.dtype(dtype)}"


def shapes(optimizer: Optimizer) -> None:
    """``init`` needs shapes and dtypes only."""
    tx, params = optimizer.make(), initial()
    structs = jax.eval_shape(lambda: params)
    expected = tx.init(params)
    assert types(jax.eval_shape(tx.init, params)) == types(expected), "abstract init differs"
    close(tx.init(structs), expected, "states")


def unknown_arguments(optimizer: Optimizer) -> None:
    """Extra arguments that mean nothing to it change nothing."""
    tx, params = optimizer.make(), initial()
    more = {"unexpected_by_everybody": 1, "another": jnp.ones(3)}
    step = jax.jit(step_of(optimizer, tx, more=more))
    close(step(params, tx.init(params), BATCHES[0]), alone(optimizer)[0][0], "results")


def zero_gradients(optimizer: Optimizer) -> None:
    """Fifty steps of zero gradient move nothing; real steps after them are finite and move."""
    tx, params = optimizer.make(), initial()
    step = jax.jit(step_of(optimizer, tx))
    state = tx.init(params)
    for seed in range(50):
        after, state, updates = step(params, state, batch_of(seed % 4, 0.0))
        assert zero(updates), "a zero gradient moves"
    close(after, params, "parameters", rtol=0)
    after = params
    for _ in range(4):
        after, state, updates = step(after, state, BATCHES[0])
        assert finite((state, updates)), "not finite afterwards"
    assert not zero(optax.tree.sub(after, params)), "stuck afterwards"
