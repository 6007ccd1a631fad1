"""update_every: curvature in every k-th step only."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models import problem
from steps import batches_for, close, layers_of, step_of, types

import kfqn_optax as kfqn

METHODS = {
    "kbfgs": kfqn.kbfgs,
    "kbfgs_l": lambda *numbers, **options: kfqn.kbfgs_l(*numbers, memory_size=3, **options),
    "kfqn": kfqn.kfqn,
    "block": lambda *numbers, update_every=1: kfqn.block_kbfgs(
        *numbers, pairs=2, window=4, update_every=update_every
    ),
}


def kept_in_between(make, every, loss_fn, params, batches):
    """The same by hand: ``curvature_fn=None`` in the steps between."""
    tx = make(0.3, 0.3)

    @functools.partial(jax.jit, static_argnames="measured")
    def step(params, state, batch, measured):
        fn = kfqn.curvature_fn(loss_fn, params, *batch) if measured else None
        grads = jax.grad(loss_fn)(params, *batch)
        updates, state = tx.update(grads, state, params, curvature_fn=fn)
        return optax.apply_updates(params, updates), state

    states, state = [], tx.init(params)
    for i, batch in enumerate(batches):
        trust = optax.tree.get(state, "trust")
        in_doubt = trust is not None and bool(trust.doubt)
        params, state = step(params, state, batch, measured=i % every == 0 or in_doubt)
        states.append((params, layers_of(state)))
    return states


@pytest.mark.parametrize(
    ("method", "every"),
    [
        ("kbfgs", 2),
        pytest.param("kbfgs_l", 3, marks=pytest.mark.slow),
        ("kfqn", 3),
        ("block", 2),
    ],
)
def test_it_is_curvature_fn_none_in_the_steps_between(method, every):
    make = METHODS[method]
    loss_fn, params, *_ = problem()
    expected = kept_in_between(make, every, loss_fn, params, batches_for(params, count=5))
    tx = make(0.3, 0.3, update_every=every)
    step, state = step_of(tx, loss_fn), tx.init(params)
    before = types(state)
    for batch, (expected_params, expected_layers) in zip(
        batches_for(params, count=5), expected, strict=True
    ):
        params, state, _ = step(params, state, *batch)
        close(params, expected_params, 1e-10)
        close(layers_of(state), expected_layers, 1e-9)
    assert types(state) == before
    assert step._cache_size() == 1


def test_factors_change_in_every_kth_step_only():
    loss_fn, params, *_ = problem()
    tx = kfqn.kbfgs(0.3, 0.3, update_every=2)
    step, state = step_of(tx, loss_fn), tx.init(params)
    changed = []
    for batch in batches_for(params, count=5):
        old, (params, state, _) = layers_of(state), step(params, state, *batch)
        same = jax.tree.map(np.array_equal, old, layers_of(state))
        changed.append(not all(jax.tree.leaves(same)))
    assert changed == [True, False, True, False, True]


@pytest.mark.parametrize("method", [pytest.param("kbfgs", marks=pytest.mark.slow), "kfqn"])
def test_a_warm_start_is_not_left_waiting(method):
    """A of a warm start lies in the factor's place until a step makes the factor from it."""
    loss_fn, params, x, t = problem()
    tx = METHODS[method](0.3, 0.3, update_every=3)
    step, state = step_of(tx, loss_fn), tx.init(params)
    for batch in batches_for(params, count=2):
        params, state, _ = step(params, state, *batch)
    state = kfqn.warm_start(state, loss_fn, params, [(x, t)])
    _, warmed, updates = step(params, state, x, t)
    every = METHODS[method](0.3, 0.3)
    _, expected, expected_updates = step_of(every, loss_fn)(params, state, x, t)
    close(updates, expected_updates, 1e-10)
    close(layers_of(warmed), layers_of(expected), 1e-9)


def test_a_traced_number_serves_too():
    loss_fn, params, *_ = problem()
    tx = optax.inject_hyperparams(kfqn.scale_by_kbfgs)(0.3, 0.3, update_every=2)
    plain = kfqn.scale_by_kbfgs(0.3, 0.3, update_every=2)
    state, expected = tx.init(params), plain.init(params)
    step, plain_step = step_of(tx, loss_fn), step_of(plain, loss_fn)
    for batch in batches_for(params, count=3):
        _, state, _ = step(params, state, *batch)
        _, expected, _ = plain_step(params, expected, *batch)
    close(layers_of(state), layers_of(expected), 1e-9)


def test_one_is_the_published_method():
    """No branch is compiled for it: the same program, bit for bit."""
    loss_fn, params, x, t = problem()
    results = []
    for options in [{}, {"update_every": 1}, {"update_every": jnp.asarray(1)}]:
        tx = kfqn.kbfgs(0.3, 0.3, **options)
        lowered = step_of(tx, loss_fn).lower(params, tx.init(params), x, t)
        results.append(lowered.as_text())
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("method", ["kbfgs", "block_kbfgs"])
@pytest.mark.parametrize("every", [0, -1, 1.5, np.inf])
def test_out_of_range(method, every):
    with pytest.raises(ValueError, match="update_every must be a whole number of at least 1"):
        getattr(kfqn, method)(0.3, 0.3, update_every=every)


def measured_steps(tx, counts):
    """In which of these steps ``tx`` changes its factors, one compiled program for all."""
    loss_fn, params, x, t = problem()
    start, step = tx.init(params), step_of(tx, loss_fn)

    def measures(count):
        (state,) = [s for s in jax.tree.leaves(start, is_leaf=is_block) if is_block(s)]
        counted = state._replace(count=jnp.asarray(count, jnp.int32))
        begun = jax.tree.map(lambda s: counted if is_block(s) else s, start, is_leaf=is_block)
        _, after, _ = step(params, begun, x, t)
        return int(optax.tree.get(after, "trust").steps) == 1

    seen = [count for count in counts if measures(count)]
    assert step._cache_size() == 1
    return seen


def is_block(state):
    return hasattr(state, "trust") and hasattr(state, "averaged")


def test_block_kbfgs_measures_less_often_after_a_while():
    """Unless told otherwise; and as a schedule tells it, whose values below 1 are as 1."""
    counts = [0, 1, 2, 197, 198, 199, 200, 201, 202, 203, 204, 206, 1000, 1001]
    by_itself = measured_steps(kfqn.block_kbfgs(pairs=2, window=4), counts)
    assert by_itself == [0, 1, 2, 197, 198, 199, 200, 204, 1000]
    schedule = optax.constant_schedule(0)
    told = kfqn.block_kbfgs(pairs=2, window=4, update_every=schedule)
    assert measured_steps(told, counts) == counts
    told = kfqn.block_kbfgs(pairs=2, window=4, update_every=lambda n: jnp.where(n < 199, 1, 3))
    assert measured_steps(told, counts) == [0, 1, 2, 197, 198, 201, 204]
    assert measured_steps(kfqn.block_kbfgs(pairs=2, window=4, update_every=1), counts) == counts


def test_a_traced_number_serves_block_kbfgs_too():
    tx = optax.inject_hyperparams(
        kfqn.scale_by_block_kbfgs, static_args=("pairs", "window", "learning_rate")
    )(0.5, 0.03, pairs=2, window=4, update_every=3)
    loss_fn, params, *_ = problem()
    state, step, changed = tx.init(params), step_of(tx, loss_fn), []
    for batch in batches_for(params, count=4):
        before = int(optax.tree.get(state, "trust").steps)
        _, state, _ = step(params, state, *batch)
        changed.append(int(optax.tree.get(state, "trust").steps) > before)
    assert changed == [True, False, False, True]


def test_block_kbfgs_measures_again_where_the_last_step_was_in_doubt():
    """After a step that was not taken, and where the loss has risen between two measurements."""
    loss_fn, params, *_ = problem()
    tx = kfqn.scale_by_block_kbfgs(0.5, pairs=2, window=4, update_every=100)
    step, state = step_of(tx, loss_fn), tx.init(params)
    batches = list(batches_for(params, count=3))
    params, state, _ = step(params, state, *batches[0])
    assert not state.trust.doubt
    _, kept, _ = step(params, state, *batches[1])
    assert int(kept.trust.steps) == 1
    far = state.trust._replace(kappa=state.trust.kappa * 1e-6, radius=state.trust.radius * 1e9)
    due = state._replace(count=jnp.zeros((), jnp.int32))
    _, refused, _ = step(params, due._replace(trust=far), *batches[1])
    assert int(refused.trust.rejected) == 1
    higher = state.trust._replace(expected=state.trust.expected / 100)
    _, risen, _ = step(params, due._replace(trust=higher), *batches[1])
    assert int(risen.trust.rejected) == 0
    for doubtful in (refused, risen):
        assert doubtful.trust.doubt
        _, after, _ = step(params, doubtful, *batches[2])
        assert int(after.trust.steps) == 3
    assert step._cache_size() == 1
