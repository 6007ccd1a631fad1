"""The factor that forgets: against BFGS on matrices, and what it refuses."""

import jax.numpy as jnp
import numpy as np
import pytest
from block_reference import age_of, made_of
from hypothesis import given, settings
from hypothesis import strategies as st
from models import relative
from steps import POWELL, dense, equal, grow

from kfqn_optax import generations, inverse, pairs


def start(d, q, window, scale=1.0, dtype=jnp.float64):
    return generations.init(d, q, window, dtype)._replace(scale=jnp.asarray(scale, dtype))


def reference(steps, window, d, scale):
    """What the elder generation is after all these steps."""
    H, _ = made_of(steps[-age_of(len(steps), window) :], d, scale, POWELL)
    return H


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([(6, 3, 4), (5, 1, 2), (3, 4, 6)]),
    st.floats(-3, 3),
    st.floats(-3, 3),
)
def test_bfgs_of_the_last_steps(seed, sizes, log_s, log_scale):
    """At every step, through windows and beyond: the matrix that BFGS makes of the same pairs."""
    d, q, window = sizes
    rng = np.random.default_rng(seed)
    H, steps, scale = start(d, q, window, 10**log_scale), [], 10**log_scale
    assert relative(dense(H), scale * np.eye(d)) < 1e-15
    for _ in range(2 * window + 3):
        S, Y = 10**log_s * rng.normal(size=(q, d)), rng.normal(size=(q, d))
        H, taken = grow(H, jnp.asarray(S), jnp.asarray(Y))
        steps.append((S, Y))
        expected = reference(steps, window, d, scale)
        assert int(generations.elder(H).count) == q * age_of(len(steps), window)
        assert relative(dense(H), expected) < 1e-6
        M = rng.normal(size=(2, d))
        assert relative(inverse.apply_to_rows(H, jnp.asarray(M)), M @ expected) < 1e-6
        np.testing.assert_array_equal(taken.status, np.full(q, pairs.UPDATED))


def test_pairs_that_are_of_no_use():
    """One by one they are left out; where all are, the factor stays to the last bit."""
    rng = np.random.default_rng(0)
    H, steps = start(5, 3, 4), []
    for _ in range(9):
        S = rng.normal(size=(3, 5))
        Y = 2 * S
        bad, zero = Y.copy(), Y.copy()
        bad[1], zero[2] = np.nan, 0
        same, taken = grow(H, jnp.asarray(S), jnp.full((3, 5), jnp.nan))
        equal(same, H)
        assert taken.status.tolist() == [pairs.NOT_FINITE] * 3
        same, taken = grow(H, jnp.zeros((3, 5)), jnp.zeros((3, 5)))
        equal(same, H)
        assert taken.status.tolist() == [pairs.NOT_POSITIVE] * 3
        for spoiled, left_out, word in ((bad, 1, "NOT_FINITE"), (zero, 2, "NOT_POSITIVE")):
            H, taken = grow(H, jnp.asarray(S), jnp.asarray(spoiled))
            kept = [i for i in range(3) if i != left_out]
            steps.append((S[kept], Y[kept]))
            assert taken.status[left_out] == getattr(pairs, word)
            assert [int(taken.status[i]) for i in kept] == [pairs.UPDATED] * 2
            assert not taken.damped.any()
            assert relative(dense(H), reference(steps, 4, 5, 1.0)) < 1e-10


def test_a_step_that_would_overflow_is_left_out_as_a_whole():
    rng = np.random.default_rng(0)
    H, _ = grow(start(5, 3, 4), *[jnp.asarray(rng.normal(size=(3, 5)))] * 2)
    S = rng.normal(size=(3, 5))
    Y = 2 * S
    S[2] = 1e160 * np.abs(S[2])
    Y[2] = 1e-150 * np.abs(Y[2])
    same, taken = grow(H, jnp.asarray(S), jnp.asarray(Y))
    equal(same, H)
    assert taken.status.tolist() == [pairs.NOT_FINITE] * 3
    assert not taken.damped.any()
    # One generation is enough, the younger one too.
    S = jnp.asarray(rng.normal(size=(3, 5)))
    for i in range(2):
        ruined = H._replace(s=H.s.at[i].multiply(1e200))
        same, taken = grow(ruined, S, 2 * S)
        equal(same, ruined)
        assert taken.status.tolist() == [pairs.NOT_FINITE] * 3


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_float32_does_not_drift(scale):
    """After 3,000 steps of pairs of an ill-conditioned matrix: as near as after the first ones."""
    d, q, window = 40, 4, 8
    rng = np.random.default_rng(1)
    Q, _ = np.linalg.qr(rng.normal(size=(d, d)))
    A = (Q * np.logspace(-3, 3, d)) @ Q.T
    H, steps, errors = start(d, q, window, scale, jnp.float32), [], []
    for t in range(3000):
        S = rng.normal(size=(q, d)).astype(np.float32)
        Y = (S @ A + 0.05 * rng.normal(size=(q, d))).astype(np.float32)
        H, taken = grow(H, jnp.asarray(S), jnp.asarray(Y))
        assert not np.any(taken.status)
        steps.append((S.astype(float), Y.astype(float)))
        if t % 250 in (10, 11):
            exact = reference(steps, window, d, scale)
            made = np.asarray(dense(H), float)
            errors.append(relative(made, exact))
            assert np.linalg.eigvalsh((made + made.T) / 2)[0] > -1e-6 * scale
    assert max(errors[2:]) < 3 * max(errors[:2]) + 1e-5
    assert max(errors) < 1e-3
