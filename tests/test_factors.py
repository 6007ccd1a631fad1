"""One layer's curvature: where A comes from, which pair feeds which factor, what is left alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from models import relative

from kfqn_optax import factors, intake, layer_state, pairs
from kfqn_optax.layer_state import EMPTY, RUNNING, WARM, LayerState
from kfqn_optax.layers import dense
from kfqn_optax.options import Options
from kfqn_optax.statistics import LayerStatistics

LAYER = dense("d", (3, 3), True)
DAMPING = 0.5
OPTIONS = Options(0.1, factor_decay=0.8, pair_decay=0.7)


@functools.partial(jax.jit, static_argnames="options")
def learn(state, measured, probed, weights, step, options):
    before, after = (
        {"kernel": matrix[:3], "bias": matrix[3:]} for matrix in (weights, weights + step)
    )
    change = factors.output_change(LAYER, before, after, measured, probed)
    learned = factors.learn(
        [LAYER],
        {"d": state},
        {"d": measured},
        {"d": probed},
        {},
        {"d": change},
        options,
        jnp.asarray(DAMPING),
    )
    return learned["d"]


@jax.jit
def begin(state, measured):
    """A step's beginning: A takes in the batch, and the input factor starts."""
    seen = measured and {"d": measured}
    root = jnp.asarray(DAMPING)
    begun = intake.begin([LAYER], {"d": state}, seen, OPTIONS.factor_decay, root)["d"]
    input_ = intake.start([LAYER], {"d": state}, {"d": begun}, {}, OPTIONS, root)[0]["d"]
    return begun._replace(input=input_)


def statistics(seed, rows=6):
    """Statistics of a batch of 6 examples that could have been measured."""
    rng = np.random.default_rng(seed)
    a = np.hstack([rng.normal(size=(6, 3)), np.ones((6, 1))])
    made = a.T @ a / 6, None, a.mean(axis=0), rng.normal(size=3), 1e-16, float(rows), 6.0
    return LayerStatistics(*jax.tree.map(jnp.asarray, made))


def running(seed=7):
    """A state in the middle of a run."""
    rng = np.random.default_rng(seed)
    root_a, root_g = rng.normal(size=(4, 4)), rng.normal(size=(3, 3))
    return layer_state.init(LAYER, jnp.float64, OPTIONS)._replace(
        input=jnp.asarray(root_a @ root_a.T + np.eye(4)),
        output=jnp.asarray(root_g @ root_g.T + np.eye(3)),
        input_moment=statistics(8).input_moment,
        s=jnp.asarray(rng.normal(size=3)),
        y=jnp.asarray(rng.normal(size=3)),
        stage=jnp.full((), RUNNING, jnp.int32),
    )


def inverse(A):
    return np.linalg.inv(A + DAMPING * np.eye(len(A)))


def same(actual, expected, *fields):
    for name in fields:
        np.testing.assert_array_equal(getattr(actual, name), getattr(expected, name), name)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_init(dtype):
    state = layer_state.init(LAYER, dtype, OPTIONS)
    np.testing.assert_array_equal(state.input, np.eye(4))
    np.testing.assert_array_equal(state.output, np.eye(3))
    assert [leaf.shape for leaf in state[2:5]] == [(4, 4), (3,), (3,)]
    assert {leaf.dtype for leaf in state[:5]} == {jnp.dtype(dtype)}
    assert not any(np.any(leaf) for leaf in state[2:5])
    assert int(state.stage) == EMPTY
    assert int(state.input_status) == int(state.output_status) == pairs.NOT_MEASURED


def test_begin_without_a_warm_start_takes_the_first_batch():
    state, first, second = (
        layer_state.init(LAYER, jnp.float64, OPTIONS),
        statistics(0),
        statistics(1),
    )
    begun = begin(state, first)
    same(begun, first, "input_moment")
    assert int(begun.stage) == RUNNING
    assert relative(begun.input, inverse(first.input_moment)) < 1e-12

    again = begin(begun, second)
    averaged = 0.8 * first.input_moment + 0.2 * second.input_moment
    assert relative(again.input_moment, averaged) < 1e-14
    same(again, begun, "input", "stage", "output", "s", "y")  # inverted once only


def test_begin_after_a_warm_start_leaves_the_first_batch_out():
    moment = statistics(5).input_moment
    warm = layer_state.warm(running(), moment, jnp.ones(()))
    assert int(warm.stage) == WARM
    same(warm, running(), "input", "output", "s", "y", "input_status")
    for measured in [None, statistics(0, rows=0), statistics(0)]:
        begun = begin(warm, measured)
        np.testing.assert_array_equal(begun.input_moment, moment)
        assert int(begun.stage) == (WARM if measured is None else RUNNING)
        assert relative(begun.input, inverse(moment)) < 1e-12
    second = statistics(1)
    averaged = 0.8 * moment + 0.2 * second.input_moment
    assert relative(begin(begun, second).input_moment, averaged) < 1e-14


def test_warm_keeps_the_states_dtype():
    state = layer_state.init(LAYER, jnp.float32, OPTIONS)
    warm = layer_state.warm(state, statistics(0).input_moment, jnp.ones(()))
    for before, after in zip(state, warm, strict=True):
        assert (before.dtype, before.shape) == (after.dtype, after.shape)


@pytest.mark.parametrize("start", [layer_state.init(LAYER, jnp.float64, OPTIONS), running()])
def test_a_batch_that_does_not_reach_the_layer_or_is_not_finite_begins_nothing(start):
    signs = jnp.array([1.0, -1.0, 1.0, -1.0])  # rows whose sum is 0
    poisoned, huge = (
        statistics(0)._replace(input_moment=moment)
        for moment in (jnp.full((4, 4), jnp.nan), 1e200 * signs[:, None] * signs[None, :])
    )
    for measured in [statistics(0, rows=0), poisoned, huge, None]:
        same(begin(start, measured), start, *LayerState._fields)


@pytest.mark.parametrize("seed", range(6))
def test_learn_is_the_reference(seed):
    rng = np.random.default_rng(seed)
    state, measured, probed = running(seed), statistics(seed + 20), statistics(seed + 40)
    weights, step = rng.normal(size=(2, 4, 3))
    new = learn(state, measured, probed, weights, 0.1 * step, OPTIONS)

    h, h_plus = (w.T @ a for w, a in [
        (weights, measured.input_mean), (weights + 0.1 * step, probed.input_mean)
    ])  # fmt: skip
    s = 0.7 * state.s + 0.3 * (h_plus - h)
    y = 0.7 * state.y + 0.3 * (probed.cotangent_mean - measured.cotangent_mean)
    u, v, by_powell, by_second = reference.damp(*map(np.array, (s, y, state.output)), DAMPING)
    output, output_status = reference.bfgs(state.output, u, v, measured.cotangent_mean)
    u = state.input @ measured.input_mean
    input_, input_status = reference.bfgs(
        state.input, u, state.input_moment @ u + DAMPING * u, measured.input_mean
    )
    for name, value in {"s": s, "y": y, "output": output, "input": input_}.items():
        assert relative(getattr(new, name), value) < 1e-9, name
    assert int(new.output_status) == output_status == 0
    assert int(new.input_status) == input_status == 0
    assert (bool(new.powell_damped), bool(new.second_damped)) == (by_powell, by_second)
    same(new, state, "input_moment", "stage")


def test_the_change_of_a_large_mean_is_not_lost_in_float32():
    """s is made from the step, not as a difference of two means of size 1e4."""
    a = statistics(0)._replace(input_mean=jnp.array([3e3, 5e3, 7e3, 1.0]))
    to32 = functools.partial(jax.tree.map, lambda v: v.astype(jnp.float32))
    weights, step = np.random.default_rng(0).normal(size=(2, 4, 3))
    state = to32(layer_state.init(LAYER, jnp.float64, OPTIONS))
    weights = np.float32(weights)
    step = np.float32(weights + np.float32(1e-6 * step)) - weights  # as float32 can take it
    probed = a._replace(cotangent_mean=statistics(1).cotangent_mean)
    new = learn(state, to32(a), to32(probed), weights, step, OPTIONS)
    assert relative(new.s, 0.3 * (np.float64(step).T @ a.input_mean)) < 1e-5


def call(measured, probed, options=OPTIONS):
    weights, step = np.random.default_rng(0).normal(size=(2, 4, 3))
    return learn(running(), measured, probed, weights, step, options)


def test_a_pass_that_does_not_reach_the_layer_teaches_nothing():
    neither = call(statistics(0, rows=0), statistics(1, rows=0))
    same(neither, running(), "input", "output", "input_moment", "s", "y", "stage")
    assert int(neither.output_status) == int(neither.input_status) == pairs.NOT_MEASURED
    assert not bool(neither.powell_damped) | bool(neither.second_damped)

    probe_only = call(statistics(0), statistics(1, rows=0))
    same(probe_only, running(), "output", "s", "y")
    assert int(probe_only.output_status) == pairs.NOT_MEASURED
    assert int(probe_only.input_status) == pairs.UPDATED
    same(probe_only, call(statistics(0), statistics(1)), "input")


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
def test_each_side_is_guarded_by_itself(value):
    plain = call(statistics(0), statistics(1))
    for poison in [
        (statistics(0), statistics(1)._replace(cotangent_mean=jnp.array([0, value, 0]))),
        (statistics(0), statistics(1)._replace(input_mean=jnp.array([0, value, 0, 1]))),
        (statistics(0)._replace(cotangent_mean=jnp.array([0, value, 0])), statistics(1)),
    ]:
        new = call(*poison)
        same(new, running(), "output", "s", "y")
        assert int(new.output_status) == pairs.NOT_FINITE
        assert not bool(new.powell_damped) | bool(new.second_damped)
        same(new, plain, "input", "input_status")
    everything = statistics(0)._replace(input_mean=jnp.full((4,), value))
    new = call(everything, statistics(1))
    same(new, running(), "input", "output", "s", "y")
    assert int(new.output_status) == int(new.input_status) == pairs.NOT_FINITE
    new = call(statistics(0)._replace(input_moment=jnp.full((4, 4), value)), statistics(1))
    same(new, running(), "input")
    assert int(new.input_status) == pairs.NOT_FINITE
    same(new, plain, "output", "s", "y")


def test_an_input_factor_that_has_not_begun_learns_nothing():
    weights, step = np.random.default_rng(0).normal(size=(2, 4, 3))
    waiting = running()._replace(stage=jnp.full((), EMPTY, jnp.int32))
    new = learn(waiting, statistics(0), statistics(1), weights, step, OPTIONS)
    same(new, waiting, "input", "stage")
    assert int(new.input_status) == pairs.NOT_FINITE


@pytest.mark.parametrize(("at", "plus"), [(0, 0), (0, 9), (9, 0), (9, 9)])
def test_only_rounding_at_both_ends_is_refused_for_it(at, plus):
    """A mean cotangent below its rounding error at one end alone has changed."""
    new = call(
        statistics(0)._replace(cotangent_noise=jnp.asarray(float(at))),
        statistics(1)._replace(cotangent_noise=jnp.asarray(1.0 * plus)),
    )
    assert int(new.output_status) == (pairs.ROUNDING if at and plus else pairs.UPDATED)


def test_sums_that_are_not_numbers_are_called_so():
    """As where the loss takes a norm of each parameter by itself, also of the zeros beside them."""
    lost = jax.tree.map(lambda leaf: leaf * jnp.nan, statistics(0))
    new = call(lost, lost)
    same(new, running(), "input", "output", "s", "y")
    assert int(new.output_status) == int(new.input_status) == pairs.NOT_FINITE


def test_the_tolerance_decides():
    strict = dataclasses.replace(OPTIONS, curvature_tolerance=1e6)
    new = call(statistics(0), statistics(1), strict)
    same(new, running(), "input", "output")
    assert int(new.output_status) == int(new.input_status) == pairs.TOO_SMALL
    same(new, call(statistics(0), statistics(1)), "s", "y")  # the averages go on


def test_the_tolerance_is_relative_to_what_the_side_sees():
    """A mean cotangent that is large and hardly changes; a mean input, and a factor so small."""
    shift = 1e8 * jnp.ones(3)
    new = call(
        *(
            one._replace(cotangent_mean=one.cotangent_mean + shift)
            for one in map(statistics, (0, 1))
        )
    )
    assert int(new.output_status) == pairs.TOO_SMALL
    assert int(new.input_status) == pairs.UPDATED

    weights, step = np.random.default_rng(0).normal(size=(2, 4, 3))
    small = running()._replace(input=1e-6 * jnp.eye(4))
    large = statistics(0)._replace(input_mean=1e6 * statistics(0).input_mean)
    new = learn(small, large, statistics(1), weights, step, OPTIONS)
    assert int(new.input_status) == pairs.TOO_SMALL


def test_a_ruined_factor_is_reset_by_itself():
    weights, step = np.random.default_rng(0).normal(size=(2, 4, 3))
    plain = call(statistics(0), statistics(1))
    for side, other, ruin in (("output", "input", -np.eye(3)), ("input", "output", -np.eye(4))):
        state = running()._replace(**{side: jnp.asarray(ruin)})
        new = learn(state, statistics(0), statistics(1), weights, step, OPTIONS)
        assert int(getattr(new, side + "_status")) == pairs.RESET
        assert np.linalg.eigvalsh(getattr(new, side))[0] > 0
        same(new, plain, other, other + "_status", "input_moment", "s", "y", "stage")
