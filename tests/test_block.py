"""Block K-BFGS: against NumPy loops, and what it does in steps that go wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from block_reference import BlockMlp, damped_bfgs
from hypothesis import given, settings
from hypothesis import strategies as st
from models import problem, relative
from steps import D0, D1, batches_for, dense, equal, layers_of, matrices, types

import kfqn_optax as kfqn
from kfqn_optax import block_bfgs, block_matrix, inverse, pairs, trust
from kfqn_optax.sketch import signs

PAIRS, WINDOW, PART = 3, 4, 4


def make(lr=1.0, damping=0.1, **options):
    options = {"pairs": PAIRS, "window": WINDOW, "update_every": 1} | options
    return kfqn.scale_by_block_kbfgs(lr, damping, **options)


def step_of(tx, loss_fn):
    """A step with curvature from the first examples.

    The gradient, and how many rows the layers saw, may be spoiled by a factor.
    """

    @jax.jit
    def step(params, state, x, targets, spoil, rows):
        grads = jax.tree.map(lambda g: g * spoil, jax.grad(loss_fn)(params, x, targets))
        fn = kfqn.curvature_fn(loss_fn, params, x[:PART], targets[:PART])

        def seen(params, **asked):
            measured = fn(params, **asked)
            layers = {k: v._replace(rows=v.rows * rows) for k, v in measured.layers.items()}
            return measured._replace(layers=layers)

        updates, state = tx.update(grads, state, params, curvature_fn=seen)
        return updates, state

    def run(params, state, x, targets, spoil=1.0, rows=1.0):
        return step(params, state, x, targets, spoil, rows)

    run.compiled = step
    return run


@pytest.fixture(scope="module")
def tiny():
    """A loss, its parameters, and a compiled step of learning rate 1."""
    loss_fn, params, *_ = problem((6, 3), batch=12)
    return loss_fn, params, step_of(make(), loss_fn)


@pytest.mark.parametrize("lr", [1.0, 2.5])
def test_against_numpy(lr):
    """Every number of the state and of the update, through steps taken and steps refused."""
    steps = 25
    loss_fn, params, *_ = problem((6, 3), batch=12)
    step, state = step_of(make(lr), loss_fn), make(lr).init(params)
    numpy = BlockMlp(
        matrices(params),
        ["relu", "linear"],
        "half_mse",
        lr,
        0.1,
        weight_decay=0.0,
        pairs=PAIRS,
        window=WINDOW,
    )
    for k, (x, t) in enumerate(batches_for(params, batch=12, count=steps)):
        updates, state = step(params, state, x, t)
        updates = jax.tree.map(lambda u: -lr * u, updates)
        moves = numpy.step(*map(np.asarray, (x, t, x[:PART], t[:PART])))
        for i, path in enumerate((D0, D1)):
            held = layers_of(state)[path]
            if np.abs(moves[i]).max():
                assert relative(matrices(updates)[i], moves[i]) < 1e-8, k
            assert relative(held.input, numpy.H_a[i]) < 1e-8, k
            assert relative(dense(held.output), numpy.H_g[i]) < 1e-8, k
            assert relative(held.input_moment, numpy.A[i]) < 1e-9, k
        assert state.trust.radius == pytest.approx(numpy.radius, rel=1e-7)
        assert state.trust.kappa == pytest.approx(numpy.kappa, rel=1e-7)
        assert int(state.trust.rejected) == numpy.rejected, k
        params = optax.apply_updates(params, updates)
    assert 0 < numpy.rejected < steps / 2
    health = kfqn.health(state)
    for layer in health.values():
        assert layer.input["updated"] > 0.98 * steps * PAIRS
        for side in (layer.input, layer.output):
            assert sum(side.values()) == steps * PAIRS
            assert side["updated"] + side["only rounding"] + side["s.y <= 0"] == steps * PAIRS
        assert layer.second_damped == layer.output["updated"]
    assert health.totals()["powell_damped"] == numpy.powell_damped > 0
    assert health.totals()["reset"] == 0
    assert (health.measured_steps, health.rejected_steps) == (numpy.judged, numpy.rejected)
    last = str(health).splitlines()[-1]
    assert last == f"steps: {numpy.judged} measured, {numpy.rejected} of them not taken"
    assert step.compiled._cache_size() == 1


def test_input_factors_of_all_directions():
    """Against inverses: the direction goes another way, and nothing else changes."""
    loss_fn, params, *_ = problem((6, 3), batch=12)
    tx = make(input_rank=20)
    step, state = step_of(tx, loss_fn), tx.init(params)
    numpy = BlockMlp(
        matrices(params),
        ["relu", "linear"],
        "half_mse",
        1.0,
        0.1,
        weight_decay=0.0,
        pairs=PAIRS,
        window=WINDOW,
        inverses=True,
    )
    kinds, steps = types(state), 15
    for k, (x, t) in enumerate(batches_for(params, batch=12, count=steps)):
        updates, state = step(params, state, x, t)
        updates = jax.tree.map(lambda u: -u, updates)
        moves = numpy.step(*map(np.asarray, (x, t, x[:PART], t[:PART])))
        for i, path in enumerate((D0, D1)):
            held = layers_of(state)[path]
            if np.abs(moves[i]).max():
                assert relative(matrices(updates)[i], moves[i]) < 1e-5, k
            assert relative(dense(held.input), numpy.H_a[i]) < 1e-5, k
            assert relative(dense(held.output), numpy.H_g[i]) < 1e-5, k
        params = optax.apply_updates(params, updates)
    assert types(state) == kinds
    assert step.compiled._cache_size() == 1
    for layer in kfqn.health(state).values():
        assert layer.input["updated"] == sum(layer.input.values()) == steps
        assert sum(layer.output.values()) == steps * PAIRS
    table = str(kfqn.summary(state, params))
    assert "6 directions of 6 and 12 pairs of 6" in table


def test_input_factors_of_few_directions_learn():
    """In float32; and inputs that are not finite leave them as they are."""
    loss_fn, params, *_ = problem((20, 4), d_in=15, batch=32, dtype=jnp.float32)
    tx = kfqn.block_kbfgs(pairs=3, window=4, input_rank=5)
    step, state = step_of(tx, loss_fn), tx.init(params)
    batches = list(batches_for(params, batch=32, count=60))
    before = loss_fn(params, *batches[0])

    def train(params, state, x, t):
        updates, state = step(params, state, x, t)
        return optax.apply_updates(params, updates), state

    for x, t in batches:
        params, state = train(params, state, x, t)
    assert loss_fn(params, *batches[0]) < 0.7 * before
    x, t = batches[0]
    _, after = train(params, state, x.at[0, 0].set(jnp.nan), t)
    equal(layers_of(after)[D0].input, layers_of(state)[D0].input)
    assert kfqn.health(after)[D0].input["not finite"] == 1
    for layer in layers_of(after).values():
        assert np.linalg.svd(np.asarray(layer.input.rows, np.float64))[1].max() < 1


def test_a_refused_step_leaves_the_parameters(tiny):
    loss_fn, params, step = tiny
    x, t = next(batches_for(params, batch=12))
    _, state = step(params, make().init(params), x, t)
    # A kappa so small, and a radius so large, that the step goes far beyond the minimum.
    state = state._replace(
        trust=state.trust._replace(kappa=jnp.float64(1e-6), radius=jnp.float64(1e9))
    )
    updates, after = step(params, state, x, t)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(updates))
    assert int(after.trust.rejected) == int(state.trust.rejected) + 1
    assert after.trust.radius < state.trust.radius
    assert after.trust.kappa > state.trust.kappa


@pytest.mark.parametrize("spoil", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite(tiny, spoil):
    loss_fn, params, step = tiny
    batches = list(batches_for(params, batch=12, count=3))
    _, state = step(params, make().init(params), *batches[0])
    updates, after = step(params, state, *batches[1], spoil)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(updates))
    equal(
        (after.momentum, after.averaged, after.trust), (state.momentum, state.averaged, state.trust)
    )
    updates, _ = step(params, after, *batches[2])
    assert all(np.isfinite(leaf).all() and np.any(leaf != 0) for leaf in jax.tree.leaves(updates))


def test_inputs_that_are_not_finite(tiny):
    """Statistics at the parameters and at the probe are nan: factors and A stay as they are."""
    loss_fn, params, step = tiny
    (x, t), (x2, t2) = batches_for(params, batch=12, count=2)
    _, state = step(params, make().init(params), x, t)
    updates, after = step(params, state, x2.at[0, 0].set(jnp.nan), t2)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(updates))
    for path, held in layers_of(state).items():
        now = layers_of(after)[path]
        if path == D0:
            equal(now.input_moment, held.input_moment)
        for H in (now.input, dense(now.output)):
            assert (np.linalg.eigvalsh(H) > 0).all()
    before, counted = kfqn.health(state), kfqn.health(after)
    assert counted[D0].input["not finite"] == PAIRS
    for path in (D0, D1):
        equal(counted[path].output, before[path].output | {"not finite": np.asarray(PAIRS)})
        equal(counted[path].powell_damped, before[path].powell_damped)
        equal(counted[path].second_damped, before[path].second_damped)


def test_layers_that_are_not_reached(tiny):
    """Both sides of every layer are kept, at the start and later, and counted as not measured."""
    loss_fn, params, step = tiny
    batches = list(batches_for(params, batch=12, count=2))
    fresh = make().init(params)
    for state in (fresh, step(params, fresh, *batches[0])[1]):
        _, after = step(params, state, *batches[1], rows=0.0)
        for path, held in layers_of(state).items():
            equal(layers_of(after)[path]._replace(counts=held.counts), held)
            before, counted = (kfqn.health(one)[path] for one in (state, after))
            for side in ("input", "output"):
                expected = getattr(before, side) | {"not measured": np.asarray(PAIRS)}
                equal(getattr(counted, side), expected)


def test_a_factor_that_is_lost_is_counted(tiny):
    loss_fn, params, step = tiny
    x, t = next(batches_for(params, batch=12))
    _, state = step(params, make().init(params), x, t)
    held = layers_of(state)[D0]
    ruined = held._replace(input=-jnp.eye(len(held.input)))
    _, after = step(params, state._replace(layers=state.layers | {D0: ruined}), x, t)
    health = kfqn.health(after)
    assert health[D0].input["reset: positive definiteness lost in rounding"] == 1
    assert health.totals()["reset"] == 1
    assert np.linalg.eigvalsh(layers_of(after)[D0].input)[0] > 0


def test_a_step_of_last_digits_teaches_the_output_side_nothing(tiny):
    loss_fn, params, step = tiny
    x, t = next(batches_for(params, batch=12))
    _, state = step(params, make().init(params), x, t)
    state = state._replace(trust=state.trust._replace(radius=jnp.float64(1e-32)))
    updates, after = step(params, state, x, t)
    assert 0 < optax.tree.norm(updates) < 1e-14
    for path, held in layers_of(state).items():
        equal(layers_of(after)[path].output, held.output)
        before, counted = (kfqn.health(one)[path].output for one in (state, after))
        equal(counted, before | {"only rounding": np.asarray(PAIRS)})


@pytest.mark.parametrize("rate", [0.0, 0.03, 3.0])
def test_learning_rates(rate):
    """From 0 to 3 nothing diverges; 0 leaves the parameters and the output factors alone."""
    loss_fn, params, x, t = problem((6, 3), batch=12)
    tx = kfqn.block_kbfgs(rate, pairs=PAIRS)

    @jax.jit
    def step(params, state):
        grads = jax.grad(loss_fn)(params, x, t)
        fn = kfqn.curvature_fn(loss_fn, params, x, t)
        updates, state = tx.update(grads, state, params, curvature_fn=fn)
        return optax.apply_updates(params, updates), state

    state, begin = tx.init(params), params
    before, kinds = loss_fn(params, x, t), types(state)
    for _ in range(60):
        params, state = step(params, state)
    assert types(state) == kinds
    assert step._cache_size() == 1
    if rate == 0:
        equal(params, begin)
        for layer in layers_of(state).values():
            d = inverse.size(layer.output)
            assert relative(dense(layer.output), np.eye(d) / np.sqrt(0.03)) < 1e-6
        for layer in kfqn.health(state).values():
            assert layer.output["only rounding"] == 60 * PAIRS
    else:
        assert loss_fn(params, x, t) < 0.7 * before


def test_float32_factors_stay_positive_definite():
    loss_fn, params, *_ = problem((20, 4), d_in=15, batch=32, dtype=jnp.float32)
    tx = kfqn.scale_by_block_kbfgs(1.0, 1e-3, pairs=8)
    step, state = step_of(tx, loss_fn), tx.init(params)
    for x, t in batches_for(params, batch=32, count=300):
        updates, state = step(params, state, x, t)
        params = jax.tree.map(lambda p, u: p - u, params, updates)
    for layer in layers_of(state).values():
        np.testing.assert_array_equal(layer.input, layer.input.T)
        output = np.asarray(dense(layer.output), np.float64)
        for H in (np.asarray(layer.input, np.float64), (output + output.T) / 2):
            assert np.linalg.eigvalsh(H)[0] > 0
    assert layer.input.dtype == layer.output.s.dtype == jnp.float32


def test_without_curvature(tiny):
    """``curvature_fn=None``: the step is made with what is known, and factors stay."""
    loss_fn, params, step = tiny
    x, t = next(batches_for(params, batch=12))
    _, state = step(params, make().init(params), x, t)
    grads = jax.grad(loss_fn)(params, x, t)
    updates, after = make().update(grads, state, params, curvature_fn=None)
    equal(after.layers, state.layers)
    equal(after.trust, state.trust)
    assert optax.tree.norm(updates) > 0


def test_refusals():
    loss_fn, params, x, t = problem()
    tx = make()
    state, grads = tx.init(params), jax.grad(loss_fn)(params, x, t)
    plain = kfqn.curvature_fn(loss_fn, params, x, t)
    with pytest.raises(ValueError, match="did not measure the sketches of layer"):
        tx.update(grads, state, params, curvature_fn=lambda p, **asked: plain(p, gradient=True))
    with pytest.raises(ValueError, match="max_factor_dim is 4"):
        make(max_factor_dim=4).init(params)
    with pytest.raises(ValueError, match="pairs must be a whole number of at least 1, got 0"):
        kfqn.block_kbfgs(pairs=0)
    with pytest.raises(ValueError, match="input_rank must be a whole number of at least 1, got 0"):
        kfqn.block_kbfgs(input_rank=0)
    with pytest.raises(ValueError, match="window must be a multiple of 2 above 0, got 5"):
        kfqn.block_kbfgs(window=5)

    def one_by_one(params, x, t):
        return jnp.mean(jax.vmap(lambda x, t: loss_fn(params, x[None], t[None]))(x, t))

    with pytest.raises(ValueError, match="vmap hides"):
        tx.update(grads, state, params, curvature_fn=kfqn.curvature_fn(one_by_one, params, x, t))


# --- the parts ------------------------------------------------------------------------------------


@jax.jit
def update(H, s, y, powell, start):
    """A matrix after q pairs."""
    offer = block_matrix.offer(H, s, y, start)
    solved = block_bfgs.solve(offer.products, offer.usable, powell)
    return block_matrix.take(H, offer, solved, start)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.floats(-6, 6),
    st.floats(-6, 6),
    st.sampled_from([0.01, 0.2, 0.9]),
)
def test_pairs_in_coordinates_are_pairs_in_turn(seed, log_s, log_y, powell):
    """Whatever the scales; and H stays positive definite, with the last secant equation."""
    rng = np.random.default_rng(seed)
    d, q = 6, 4
    R = rng.normal(size=(d, d))
    H = R @ R.T + 0.1 * np.eye(d)
    S, Y = 10**log_s * rng.normal(size=(q, d)), 10**log_y * rng.normal(size=(q, d))
    made, taken = update(*map(jnp.asarray, (H, S, Y)), powell, 1.0)
    for s, y in zip(S, Y, strict=True):
        H, _ = damped_bfgs(H, s, y, powell)
    np.testing.assert_array_equal(taken.status, np.full(q, pairs.UPDATED))
    assert not taken.reset
    assert relative(made, H) < 1e-6
    assert np.linalg.eigvalsh(made)[0] > 0
    np.testing.assert_array_equal(made, made.T)


@pytest.mark.parametrize(
    ("s", "y", "status"),
    [
        (1.0, np.nan, pairs.NOT_FINITE),
        (np.inf, 1.0, pairs.NOT_FINITE),
        (1.0, 0.0, pairs.NOT_POSITIVE),
        (1e-150, 1e-150, pairs.TOO_SMALL),
        (1.0, 1e300, pairs.NOT_FINITE),
        (1e150, 1e150, pairs.NOT_FINITE),
    ],
)
def test_pairs_that_are_of_no_use(s, y, status):
    """They are left out one by one."""
    rng = np.random.default_rng(0)
    H, S = np.eye(5), rng.normal(size=(3, 5))
    Y = 2 * S
    S[1], Y[1] = s * np.abs(S[1]), y
    made, taken = update(*map(jnp.asarray, (H, S, Y)), 0.2, 1.0)
    expected, others = update(*map(jnp.asarray, (H, S[[0, 2]], Y[[0, 2]])), 0.2, 1.0)
    assert taken.status.tolist() == [pairs.UPDATED, status, pairs.UPDATED]
    assert not taken.damped.any()
    assert not taken.reset
    assert relative(made, expected) < 1e-12


def test_an_update_that_would_overflow_is_left_out_as_a_whole():
    rng = np.random.default_rng(0)
    H, S = np.eye(5), rng.normal(size=(3, 5))
    Y = 2 * S
    S[1], Y[0], Y[1] = 1e160 * np.abs(S[1]), -S[0], 1e-152
    made, taken = update(*map(jnp.asarray, (H, S, Y)), 0.2, 1.0)
    np.testing.assert_array_equal(made, H)
    assert taken.status.tolist() == [pairs.NOT_FINITE] * 3
    assert not taken.damped.any()
    assert not taken.reset


@pytest.mark.parametrize("ruin", [-1.0, np.nan])
def test_a_factor_that_is_lost_starts_anew(ruin):
    rng = np.random.default_rng(0)
    S = rng.normal(size=(2, 4))
    made, taken = update(ruin * jnp.eye(4), jnp.asarray(S), jnp.asarray(3 * S), 0.2, 0.5)
    expected, _ = update(0.5 * jnp.eye(4), jnp.asarray(S), jnp.asarray(3 * S), 0.2, 0.5)
    assert bool(taken.reset)
    np.testing.assert_array_equal(made, expected)


positive = st.floats(1e-3, 1e3)


propose, judge = jax.jit(trust.propose), jax.jit(trust.judge)


@settings(max_examples=200, deadline=None)
@given(positive, positive, st.floats(-10, 10), positive, positive, st.floats(0.5, 2), positive)
def test_trust(radius, kappa, slope, curvature, before, rise, lr):
    """A step is within the radius, taken only if the loss rises by a tenth at most; bounds hold."""
    held = trust.init(jnp.float64)._replace(
        radius=jnp.asarray(radius), kappa=jnp.asarray(kappa), steps=jnp.asarray(5, jnp.int32)
    )
    step = propose(held, *map(jnp.asarray, (slope, curvature, lr)))
    assert 0 <= float(step.squared) <= radius * (1 + 1e-12)
    after = before * rise
    accepted, new = judge(held, step, *map(jnp.asarray, (slope, before, after)))
    if float(step.length) == 0:
        assert slope < 1e-100
        assert not accepted
        equal(new, held)
        return
    if abs(rise - 1.1) > 1e-9:
        assert bool(accepted) == (rise < 1.1)
        assert int(new.rejected) == (rise > 1.1)
    assert kappa / 10 * (1 - 1e-12) <= float(new.kappa) <= kappa * 10 * (1 + 1e-12)
    assert 0 < float(new.radius) <= radius * 1.5 + 1e-12
    if accepted:
        assert float(new.radius) >= min(radius, 0.02 * before) * (1 - 1e-12)
    else:
        assert float(new.radius) <= max(radius / 4, 1e-13 * before)


@pytest.mark.parametrize(
    ("slope", "curvature"),
    [
        *((slope, 1) for slope in (np.inf, np.nan, 0, -1, 1e-160)),
        *((1, curvature) for curvature in (np.inf, np.nan, 0, -1)),
    ],
)
def test_a_direction_that_leads_nowhere(slope, curvature):
    step = propose(trust.init(jnp.float64), jnp.float64(slope), jnp.float64(curvature), 1.0)
    assert float(step.length) == float(step.squared) == 0


@pytest.mark.parametrize(
    ("before", "rise", "taken", "radius"),
    [
        (0.5, 0.9, True, 0.5),
        (0.5, 1.0, True, 0.75),  # nothing but rounding is as predicted
        (0.5, 1.09, True, 0.5 / 1.5),
        (0.5, 1.11, False, 0.5 / 4),
        (3.0, 1.11, False, 1.0 / 4),  # the step, to the minimum, is shorter than the radius
        (1e-15, 1.11, False, 20 * np.finfo(float).eps),  # the rounding error of the loss, 2
    ],
)
def test_a_step_is_taken_if_the_loss_rises_by_a_tenth_at_most(before, rise, taken, radius):
    held = trust.init(jnp.float64)._replace(radius=jnp.asarray(before))
    step = propose(held, *map(jnp.asarray, (1.0, 1.0, 1.0)))
    accepted, new = judge(held, step, *map(jnp.asarray, (1.0, 2.0, 2.0 * rise)))
    assert bool(accepted) == taken
    assert float(new.radius) == pytest.approx(radius, abs=0)
    assert int(new.rejected) == (not taken)


@pytest.mark.parametrize(("rate", "length"), [(0.25, 0.25), (1.0, 1.0), (3.0, 1.0)])
def test_the_learning_rate_is_a_share_of_the_way_to_the_minimum(rate, length):
    step = propose(trust.init(jnp.float64), *map(jnp.asarray, (1.0, 1.0, rate)))
    assert float(step.length) == length


def test_the_first_radius_is_a_share_of_the_first_loss():
    held = trust.init(jnp.float64)
    step = propose(held, *map(jnp.asarray, (100.0, 1.0, 1.0)))
    assert float(step.length) == trust.LONGEST  # nothing measured yet: no other bound
    begun = trust.begin(held, jnp.asarray(-200.0))
    assert float(begun.radius) == pytest.approx(1.0)
    step = propose(begun, *map(jnp.asarray, (100.0, 1.0, 1.0)))
    assert float(step.squared) == pytest.approx(1.0)
    for loss in (0.0, np.nan, np.inf):
        equal(trust.begin(held, jnp.asarray(loss)), held)
    _, after = judge(begun, step, *map(jnp.asarray, (100.0, 200.0, 150.0)))
    equal(trust.begin(after, jnp.asarray(1.0)), after)  # from then on it follows the steps


@pytest.mark.parametrize(("slope", "after"), [(1, np.nan), (1, np.inf), (1, -np.inf), (np.nan, 2)])
def test_a_loss_or_a_slope_that_is_not_finite(slope, after):
    held = trust.init(jnp.float32)
    step = propose(held, *map(jnp.float32, (1.0, 1.0, 1.0)))
    accepted, new = judge(held, step, *map(jnp.float32, (slope, 2.0, after)))
    assert not accepted
    assert new.kappa == held.kappa
    assert new.radius < held.radius


def test_kappa_finds_the_curvature_of_a_parabola():
    """On f(a) = 1 - a + 5 a^2 / 2 the step goes to the minimum, 0.2, whatever was promised."""
    held = trust.init(jnp.float64)
    for _ in range(40):
        step = propose(held, *map(jnp.asarray, (1.0, 0.01, 1.0)))
        a = step.length
        _, held = judge(held, step, *map(jnp.asarray, (1.0, 1.0)), 1 - a + 2.5 * a**2)
    assert float(step.length) == pytest.approx(0.2, rel=1e-3)


def test_signs():
    drawn = signs(50, 4)
    assert relative((drawn**2).sum(axis=0), np.ones(4)) < 1e-12
    assert np.abs(drawn.T @ drawn - np.eye(4)).max() < 0.6
    np.testing.assert_array_equal(drawn, signs(50, 4))
