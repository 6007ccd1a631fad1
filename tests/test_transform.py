"""`scale_by_kbfgs` and the paper's step: types, compilations, the limit on the step, guards."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from models import Mlp, loss_of, problem, relative
from steps import (
    CURVATURE,
    D0,
    D1,
    batches_for,
    close,
    equal,
    layers_of,
    matrices,
    random_like,
    step_of,
    types,
)

import kfqn_optax as kfqn
from kfqn_optax import pairs

# --- the paper's step -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damping", "batch", "rate", "branches"),  # which of the two dampings act, together
    [
        (0.01, 8, 1.8, {(False, False), (True, False), (False, True), (True, True)}),
        (4.0, 8, 0.6, {(False, True), (True, True)}),
        (1.0, 1, 0.6, {(False, True)}),
    ],
)
def test_the_whole_optimizer_is_the_reference(damping, batch, rate, branches):
    """Without a warm start, with weight decay, another momentum, and a learning rate that moves."""
    _, params, *_ = problem([6, 4, 3])
    rates, state = np.linspace(rate, rate / 12, 18), None
    activations = ["relu", "relu", "linear"]
    expected = reference.Mlp(matrices(params), activations, "bce", 0, damping, 0.03, 0.8)
    seen = set()
    for k, (x, t) in enumerate(batches_for(params, batch, 18)):
        expected.lr = rates[k]
        records = expected.step(np.array(x), np.array(t))
        state = scheduled(rates, damping).init(params) if state is None else state
        params, state, updates = scheduled_step(rates, damping, params, state, x, t)
        for i, (W, P, record) in enumerate(
            zip(matrices(params), matrices(updates), records, strict=True)
        ):
            layer = layers_of(state)[f"params/Dense_{i}"]
            ours = {
                "W": W, "H_a": layer.input, "H_g": layer.output, "A": layer.input_moment,
                "s": layer.s, "y": layer.y, "direction": P / expected.lr,
            }  # fmt: skip
            for name, value in ours.items():
                assert relative(value, record[name]) < 1e-9, (k, i, name)
            assert int(layer.input_status) == record["H_a_status"]
            assert int(layer.output_status) == record["H_g_status"]
            assert bool(layer.powell_damped) == record["powell"]
            assert bool(layer.second_damped) == record["second"]
            seen |= {(record["powell"], record["second"])}
    assert seen >= branches
    assert scheduled_step._cache_size() <= 2  # for each size of a batch, one


def scheduled(rates, damping):
    """An optimizer that follows two schedules."""
    return kfqn.kbfgs(lambda count: rates[count], lambda count: damping,
                      momentum=0.8, weight_decay=0.03)  # fmt: skip


@jax.jit
def scheduled_step(rates, damping, *args):
    return step_of(scheduled(rates, damping), loss_of(Mlp([6, 4, 3]), "bce"))(*args)


def test_one_step_of_a_layer_without_bias_by_hand():
    loss_fn, params, x, targets = problem([3], bias=False)
    tx = kfqn.kbfgs(0.5, 0.09, momentum=0.6)
    _, state, updates = step_of(tx, loss_fn)(params, tx.init(params), x, targets)
    K, a, mu = params["params"]["Dense_0"]["kernel"], x.mean(axis=0), 0.3
    A = x.T @ x / 8
    H = np.linalg.inv(A + mu * np.eye(5))
    step = -0.5 * H @ (0.4 * x.T @ (x @ K - targets) / 8)
    assert relative(updates["params"]["Dense_0"]["kernel"], step) < 1e-12
    layer, s = layers_of(state)[D0], 0.1 * step.T @ a  # the loss is quadratic: y = s
    assert relative(layer.s, s) < 1e-12
    assert relative(layer.y, s) < 1e-12
    output, _ = reference.bfgs(np.eye(3), s, s, (x @ K - targets).mean(axis=0))
    input_, _ = reference.bfgs(H, H @ a, (A + mu * np.eye(5)) @ H @ a, a)
    assert relative(layer.output, output) < 1e-12
    assert relative(layer.input, input_) < 1e-12


# --- types and compilations -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype",
    [
        jnp.bfloat16,
        pytest.param(jnp.float16, marks=pytest.mark.slow),
        pytest.param(jnp.float32, marks=pytest.mark.slow),  # in test_methods too
        jnp.float64,
    ],
)
def test_types_stay_and_one_program_serves_all_steps(dtype):
    loss_fn, params, *_ = problem(dtype=dtype)
    tx = kfqn.kbfgs(0.1, weight_decay=0.01)
    first, step, batches = tx.init(params), step_of(tx, loss_fn), list(batches_for(params))
    kept = jnp.float64 if dtype == jnp.float64 else jnp.float32
    for layer in layers_of(first).values():
        assert {getattr(layer, name).dtype for name in CURVATURE} == {jnp.dtype(kept)}
    assert {m.dtype for m in jax.tree.leaves(optax.tree.get(first, "momentum"))} == {
        jnp.dtype(kept)
    }
    after, state = params, first
    for batch in batches:
        after, state, updates = step(after, state, *batch)
        assert types(state) == types(first)
        assert types(updates) == types(params)
    assert step._cache_size() == 1

    def body(carry, batch):
        (params, state), (x, t, measure) = carry, batch
        fn, grads = kfqn.curvature_fn(loss_fn, params, x, t), jax.grad(loss_fn)(params, x, t)
        updates, state = jax.lax.cond(
            measure,
            lambda: tx.update(grads, state, params, curvature_fn=fn),
            lambda: tx.update(grads, state, params, curvature_fn=None),
        )
        return (optax.apply_updates(params, updates), state), None

    xs = (*map(jnp.stack, zip(*batches, strict=True)), jnp.ones(len(batches), bool))
    scan = jax.jit(lambda *carry: jax.lax.scan(body, carry, xs)[0])
    assert types(jax.eval_shape(scan, params, first)) == types((params, first))
    if dtype == jnp.float64:
        close(scan(params, first), (after, state), rtol=1e-9)


@pytest.mark.parametrize(
    "numbers",
    [
        pytest.param({"learning_rate": 0.2, "damping": 0.1}, marks=pytest.mark.slow),
        {
            "learning_rate": optax.linear_schedule(0.3, 0.1, 5),
            "damping": optax.linear_schedule(0.1, 0.5, 5),
        },
    ],
    ids=["floats", "schedules"],
)
def test_inject_hyperparams_is_the_plain_optimizer(numbers):
    loss_fn, params, *_ = problem()
    plain, injected = kfqn.kbfgs(**numbers), optax.inject_hyperparams(kfqn.kbfgs)(**numbers)
    results = []
    for tx in (plain, injected):
        after, state, step = params, tx.init(params), step_of(tx, loss_fn)
        for batch in batches_for(params):
            after, state, _ = step(after, state, *batch)
        assert step._cache_size() == 1
        results.append((after, layers_of(state)))
    close(*results, rtol=1e-5)
    expected = numbers["learning_rate"]
    expected = expected(5) if callable(expected) else expected
    assert float(state.hyperparams["learning_rate"]) == pytest.approx(float(expected), rel=1e-6)


def test_the_state_may_be_donated():
    loss_fn, params, *_ = problem()
    tx = kfqn.kbfgs(0.1)
    batches = list(batches_for(params))
    plain, donating = step_of(tx, loss_fn), step_of(tx, loss_fn, donate_argnums=(0, 1))
    for start in (tx.init(params), kfqn.warm_start(tx.init(params), loss_fn, params, batches)):
        kept = jax.tree.map(jnp.copy, (params, start))
        given = (jax.tree.map(jnp.copy, params), start)
        for batch in batches[:3]:
            pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(given)]
            assert len(set(pointers)) == len(pointers)
            kept, given = plain(*kept, *batch)[:2], donating(*given, *batch)[:2]
        equal(kept, given)
        assert jax.tree.leaves(start)[0].is_deleted()


def test_curvature_fn_may_be_an_argument_of_a_jitted_function():
    loss_fn, params, *_ = problem([3])
    tx = kfqn.kbfgs(0.1)
    state, moments = tx.init(params), []

    @jax.jit
    def update(grads, state, params, fn):
        return tx.update(grads, state, params, curvature_fn=fn)

    for batch in batches_for(params, count=2):
        fn = kfqn.curvature_fn(loss_fn, params, *batch)
        _, state = update(jax.grad(loss_fn)(params, *batch), state, params, fn)
        moments.append(fn(params).layers[D0].input_moment)
    close(layers_of(state)[D0].input_moment, 0.9 * moments[0] + 0.1 * moments[1], rtol=1e-12)
    assert update._cache_size() == 1


# --- the limit on the step ------------------------------------------------------------------------


def test_norm_constraint(trained):
    """The step's squared length in the metric of the factors is limited.

    It is lr^2 <H_a^-1 P H_g^-1, P>, without a limit lr^2 <M, P>. One factor shortens all layers;
    other leaves pass.
    """
    _, _, params, state = trained
    params = {**params, "scale": jnp.ones(2)}
    (held,) = [s for s in jax.tree.leaves(state, is_leaf=is_ours) if is_ours(s)]
    M, lr = random_like(params), lambda count: 0.7 / (1 + count)

    def precondition(limit):
        tx = kfqn.scale_by_kbfgs(lr, norm_constraint=limit)
        return jax.jit(lambda M: tx.update(M, held, params, curvature_fn=None)[0])(M)

    def squared(P):
        lengths = [
            np.vdot(P, np.linalg.solve(held.layers[path].output, P) @ np.linalg.inv(
                held.layers[path].input))
            for path, P in zip((D0, D1), matrices(P), strict=True)
        ]  # fmt: skip
        return (0.7 / 5) ** 2 * sum(lengths)

    free = precondition(None)
    inner = sum(np.vdot(m, p) for m, p in zip(matrices(M), matrices(free), strict=True))
    assert squared(free) == pytest.approx((0.7 / 5) ** 2 * inner, rel=1e-9)
    for share in [1e-6, 0.3, 0.999]:
        P = precondition(share * squared(free))
        assert squared(P) == pytest.approx(share * squared(free), rel=1e-9)
        equal(P["scale"], M["scale"])
        for p, q in zip(matrices(P), matrices(free), strict=True):
            assert relative(p, q * share**0.5) < 1e-9
    for share in [1.001, 1e6]:
        equal(precondition(share * squared(free)), free)


def is_ours(node):
    return isinstance(node, kfqn.ScaleByKBFGSState)


def test_the_probe_follows_the_shortened_step():
    loss_fn, params, x, targets = problem([3])
    step_by = {}
    for limit in [None, 1e-4]:
        tx = kfqn.kbfgs(0.5, norm_constraint=limit)
        _, state, updates = step_of(tx, loss_fn)(params, tx.init(params), x, targets)
        a = np.append(x.mean(axis=0), 1)
        assert relative(layers_of(state)[D0].s, 0.1 * matrices(updates)[0] @ a) < 1e-12
        step_by[limit] = matrices(updates)[0]
    assert np.linalg.norm(step_by[1e-4]) < 0.5 * np.linalg.norm(step_by[None])


# --- guards ---------------------------------------------------------------------------------------


def test_nan_in_one_layer_stays_there(trained):
    """NaN statistics at one call, or NaN gradients: what is known is kept bit for bit."""
    tx, loss_fn, params, good = trained
    (batch,) = batches_for(params, count=1, seed=9)

    @jax.jit
    def step(state, poison, grads_poison):
        fn, calls = kfqn.curvature_fn(loss_fn, params, *batch), iter(range(2))

        def curvature(p):
            statistics, bad = fn(p), poison[next(calls)]
            layer = statistics.layers[D0]
            spoiled = layer._replace(
                **{
                    n: getattr(layer, n) * bad
                    for n in ("input_moment", "input_mean", "cotangent_mean")
                }
            )
            return statistics._replace(layers=statistics.layers | {D0: spoiled})

        grads = jax.tree.map(lambda g: g * grads_poison, jax.grad(loss_fn)(params, *batch))
        return layers_of(tx.update(grads, state, params, curvature_fn=curvature)[1])

    def same(a, b, *fields):
        for name in fields:
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name), name)

    before, nan = layers_of(good), jnp.nan
    plain = step(good, jnp.ones(2), 1.0)
    assert all(int(s.output_status) == pairs.UPDATED for s in plain.values())
    for poison in [[nan, 1], [nan, nan]]:
        after = step(good, jnp.array(poison), 1.0)
        same(after[D0], before[D0], *CURVATURE)
        assert int(after[D0].input_status) == int(after[D0].output_status) == pairs.NOT_FINITE
        equal(after[D1], plain[D1])
    after = step(good, jnp.array([1, nan]), 1.0)
    same(after[D0], before[D0], "output", "s", "y")
    same(after[D0], plain[D0], "input", "input_moment", "input_status")
    assert int(after[D0].output_status) == pairs.NOT_FINITE
    equal(after[D1], plain[D1])
    for path, layer in step(good, jnp.ones(2), nan).items():
        same(layer, before[path], "output", "s", "y")
        same(layer, plain[path], "input", "input_moment", "input_status")
        assert int(layer.output_status) == pairs.NOT_FINITE
    first = step(tx.init(params), jnp.array([nan, 1]), 1.0)[D0]
    same(first, layers_of(tx.init(params))[D0], *CURVATURE, "stage")


@pytest.mark.parametrize("batch", [8, 1])
def test_corners_keep_the_factors_positive_definite(batch):
    loss_fn, fresh, *_ = problem()
    dead = jax.tree.map(jnp.copy, fresh)
    dead["params"]["Dense_0"]["bias"] -= 100

    @jax.jit
    def step(params, state, x, t, lr, damping):
        return step_of(kfqn.kbfgs(lr, damping), loss_fn)(params, state, x, t)

    cases = {
        "plain": (fresh, 0.1, 0.1), "no step": (fresh, 0.0, 0.1), "dead": (dead, 0.1, 0.1),
        "lambda 1": (fresh, 0.1, 1.0), "lambda 4": (fresh, 0.1, 4.0),
    }  # fmt: skip
    for case, (params, lr, damping) in cases.items():
        state = kfqn.kbfgs(0.1).init(params)
        xt = next(batches_for(params, batch))
        start, statuses = float(loss_fn(params, *xt)), set()
        for _ in range(20):
            params, state, _ = step(params, state, *xt, lr, damping)
            statuses.add(int(layers_of(state)[D1].output_status))
        for layer in layers_of(state).values():
            for H in (layer.input, layer.output):
                assert relative(H, H.T) < 1e-12, case
                assert np.linalg.eigvalsh(H).min() > 1e-4, case
        if case == "no step":
            assert statuses == {pairs.NOT_POSITIVE}
            np.testing.assert_array_equal(layers_of(state)[D1].output, np.eye(3))
            assert float(loss_fn(params, *xt)) == start
        else:
            assert pairs.UPDATED in statuses
            assert float(loss_fn(params, *xt)) < 0.9 * start, case
        if case == "dead":
            np.testing.assert_array_equal(layers_of(state)[D0].output, np.eye(4))
            assert int(layers_of(state)[D0].output_status) == pairs.NOT_POSITIVE
