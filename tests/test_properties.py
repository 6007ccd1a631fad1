"""What holds for factors after any sequence of pairs, in float32 and float64.

Over lambda from 1e-12 to 1e3, dimensions from 1 to 64, vectors from 1e-20 to 1e20. What float32
cannot compute is refused with a status and leaves the factor as it was, bit for bit.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from properties import (
    EPS,
    SIZE,
    STEPS,
    decades,
    dims,
    dtypes,
    lambdas,
    moment,
    norm,
    profiles,
    seeds,
    sequence,
)

from kfqn_optax import bfgs, lbfgs, pairs
from kfqn_optax.pairs import Pair


@jax.jit
def output_side(s, y, mu, shift):
    """All steps of one output side: the pairs that were offered, the factors, the statuses."""

    def step(H, raw):
        damped, _ = pairs.damp_powell(Pair(*raw), bfgs.apply(H, raw[1]), 0.2)
        double, shifted = pairs.damp_second(damped, mu)[0], pairs.damp_shift(damped, mu)
        pair = Pair(*(jnp.where(shift, a, b) for a, b in zip(shifted, double, strict=True)))
        status = pairs.pair_status(pair, jnp.zeros_like(mu[None]), 0.0)
        H, status = bfgs.update(H, pair, status)
        return H, (pair, H, status)

    return jax.lax.scan(step, jnp.eye(SIZE, dtype=s.dtype), (s, y))[1]


def eigenvalues(H):
    H = np.asarray(H, np.float64)
    return np.linalg.eigvalsh((H + H.T) / 2)


def check_symmetric(H, eps):
    H = np.asarray(H, np.float64)
    assert np.isfinite(H).all()
    assert np.abs(H - H.T).max() <= 4 * STEPS * eps * np.abs(H).max()


def check_output_factors(seed, d, dtype, damping, spread, shift):
    """Symmetric, positive definite, H y = s, within the bounds of the damping; or untouched."""
    eps, mu = EPS[dtype], np.sqrt(damping)
    raw = sequence(seed, d, spread)
    made = output_side(*(jnp.asarray(v, dtype) for v in raw), jnp.asarray(mu, dtype), shift)
    before, smallest, largest = np.eye(SIZE, dtype=dtype), 1.0, 1.0
    (S, Y), factors, statuses = jax.tree.map(np.asarray, made)
    for k in range(STEPS):
        H, status = factors[k], statuses[k]
        if status != pairs.UPDATED:
            assert H.tobytes() == before.tobytes()
            assert spread == 20 or dtype == jnp.float32
            continue
        s, y = np.float64(S[k]), np.float64(Y[k])
        check_symmetric(H, eps)
        ends = eigenvalues(H[:d, :d])[[0, -1]]
        # Eigenvalues may span 1e7 for a small lambda, as many as float32 has numbers.
        assert ends[0] > (0 if mu >= 1e-4 or dtype == jnp.float64 else -d * eps * ends[1])
        sy = s @ y
        blur = 10 * d * eps * norm(s) * norm(y) / sy  # relative error of s.y
        scale = (ends[1] + largest) * norm(y) + norm(s)
        assert norm(H.astype(np.float64) @ y - s) <= blur * scale
        # |s|^2 / s.y <= 1 / mu; the error of s.y is that of the terms it is the sum of.
        loose = 10 * d * eps * (norm(s) * norm(raw.y[k]) / (mu * norm(s) ** 2) + 1 / mu + 1)
        assert mu * (norm(s) / sy) * norm(s) <= 1 + loose
        # What an update can add to the largest eigenvalue, if H stays positive definite.
        yHy = y @ before.astype(np.float64) @ y
        step = np.sqrt(max(yHy, 0) / sy * (norm(s) / sy) * norm(s))
        bound = (np.sqrt(largest) + step) ** 2 + (norm(s) / sy) * norm(s)
        assert ends[1] <= bound * (1 + blur + d * eps * largest)
        before, (smallest, largest) = H, (min(1, ends[0]), max(1, ends[1]))
    assert smallest <= 1 <= largest


booleans = st.booleans()
test_output_factors, test_output_factors_soak = profiles(
    check_output_factors, 200, seeds, dims, dtypes, lambdas, decades, booleans
)


@functools.partial(jax.jit, static_argnames="steps")
def input_side(H, A, inputs, mu, steps):
    """All steps of one input side with a fixed A; inputs [n, d] are taken in turns."""

    def step(H, k):
        s = bfgs.apply(H, inputs[k % len(inputs)])
        pair = pairs.hessian_action(s, bfgs.apply(A, s), mu)
        status = pairs.pair_status(pair, jnp.zeros_like(mu[None]), 0.0)
        H, status = bfgs.update(H, pair, status)
        return H, (pair, H, status)

    return jax.lax.scan(step, H, jnp.arange(steps))[1]


def check_input_factors(seed, d, dtype, damping):
    """Of R H R with R^2 = A + lambda I, every eigenvalue goes towards 1, none past it or away.

    (Fletcher's property of the BFGS update.) So H stays between its start and the damped inverse.
    """
    eps, mu = EPS[dtype], np.sqrt(damping)
    A, a = moment(seed, d)
    H0 = np.eye(SIZE) / (mu + np.trace(A) / d)
    made = input_side(*(jnp.asarray(v, dtype) for v in (H0, A, a, mu)), STEPS)
    (S, Y), factors, statuses = jax.tree.map(np.asarray, made)
    spectrum, axes = np.linalg.eigh(A[:d, :d] + mu * np.eye(d))
    root = axes * np.sqrt(np.maximum(spectrum, mu * (1 - 1e-6))) @ axes.T
    low, high = eigenvalues(root @ H0[:d, :d] @ root)[[0, -1]]
    slack = 40 * eps * max(spectrum[-1] / mu, 1)  # R H R has the errors of H times the condition
    before = H0.astype(dtype)
    for s, y, H, status in zip(np.float64(S), np.float64(Y), factors, statuses, strict=True):
        if status not in (pairs.UPDATED, pairs.RESET):
            assert H.tobytes() == before.tobytes()
            assert norm(s) * norm(y) < 1e-25
            continue
        check_symmetric(H, eps)
        ends = eigenvalues(H[:d, :d])[[0, -1]]
        assert ends[0] > (0 if slack < 0.5 else -d * eps * ends[1])
        now = eigenvalues(root @ H[:d, :d].astype(np.float64) @ root)[[0, -1]]
        if slack < 0.5 and status == pairs.UPDATED:
            assert norm(H.astype(np.float64) @ y - s) <= slack * norm(s)
            assert now[0] >= min(low, 1) - slack
            assert now[1] <= max(high, 1) + slack * max(high, 1)
        low, high, before = now[0], now[1], H


test_input_factors, test_input_factors_soak = profiles(
    check_input_factors, 100, seeds, dims, dtypes, lambdas
)


def check_the_damped_inverse_is_learned(seed, d, damping):
    """Varied inputs lead to (A + lambda I)^-1, whatever A and where H starts."""
    mu = np.sqrt(damping)
    A, _ = moment(seed, d, 12)
    inputs = np.random.default_rng(seed).normal(size=(97, 12)) * (np.arange(12) < d)
    A /= max(np.abs(A).max(), 1)
    made = input_side(*map(jnp.asarray, (np.eye(12), A, inputs, mu)), 1500)
    expected = np.linalg.inv(A[:d, :d] + mu * np.eye(d))
    difference = np.asarray(made[1][-1])[:d, :d] - expected
    assert np.abs(difference).max() < 1e-3 * np.abs(expected).max()


test_the_damped_inverse_is_learned, test_the_damped_inverse_is_learned_soak = profiles(
    check_the_damped_inverse_is_learned, 40, seeds,
    st.integers(1, 12),
    st.floats(-3, 1).map(lambda e: 10.0**e),
)  # fmt: skip


@jax.jit
def limited_memory(s, y, mu):
    """A dense factor and one of limited memory with room for all pairs, fed with the same pairs."""

    def step(state, raw):
        H, memory = state
        pair, _, _ = pairs.damp_double(Pair(*raw), bfgs.apply(H, raw[1]), 0.2, mu)
        offered = pairs.pair_status(pair, jnp.zeros_like(mu[None]), 0.0)
        dense, status = bfgs.update(H, pair, offered)
        stored, taken = lbfgs.update(memory, pair, status)
        dense = jnp.where(taken == pairs.UPDATED, dense, H)
        return (dense, stored), (dense, lbfgs.dense(stored), taken)

    start = jnp.eye(SIZE, dtype=s.dtype), lbfgs.init(SIZE, STEPS, s.dtype)
    return jax.lax.scan(step, start, (s, y))[1]


def check_limited_memory_is_dense_while_there_is_room(seed, d, dtype, damping, spread):
    raw = sequence(seed, d, spread)
    made = limited_memory(*(jnp.asarray(v, dtype) for v in raw), jnp.asarray(damping**0.5, dtype))
    dense, limited, statuses = jax.tree.map(np.asarray, made)
    before = limited[0] if statuses[0] else None
    worst = 1.0
    for H, expected, status in zip(limited, dense, statuses, strict=True):
        if status != pairs.UPDATED and before is not None:
            assert H.tobytes() == before.tobytes()
        check_symmetric(H, 10 * EPS[dtype] * worst)
        ends = eigenvalues(expected[:d, :d])[[0, -1]]
        worst = max(worst, ends[1] / max(ends[0], 1e-300))
        if d * EPS[dtype] * worst < 1e-3:
            assert eigenvalues(H[:d, :d])[0] > 0
            close = 100 * d * EPS[dtype] * worst * np.abs(expected).max()
            assert np.abs(np.float64(H) - expected).max() <= close
        before = H


test_limited_memory_is_dense, test_limited_memory_is_dense_soak = profiles(
    check_limited_memory_is_dense_while_there_is_room, 80, seeds, dims, dtypes, lambdas, decades
)
