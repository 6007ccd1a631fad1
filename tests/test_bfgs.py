"""The dense factor: formula, refusals, drift, and what becomes of a ruined one."""

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
update = jax.jit(bfgs.update)


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
    after, status = update(H, pair, UPDATED)
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
        H, _ = update(H, pairs.hessian_action(H @ a, A @ (H @ a), 0.3), UPDATED)
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


# --- the guard ------------------------------------------------------------------------------------

ruined_pair = Pair(jnp.array([0.1, 1.0, 0.2]), jnp.array([0.1, 1.0, 0.0]))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_a_factor_that_is_not_positive_definite_starts_anew(dtype):
    """y.Hy < 0: the update goes to (s.y / y.y) I instead."""
    H = jnp.diag(jnp.array([1.0, -0.5, 1e-3], dtype))
    s, y = Pair(*(v.astype(dtype) for v in ruined_pair))
    after, status = bfgs.update(H, Pair(s, y), UPDATED)
    assert int(status) == pairs.RESET
    anew = float(s @ y / (y @ y)) * np.eye(3)
    expected, _ = reference.bfgs(anew, np.array(s), np.array(y), np.zeros(3))
    assert relative(after, expected) < (1e-6 if dtype == jnp.float32 else 1e-14)
    assert float(jnp.linalg.eigvalsh(after)[0]) > 0
    assert after.dtype == dtype


@pytest.mark.parametrize(
    ("dtype", "shrinks", "status"),
    [
        (jnp.float32, 1e4, pairs.UPDATED),
        (jnp.float32, 1e6, pairs.RESET),
        (jnp.float64, 1e6, pairs.UPDATED),
        (jnp.float64, 1e15, pairs.RESET),
    ],
)
def test_an_update_that_would_leave_no_digits_starts_anew(dtype, shrinks, status):
    """As where an input that was dead, so that H is 1 / lambda there, comes alive."""
    H = jnp.diag(jnp.array([shrinks, 1.0, 1.0], dtype))
    s = jnp.array([1.0, 0.5, 0.1], dtype)
    after, was = bfgs.update(H, Pair(s, s), UPDATED)
    assert int(was) == status
    assert relative(after @ s, s) < (1e-1 if dtype == jnp.float32 else 1e-9)
    assert float(jnp.linalg.eigvalsh(after.astype(jnp.float64))[0]) > 0


def test_a_ruined_factor_is_kept_where_the_pair_is_refused_or_no_scale_fits():
    H = -jnp.eye(3, dtype=jnp.float32)
    pair = Pair(*(v.astype(jnp.float32) for v in ruined_pair))
    after, status = bfgs.update(H, pair, jnp.int32(pairs.TOO_SMALL))
    assert int(status) == pairs.TOO_SMALL
    np.testing.assert_array_equal(after, H)
    after, status = bfgs.update(H, Pair(pair.s, pair.y * 1e25), UPDATED)  # y.y overflows
    assert int(status) == pairs.NOT_FINITE
    np.testing.assert_array_equal(after, H)


def test_one_of_many_is_reset():
    """Under vmap, as for blocks."""
    H = jnp.stack([jnp.eye(3), -jnp.eye(3), 2 * jnp.eye(3)])
    pair = jax.tree.map(lambda v: jnp.stack([v] * 3), ruined_pair)
    after, status = jax.vmap(bfgs.update)(H, pair, jnp.zeros(3, jnp.int32))
    np.testing.assert_array_equal(status, [pairs.UPDATED, pairs.RESET, pairs.UPDATED])
    for i in (0, 2):
        assert relative(after[i], bfgs.update(H[i], ruined_pair, UPDATED)[0]) < 1e-14
    assert float(jnp.linalg.eigvalsh(after[1])[0]) > 0


def test_adding_nothing_changes_no_bit():
    H = jnp.array([[1.0, -0.0], [-0.0, 1.0]])
    nothing, _ = bfgs.change(Pair(jnp.ones(2), -jnp.ones(2)), jnp.ones(2), jnp.int32(1))
    assert np.asarray(jax.jit(bfgs.add)(H, nothing)).tobytes() == np.asarray(H).tobytes()


def test_jumping_inputs_ruin_a_factor_in_float32_without_the_guard():
    """Spectra of A that change by up to 4 decades at once, some inputs dead, lambda 1e-12.

    The plain formula loses most factors for good.
    """
    runs, steps, d, mu = 16, 300, 12, np.float32(1e-6)
    rng = np.random.default_rng(0)
    sizes = 10.0 ** rng.uniform(-2, 2, size=(runs, steps // 30, d))
    sizes *= rng.random(sizes.shape) > 0.2
    x = (rng.normal(size=(runs, steps, 8, d)) + 0.5) * np.repeat(sizes, 30, axis=1)[:, :, None]
    x = np.float32(x @ np.linalg.qr(rng.normal(size=(runs, d, d)))[0][:, None])

    def step(carry, x):
        A, *factors = carry
        A = 0.9 * A + 0.1 * x.T @ x / 8
        learned = []
        for H, guarded in zip(factors, (True, False), strict=True):
            s = bfgs.apply(H, jnp.mean(x, axis=0))
            pair = pairs.hessian_action(s, A @ s, mu)
            status = pairs.pair_status(pair, jnp.zeros(1, jnp.float32), 1e-4)
            made, status = bfgs.update(H, pair, status)
            if not guarded:
                rho, Hy = 1 / pairs.dot(*pair), bfgs.apply(H, pair.y)
                w = (rho * pairs.dot(pair.y, Hy) + 1) * rho / 2 * s - rho * Hy
                plain = H + s[:, None] * w[None, :] + w[:, None] * s[None, :]
                made = jnp.where(jnp.isfinite(plain).all(), plain, H)
            learned.append((made, status))
        (H, status), (plain, _) = learned
        return (A, H, plain), (H, plain, status)

    def run(x, A, H):
        return jax.lax.scan(step, (A, H, H), x)[1]

    A = np.swapaxes(x[:, 0], 1, 2) @ x[:, 0] / 8
    H = np.float32(np.linalg.inv(np.float64(A) + mu * np.eye(d)))
    guarded, plain, status = jax.jit(jax.vmap(run))(x, A, (H + np.swapaxes(H, 1, 2)) / 2)
    lost = [
        np.mean(np.linalg.eigvalsh(np.float64(H + np.swapaxes(H, -1, -2)))[..., 0] <= 0)
        for H in (guarded, plain)
    ]
    assert lost[0] < 0.1
    assert lost[1] > 0.3
    assert 0 < np.mean(status == pairs.RESET) < 0.02
