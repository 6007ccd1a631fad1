"""Damping reaches its bounds exactly, in every branch, and never divides by nothing."""

import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from models import relative

from kfqn_optax import pairs
from kfqn_optax.pairs import Pair

pytestmark = pytest.mark.filterwarnings("error")
seeds = st.integers(0, 2**32 - 1)
dims = st.sampled_from([1, 2, 5, 12])  # few shapes: each is compiled
dtypes = st.sampled_from([jnp.float32, jnp.float64])
lambdas = st.floats(-12, 3).map(lambda e: 10.0**e)


def random_case(seed, d, dtype):
    """A pair of any sign of curvature and a positive definite inverse."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(d, d))
    H = root @ root.T + 0.1 * np.eye(d)
    s = rng.normal(size=d) * 10.0 ** rng.uniform(-3, 3)
    y = rng.normal(size=d) * 10.0 ** rng.uniform(-3, 3)
    return Pair(jnp.asarray(s, dtype), jnp.asarray(y, dtype)), jnp.asarray(H, dtype)


@settings(max_examples=200, deadline=None)
@given(seeds, dims, dtypes, st.floats(0.05, 0.9))
def test_powell_reaches_its_bound(seed, d, dtype, mu):
    pair, H = random_case(seed, d, dtype)
    Hy = H @ pair.y
    after, damped = pairs.damp_powell(pair, Hy, mu)
    yHy = float(pair.y @ Hy)
    tolerance = 1e-10 if dtype == jnp.float64 else 1e-3
    if bool(damped):
        assert float(pair.s @ pair.y) <= mu * yHy
        assert float(after.s @ after.y) == pytest.approx(mu * yHy, rel=tolerance)
    else:
        assert float(pair.s @ pair.y) > mu * yHy
        assert after.s is not pair.s
        np.testing.assert_array_equal(after.s, pair.s)
    np.testing.assert_array_equal(after.y, pair.y)


@settings(max_examples=200, deadline=None)
@given(seeds, dims, dtypes, lambdas)
def test_second_damping_reaches_its_bound(seed, d, dtype, damping):
    """For every lambda, those of 1 and above too, where the paper's quotient can blow up."""
    pair, _ = random_case(seed, d, dtype)
    mu = np.sqrt(damping)
    after, damped = pairs.damp_second(pair, mu)
    ss, sy = float(pair.s @ pair.s), float(pair.s @ pair.y)
    if bool(damped):
        # The error of s.y is that of a difference of terms of size |s||y|.
        size = float(jnp.linalg.norm(pair.s) * jnp.linalg.norm(after.y)) + abs(sy) + ss
        bound = 50 * float(jnp.finfo(dtype).eps) * size
        stretch = float(jnp.linalg.norm(after.y) / jnp.maximum(jnp.linalg.norm(pair.y), 1e-30))
        assert float(after.s @ after.y) == pytest.approx(mu * ss, abs=bound * max(stretch, 1))
    else:
        np.testing.assert_array_equal(after.y, pair.y)
        assert sy > mu * ss
    np.testing.assert_array_equal(after.s, pair.s)


@pytest.mark.parametrize("mu", [1.0, 1.5, 30.0])
def test_second_damping_where_the_denominator_vanishes(mu):
    s = jnp.array([1.0, 2.0])
    after, damped = pairs.damp_second(Pair(s, s), mu)  # s.s - s.y = 0
    assert bool(damped)
    assert float(after.s @ after.y) == pytest.approx(mu * float(s @ s), rel=1e-12)


@settings(max_examples=200, deadline=None)
@given(seeds, dims, st.floats(-6, -0.1).map(lambda e: 10.0**e))
def test_double_damping_is_the_reference(seed, d, damping):
    pair, H = random_case(seed, d, jnp.float64)
    mu2 = np.sqrt(damping)
    after, by_powell, by_second = pairs.damp_double(pair, H @ pair.y, 0.2, mu2)
    s, y, powell, second = reference.damp(np.array(pair.s), np.array(pair.y), np.array(H), mu2)
    assert (bool(by_powell), bool(by_second)) == (powell, second)
    assert relative(after.s, s) < 1e-9
    assert relative(after.y, y) < 1e-9


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
    np.testing.assert_allclose(made.y, (A + 0.7 * jnp.eye(4)) @ made.s, rtol=1e-12)
