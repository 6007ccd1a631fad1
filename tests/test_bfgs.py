"""The dense factor: formula, secant equation, symmetry, positive definiteness, drift."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from models import relative

from kfqn_optax import bfgs, pairs
from kfqn_optax.pairs import Pair

UPDATED = jnp.int32(pairs.UPDATED)


def positive_case(seed, d):
    rng = np.random.default_rng(seed)
    root, curvature = rng.normal(size=(2, d, d))
    s = rng.normal(size=d)
    y = (curvature @ curvature.T + 0.1 * np.eye(d)) @ s
    return jnp.asarray(root @ root.T + 0.1 * np.eye(d)), Pair(jnp.asarray(s), jnp.asarray(y))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 5, 16]))
def test_update_is_the_product_form(seed, d):
    H, pair = positive_case(seed, d)
    after, status = bfgs.update(H, pair, UPDATED)
    expected, _ = reference.bfgs(np.array(H), np.array(pair.s), np.array(pair.y), np.zeros(d))
    assert int(status) == pairs.UPDATED
    assert relative(after, expected) < 1e-7
    assert relative(after @ pair.y, pair.s) < 1e-7  # the secant equation
    assert float(jnp.linalg.eigvalsh(after)[0]) > 0


@pytest.mark.parametrize("reason", [s for s in pairs.STATUS_WORDS if s != pairs.UPDATED])
def test_a_refused_pair_leaves_every_bit(reason):
    H, pair = positive_case(0, 5)
    for bad in [pair, Pair(pair.s * jnp.nan, pair.y), Pair(pair.s, pair.y * jnp.inf)]:
        after, status = bfgs.update(H, bad, jnp.int32(reason))
        np.testing.assert_array_equal(after, H)
        assert int(status) == reason


def test_an_update_that_would_overflow_is_refused():
    H = jnp.eye(2, dtype=jnp.float32)
    tiny = jnp.array([1e-20, 0.0], jnp.float32)
    pair = Pair(jnp.array([1e20, 0.0], jnp.float32), tiny)  # s.y = 1, s s^T overflows
    after, status = bfgs.update(H, pair, UPDATED)
    assert int(status) == pairs.NOT_FINITE
    np.testing.assert_array_equal(after, H)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_inverse(dtype):
    rng = np.random.default_rng(0)
    root = rng.normal(size=(6, 4))
    A = jnp.asarray(root @ root.T, dtype)  # singular without damping
    H = bfgs.inverse(A, jnp.asarray(0.5, dtype))
    expected = np.linalg.inv(np.array(A, np.float64) + 0.5 * np.eye(6))
    assert relative(H, expected) < (1e-12 if dtype == jnp.float64 else 1e-5)
    np.testing.assert_array_equal(H, H.T)


def test_inverse_of_what_cannot_be_inverted_is_still_positive_definite():
    A = jnp.full((3, 3), 1e30, jnp.float32)  # the damping is lost in rounding
    H = bfgs.inverse(A, jnp.float32(1e-3))
    assert bool(jnp.all(jnp.isfinite(H)))
    assert float(jnp.linalg.eigvalsh(H)[0]) > 0


def test_hessian_action_updates_near_the_damped_inverse():
    """Fed with varied inputs, the input factor learns (A + damping I)^-1 without inverting."""
    rng = np.random.default_rng(1)
    root = rng.normal(size=(8, 8))
    A = jnp.asarray(root @ root.T / 8)
    H = jnp.eye(8)
    for a in jnp.asarray(rng.normal(size=(200, 8))):
        H, _ = bfgs.update(H, pairs.hessian_action(H @ a, A @ (H @ a), 0.3), UPDATED)
    assert relative(H, np.linalg.inv(A + 0.3 * np.eye(8))) < 1e-4


@pytest.mark.parametrize("d", [1, 16])
def test_float32_stays_symmetric_and_positive_definite(d):
    """20,000 double-damped updates with noise of the size that training has."""
    curvature = np.diag(np.linspace(0.01, 30, d))
    mu2 = np.float32(np.sqrt(0.3))

    def step(carry, key):
        H, s, y = carry
        raw, noise = jax.random.normal(key, (2, d), jnp.float32)
        s = 0.9 * s + 0.1 * raw
        y = 0.9 * y + 0.1 * (jnp.asarray(curvature, jnp.float32) @ raw + noise)
        pair, _, _ = pairs.damp_double(Pair(s, y), H @ y, 0.2, mu2)
        H, status = bfgs.update(H, pair, pairs.pair_status(pair, raw, 1e-4))
        return (H, s, y), (jnp.max(jnp.abs(H - H.T)), jnp.max(jnp.abs(H)), status)

    start = (jnp.eye(d, dtype=jnp.float32), jnp.zeros(d, jnp.float32), jnp.zeros(d, jnp.float32))
    keys = jax.random.split(jax.random.key(0), 20_000)
    (H, _, _), (asymmetry, size, status) = jax.jit(lambda: jax.lax.scan(step, start, keys))()
    assert float(jnp.mean(status == pairs.UPDATED)) > 0.9
    assert float(jnp.max(asymmetry / size)) < 1e-5
    eigenvalues = np.linalg.eigvalsh(np.array((H + H.T) / 2, np.float64))
    assert eigenvalues[0] > 0
    # The positive term of an update is at most 1/mu2, so the factor cannot run away.
    assert eigenvalues[-1] < 1000
