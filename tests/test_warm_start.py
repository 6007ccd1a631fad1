"""A averaged over whole batches at the initial weights, put into any state that holds ours."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models import problem, relative

import kfqn_optax as kfqn
from kfqn_optax.layer_state import RUNNING, WARM

D0, D1 = "params/Dense_0", "params/Dense_1"


def batches_of(sizes, seed=0, d_in=5, d_out=3):
    rng = np.random.default_rng(seed)
    for size in sizes:
        yield rng.normal(size=(size, d_in)), rng.normal(size=(size, d_out))


def explicit(params, inputs):
    """A of both layers of the small net, over all examples at once."""
    layer, inputs = jax.tree.map(np.asarray, (params["params"]["Dense_0"], inputs))
    a = np.hstack([inputs, np.ones((len(inputs), 1))])
    hidden = np.maximum(inputs @ layer["kernel"] + layer["bias"], 0)
    b = np.hstack([hidden, np.ones((len(inputs), 1))])
    return {D0: a.T @ a / len(a), D1: b.T @ b / len(b)}


def ours(state):
    return optax.tree.get(state, "layers")


@pytest.mark.parametrize("sizes", [[4], [6, 6, 6], [1, 7, 3]], ids=str)
def test_the_average_weighs_examples_alike(sizes):
    loss_fn, params, *_ = problem()
    tx = kfqn.kbfgs(0.1)
    before = tx.init(params)
    after = kfqn.warm_start(before, loss_fn, params, batches_of(sizes))
    expected = explicit(params, np.concatenate([x for x, _ in batches_of(sizes)]))
    for path, layer in ours(after).items():
        assert relative(layer.input_moment, expected[path]) < 1e-12
        assert int(layer.stage) == WARM
        np.testing.assert_array_equal(layer.input, ours(before)[path].input)
    assert jax.tree.structure(after) == jax.tree.structure(before)
    assert jax.tree.map(lambda v: (v.shape, v.dtype), after) == jax.tree.map(
        lambda v: (v.shape, v.dtype), before
    )


def test_the_first_step_inverts_it_and_keeps_its_own_batch_out():
    loss_fn, params, x, targets = problem()
    tx = kfqn.kbfgs(0.0, optax.linear_schedule(0.04, 1.0, 10))
    state = kfqn.warm_start(tx.init(params), loss_fn, params, batches_of([6, 6]))
    expected = explicit(params, np.concatenate([x for x, _ in batches_of([6, 6])]))
    own = explicit(params, np.asarray(x))

    @jax.jit
    def step(state):
        grads = jax.tree.map(jnp.ones_like, params)
        fn = kfqn.curvature_fn(loss_fn, params, x, targets)
        return tx.update(grads, state, params, curvature_fn=fn)[1]

    first = step(state)
    for path, layer in ours(first).items():
        A, mean = expected[path], own[path][-1]  # the row of the constant 1 is the mean input
        damped = A + 0.2 * np.eye(len(A))
        s = np.linalg.solve(damped, mean)
        np.testing.assert_array_equal(layer.input_moment, ours(state)[path].input_moment)
        assert int(layer.stage) == RUNNING
        # After its BFGS update with an exact pair the inverse is still the inverse.
        assert relative(layer.input @ (damped @ s), s) < 1e-7
        assert relative(layer.input @ damped, np.eye(len(A))) < 1e-6
    for path, layer in ours(step(first)).items():
        averaged = 0.9 * expected[path] + 0.1 * own[path]
        assert relative(layer.input_moment, averaged) < 1e-12


def test_factors_that_keep_pairs_have_nothing_to_start_from():
    loss_fn, params, *_ = problem()
    before = kfqn.kfqn(0.1, input_memory=2).init(params)
    after = kfqn.warm_start(before, loss_fn, params, batches_of([4]))
    jax.tree.map(np.testing.assert_array_equal, after, before)


def optimizers():
    plain = kfqn.kbfgs(0.1)
    yield "scale_by_kbfgs", kfqn.scale_by_kbfgs(0.1)
    yield "chain", optax.chain(optax.clip(1.0), plain, optax.scale(2.0))
    yield "partition", optax.partition({"a": plain, "b": optax.sgd(0.1)}, "a")
    yield "masked", optax.masked(plain, True)
    yield "inject_hyperparams", optax.inject_hyperparams(kfqn.kbfgs)(learning_rate=0.1)
    yield "apply_if_finite", optax.apply_if_finite(plain, 3)
    yield "multi_steps", optax.MultiSteps(plain, 2)
    yield "two of them", optax.chain(kfqn.scale_by_kbfgs(0.1), kfqn.scale_by_kbfgs(0.1))


@pytest.mark.parametrize(("name", "tx"), list(optimizers()), ids=[n for n, _ in optimizers()])
def test_every_state_that_holds_ours(name, tx):
    loss_fn, params, *_ = problem()
    before = tx.init(params)
    after = kfqn.warm_start(before, loss_fn, params, batches_of([6, 2]))
    expected = explicit(params, np.concatenate([x for x, _ in batches_of([6, 2])]))
    assert jax.tree.structure(after) == jax.tree.structure(before)
    moments = changed = 0
    for (path, old), new in zip(
        jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True
    ):
        text = jax.tree_util.keystr(path)
        assert (old.shape, old.dtype) == (new.shape, new.dtype), text
        if text.endswith(".input_moment"):
            (layer,) = [layer for layer in expected if layer in text]
            assert relative(new, expected[layer]) < 1e-12
            moments += 1
        elif not text.endswith(".stage"):
            np.testing.assert_array_equal(new, old, text)
        else:
            changed += int(new) != int(old)
    assert moments == changed == (4 if name == "two of them" else 2)


def test_factors_in_float32_of_bfloat16_parameters():
    loss_fn, params, *_ = problem(dtype=jnp.bfloat16)
    tx = kfqn.kbfgs(0.1)
    after = kfqn.warm_start(tx.init(params), loss_fn, params, batches_of([6, 2]))
    inputs = np.concatenate([x for x, _ in batches_of([6, 2])])
    exact = explicit(jax.tree.map(lambda p: np.float64(p), params), inputs)
    for path, layer in ours(after).items():
        assert layer.input_moment.dtype == jnp.float32
        assert relative(layer.input_moment, exact[path]) < 2e-2


def test_one_trace_serves_batches_of_one_shape():
    loss_fn, params, *_ = problem()
    calls = []

    def counted(params, x, targets):
        calls.append(x.shape)
        return loss_fn(params, x, targets)

    def traces(sizes):
        calls.clear()
        kfqn.warm_start(kfqn.kbfgs(0.1).init(params), counted, params, batches_of(sizes))
        return len(calls)

    assert traces([6]) == traces([6] * 5) > 0
    assert traces([6, 2]) == traces([6, 2, 2, 6, 6]) == 2 * traces([6])


def test_arguments_that_are_no_arrays_stay_what_they_are():
    loss_fn, params, x, targets = problem()
    seen = set()

    def flagged(params, batch, train, name, scale=1.0):
        seen.add((train, name))
        if train and name == "real":  # would fail on a tracer
            batch = {"x": batch["x"] * 2, "t": batch["t"]}
        return loss_fn(params, batch["x"], batch["t"]) * scale

    state = kfqn.kbfgs(0.1).init(params)
    batch = {"x": x, "t": targets}
    doubled = kfqn.warm_start(state, flagged, params, [(batch, True, "real")] * 2)
    mixed = kfqn.warm_start(state, flagged, params, [(batch, True, "real"), (batch, False, "no")])
    assert seen == {(True, "real"), (False, "no")}
    once, twice = explicit(params, x)[D0], explicit(params, 2 * x)[D0]
    assert relative(ours(doubled)[D0].input_moment, twice) < 1e-12
    assert relative(ours(mixed)[D0].input_moment, (once + twice) / 2) < 1e-12


def test_batches_may_hold_random_keys():
    loss_fn, params, x, targets = problem()

    def noisy(params, x, key):
        return loss_fn(params, x + jax.random.normal(key, x.shape), targets)

    keys = list(jax.random.split(jax.random.key(0), 3))
    after = kfqn.warm_start(kfqn.kbfgs(0.1).init(params), noisy, params, ((x, k) for k in keys))
    inputs = np.concatenate([x + jax.random.normal(key, x.shape) for key in keys])
    assert relative(ours(after)[D0].input_moment, explicit(params, inputs)[D0]) < 1e-12


def test_refusals():
    loss_fn, params, x, targets = problem()
    state = kfqn.kbfgs(0.1).init(params)
    with pytest.raises(TypeError, match=r"each batch must be a tuple.*got dict: write \(batch,\)"):
        kfqn.warm_start(state, loss_fn, params, [{"x": x}])
    with pytest.raises(TypeError, match=r"each batch must be a tuple.*got \w*Array"):
        kfqn.warm_start(state, loss_fn, params, x)
    with pytest.raises(ValueError, match="batches is empty: warm_start needs at least one batch"):
        kfqn.warm_start(state, loss_fn, params, iter([]))
    for tx in (optax.adam(0.1), kfqn.mbf(0.1, 0.1)):
        with pytest.raises(ValueError, match="no state to start, of kbfgs, kbfgs_l, kfqn, kfac or"):
            kfqn.warm_start(tx.init(params), loss_fn, params, [(x, targets)])
    with pytest.raises(TypeError, match="must return the mean loss"):
        kfqn.warm_start(state, lambda p, x: x, params, [(x,)])


def test_a_layer_that_the_loss_does_not_call():
    loss_fn, params, x, targets = problem()
    more = {"params": params["params"] | {"unused": {"kernel": jnp.ones((2, 2))}}}
    state = kfqn.kbfgs(0.1).init(more)
    with pytest.raises(
        ValueError, match=r"does not reach layer 'params/unused' of the state.*'params/Dense_0'"
    ):
        kfqn.warm_start(state, loss_fn, more, [(x, targets)])


@pytest.mark.parametrize("method", [kfqn.kfac, kfqn.tkfac])
def test_refusals_of_kfac_and_its_kin(method):
    """Both of their moments are looked at, and both must be there."""
    loss_fn, params, x, targets = problem()
    state = method(0.1).init(params)
    bad = targets.at[0, 0].set(1e100)  # finite; the gradient's outer product cannot be squared
    with pytest.raises(
        ValueError, match=f"moment of the {'output gradients' if method is kfqn.kfac else 'inputs'}"
    ):
        kfqn.warm_start(state, loss_fn, params, [(x, targets), (x, bad)])
    more = {"params": params["params"] | {"unused": {"kernel": jnp.ones((2, 2))}}}
    with pytest.raises(ValueError, match=r"does not reach layer 'params/unused' of the state"):
        kfqn.warm_start(method(0.1).init(more), loss_fn, more, [(x, targets)])
