"""Damping reaches its bounds exactly, in every branch, and never divides by nothing."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import strategies as st
from models import relative
from properties import EPS, SIZE, dims, dtypes, lambdas, norm, profiles, seeds

from kfqn_optax import pairs
from kfqn_optax.pairs import Pair

pytestmark = pytest.mark.filterwarnings("error")
damp_powell, damp_second, damp_double = map(
    jax.jit, [pairs.damp_powell, pairs.damp_second, pairs.damp_double]
)


def random_case(seed, d, dtype):
    """A pair of any sign of curvature and a positive definite inverse; 0 behind the d-th entry."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(d, d))
    H = np.eye(SIZE)
    H[:d, :d] = root @ root.T + 0.1 * np.eye(d)
    s, y = rng.normal(size=(2, d)) * 10.0 ** rng.uniform(-3, 3, size=(2, 1))
    s, y = np.pad([s, y], ((0, 0), (0, SIZE - d)))
    return Pair(jnp.asarray(s, dtype), jnp.asarray(y, dtype)), jnp.asarray(H, dtype)


def check_powell_reaches_its_bound(seed, d, dtype, mu):
    """s.y = mu y.Hy, up to the rounding of the terms that s.y is the sum of."""
    pair, H = random_case(seed, d, dtype)
    Hy = H @ pair.y
    after, damped = damp_powell(pair, Hy, mu)
    yHy, sy = float(pair.y @ Hy), float(pair.s @ pair.y)
    if bool(damped):
        assert sy <= mu * yHy
        t = (1 - mu) * yHy / (yHy - sy)
        terms = (t * norm(np.array(pair.s)) + norm(np.array(Hy))) * norm(np.array(pair.y))
        bound = 10 * d * EPS[dtype] * terms
        assert float(after.s @ after.y) == pytest.approx(mu * yHy, rel=1e-6, abs=bound)
    else:
        assert sy > mu * yHy
        np.testing.assert_array_equal(after.s, pair.s)
    np.testing.assert_array_equal(after.y, pair.y)


test_powell_reaches_its_bound, test_powell_reaches_its_bound_soak = profiles(
    check_powell_reaches_its_bound, 150, seeds, dims, dtypes, st.floats(0.05, 0.9)
)


def check_second_damping_reaches_its_bound(seed, d, dtype, damping):
    """For every lambda, those of 1 and above too, where the paper's quotient can blow up."""
    pair, _ = random_case(seed, d, dtype)
    mu = np.sqrt(damping)
    after, damped = damp_second(pair, jnp.asarray(mu, dtype))
    ss, sy = float(pair.s @ pair.s), float(pair.s @ pair.y)
    if bool(damped):
        terms = norm(np.array(pair.s)) * norm(np.array(pair.y)) + (1 + mu) * ss
        bound = 10 * d * EPS[dtype] * terms
        assert float(after.s @ after.y) == pytest.approx(mu * ss, abs=bound)
    else:
        np.testing.assert_array_equal(after.y, pair.y)
        assert sy > mu * ss
    np.testing.assert_array_equal(after.s, pair.s)


test_second_damping_reaches_its_bound, test_second_damping_reaches_its_bound_soak = profiles(
    check_second_damping_reaches_its_bound, 150, seeds, dims, dtypes, lambdas
)


@pytest.mark.parametrize("mu", [1.0, 1.5, 30.0])
def test_second_damping_where_the_denominator_vanishes(mu):
    s = jnp.array([1.0, 2.0])
    after, damped = pairs.damp_second(Pair(s, s), mu)  # s.s - s.y = 0
    assert bool(damped)
    assert float(after.s @ after.y) == pytest.approx(mu * float(s @ s), rel=1e-12)


def check_double_damping_is_the_reference(seed, d, damping):
    pair, H = random_case(seed, d, jnp.float64)
    mu2 = np.sqrt(damping)
    after, by_powell, by_second = damp_double(pair, H @ pair.y, 0.2, mu2)
    s, y, powell, second = reference.damp(np.array(pair.s), np.array(pair.y), np.array(H), mu2)
    assert (bool(by_powell), bool(by_second)) == (powell, second)
    assert relative(after.s, s) < 1e-9
    assert relative(after.y, y) < 1e-9


test_double_damping_is_the_reference, test_double_damping_is_the_reference_soak = profiles(
    check_double_damping_is_the_reference, 100, seeds, dims, lambdas
)


def test_all_four_branches_of_double_damping():
    H = jnp.eye(2)
    e1, e2 = jnp.eye(2)
    branches = {
        (False, False): Pair(e1, e1),
        (True, False): Pair(-e1 * 1e-3, e1 * 1e-3),
        (False, True): Pair(e1, 0.3 * e1 + 0.01 * e2),
        (True, True): Pair(-e1 + 5 * e2, e1),
    }
    for expected, pair in branches.items():
        after, *acted = pairs.damp_double(pair, H @ pair.y, 0.2, 0.5)
        assert tuple(map(bool, acted)) == expected
        assert float(after.s @ after.y) >= 0.2 * float(pair.y @ pair.y) * (1 - 1e-12)
        assert float(after.s @ after.y) >= 0.5 * float(after.s @ after.s) * (1 - 1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_no_change_gives_no_nan(dtype):
    """A dead layer has y = 0; a learning rate of 0 has s = 0 too."""
    zero, s = jnp.zeros(3, dtype), jnp.ones(3, dtype)
    for pair in [Pair(s, zero), Pair(zero, zero), Pair(zero, s)]:
        after, _, _ = pairs.damp_double(pair, pair.y, 0.2, 0.5)
        assert bool(jnp.all(jnp.isfinite(after.s)) & jnp.all(jnp.isfinite(after.y)))
    status = pairs.pair_status(Pair(zero, zero), s, 1e-4)
    assert int(status) == pairs.NOT_POSITIVE


@pytest.mark.parametrize(
    ("s", "y", "reference_norm", "status"),
    [
        ([1.0, 0.0], [1.0, 0.0], 1.0, pairs.UPDATED),
        ([1.0, 0.0], [-1.0, 0.0], 1.0, pairs.NOT_POSITIVE),
        ([1.0, 0.0], [0.0, 1.0], 1.0, pairs.NOT_POSITIVE),
        ([1.0, 0.0], [1e-5, 0.0], 1.0, pairs.TOO_SMALL),
        ([1.0, 0.0], [1e-5, 0.0], 0.01, pairs.UPDATED),
        ([10.0, 0.0], [5e-4, 0.0], 1.0, pairs.TOO_SMALL),  # s.y = 5e-3, for |s|^2 = 100
        ([1.0, 0.0], [np.nan, 0.0], 1.0, pairs.NOT_FINITE),
        ([1.0, 0.0], [np.inf, 0.0], 1.0, pairs.NOT_FINITE),
        ([1.0, 0.0], [1.0, 0.0], np.inf, pairs.NOT_FINITE),
    ],
)
def test_status(s, y, reference_norm, status):
    reference = jnp.array([0.0, reference_norm])
    assert int(pairs.pair_status(Pair(jnp.array(s), jnp.array(y)), reference, 1e-4)) == status


def test_hessian_action():
    pair, A = random_case(3, 4, jnp.float64)
    H = jnp.linalg.inv(A)
    s = H @ pair.s
    made = pairs.hessian_action(s, A @ s, 0.7)
    np.testing.assert_allclose(made.s, s, rtol=1e-12)
    np.testing.assert_allclose(made.y, (A + 0.7 * jnp.eye(SIZE)) @ made.s, rtol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "sy", "status"),
    [
        (jnp.float32, 1e-33, pairs.TOO_SMALL),  # its addends may have been flushed to zero
        (jnp.float32, 1e-30, pairs.UPDATED),
        (jnp.float32, 1e31, pairs.UPDATED),
        (jnp.float32, 1e33, pairs.NOT_FINITE),  # 1 / s.y would soon be
        (jnp.float32, -1e33, pairs.NOT_FINITE),
        (jnp.float64, 1e-33, pairs.UPDATED),
        (jnp.float64, 1e33, pairs.UPDATED),
        (jnp.float64, 1e-300, pairs.TOO_SMALL),
        (jnp.float64, 1e300, pairs.NOT_FINITE),
    ],
)
def test_status_at_the_ends_of_the_range(dtype, sy, status):
    pair = Pair(jnp.array([1.0, 0.0], dtype), jnp.array([sy, 0.0], dtype))
    assert int(pairs.pair_status(pair, jnp.zeros(2, dtype), 1e-4)) == status


@pytest.mark.parametrize(("s", "y"), [(1.0, 1e20), (-1.0, 1e20), (-1e20, 1e19)])
def test_a_pair_whose_curvature_overflows_is_refused(s, y):
    """Nobody knows whether y.Hy = inf asks for damping; the second damping alone does not do."""
    s, y = jnp.array([s, 0.0], jnp.float32), jnp.array([y, 0.0], jnp.float32)
    after, by_powell, _ = pairs.damp_double(Pair(s, y), y, 0.2, 0.5)
    assert int(pairs.pair_status(after, jnp.zeros(2, jnp.float32), 1e-4)) == pairs.NOT_FINITE
    assert not bool(by_powell)


def test_the_shift():
    pair = Pair(jnp.array([1.0, 2.0]), jnp.array([3.0, -4.0]))
    after = pairs.damp_shift(pair, 0.5)
    np.testing.assert_array_equal(after.s, pair.s)
    np.testing.assert_array_equal(after.y, [3.5, -3.0])


@pytest.mark.parametrize(
    ("mu", "gap"),
    [*itertools.product([1.01, 3.0, 30.0], [1e-3, -1e-3, 0.5]), (1.0, 1e-9), (1 - 1e-9, 5e-9)],
)
def test_the_second_damping_leaves_y_short_where_its_weights_would_not(mu, gap):
    """y gets the multiple of s that lacks, and no more, however close s.y is to |s|^2."""
    s, y = jnp.array([1.0, 0.0]), jnp.array([1 - gap, 2.0])
    after, damped = pairs.damp_second(Pair(s, y), mu)
    assert bool(damped)
    np.testing.assert_allclose(after.y, [mu, 2.0], rtol=1e-12)
