"""The limited-memory factor: its matrix, what it forgets, what it refuses, float32."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from models import relative

from kfqn_optax import lbfgs, pairs
from kfqn_optax.pairs import Pair

UPDATED = jnp.int32(pairs.UPDATED)
REFUSED = [reason for reason in pairs.STATUS_WORDS if reason != pairs.UPDATED]
MU2 = np.sqrt(0.3)

update, dense = map(jax.jit, [lbfgs.update, lbfgs.dense])


def averaged_pairs(seed, d, count):
    """Double-damped running averages, as in training: consecutive pairs are nearly parallel."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(d, d))
    curvature = root @ root.T - 0.5 * np.eye(d)  # not always positive
    s, y, H = np.zeros(d), np.zeros(d), np.eye(d)
    for _ in range(count):
        raw, noise = rng.normal(size=(2, d))
        s, y = 0.9 * s + 0.1 * raw, 0.9 * y + 0.1 * (curvature @ raw + noise)
        u, v, _, _ = reference.damp(s, y, H, MU2)
        H, _ = reference.bfgs(H, u, v, np.zeros(d))
        yield Pair(jnp.asarray(u), jnp.asarray(v))


def dense_of(stored, d):
    """The definition: BFGS of the identity with the stored pairs, oldest first."""
    H = np.eye(d)
    for pair in stored:
        H, _ = reference.bfgs(H, np.array(pair.s), np.array(pair.y), np.zeros(d))
    return H


def filled(d, memory_size, count, dtype=jnp.float64):
    """A factor that has seen ``count`` pairs."""
    H = lbfgs.init(d, memory_size, dtype)
    for s, y in averaged_pairs(1, d, count):
        H, status = update(H, Pair(s.astype(dtype), y.astype(dtype)), UPDATED)
        assert int(status) == pairs.UPDATED
    return H


def assert_same_bits(H, expected):
    jax.tree.map(np.testing.assert_array_equal, H, expected)


@pytest.mark.parametrize("d", [1, 3, 6])
@pytest.mark.parametrize("memory_size", [1, 2, 4, 9])
def test_it_is_bfgs_with_the_last_pairs(memory_size, d):
    H, stored = lbfgs.init(d, memory_size, jnp.float64), []
    np.testing.assert_array_equal(dense(H), np.eye(d))
    for k, pair in enumerate(averaged_pairs(0, d, 3 * memory_size + 2)):
        status = jnp.int32(pairs.TOO_SMALL if k % 5 == 3 else pairs.UPDATED)
        if int(status) == pairs.UPDATED:
            stored = [*stored, pair][-memory_size:]
        H, _ = update(H, pair, status)
        rows = memory_size - len(stored)
        assert int(H.count) == len(stored)
        np.testing.assert_array_equal(H.s[rows:], [pair.s for pair in stored])
        np.testing.assert_array_equal(H.y[rows:], [pair.y for pair in stored])
        assert all(not np.any(field[:rows]) for field in [H.s, H.y, H.sy, H.R_inverse])
        assert not np.any(H.R_inverse[:, :rows])
        assert relative(dense(H), dense_of(stored, d)) < 1e-11
    assert rows == 0


@pytest.mark.parametrize("d", [1, 3, 30])
@pytest.mark.parametrize("memory_size", [1, 7])
def test_secant_equation_and_positive_definiteness(memory_size, d):
    H = lbfgs.init(d, memory_size, jnp.float64)
    for pair in averaged_pairs(2, d, 20):
        H, _ = update(H, pair, UPDATED)
        matrix = dense(H)
        assert relative(lbfgs.apply(H, pair.y), pair.s) < 1e-11
        assert relative(matrix.T, matrix) < 1e-13
        assert np.linalg.eigvalsh(matrix)[0] > 0


def test_apply_is_a_product_with_the_matrix():
    H = filled(d=6, memory_size=4, count=7)
    vectors = jnp.asarray(np.random.default_rng(0).normal(size=(6, 9)))
    product = lbfgs.apply(H, vectors)
    assert relative(product, dense(H) @ vectors) < 1e-13
    assert lbfgs.apply(H, vectors[:, 2]).shape == (6,)
    assert relative(lbfgs.apply(H, vectors[:, 2]), product[:, 2]) < 1e-13
    assert relative(lbfgs.apply_to_rows(H, vectors.T), product.T) < 1e-13


@pytest.mark.parametrize("count", [0, 2, 7])
@pytest.mark.parametrize("reason", REFUSED)
def test_a_refused_pair_leaves_every_bit(reason, count):
    H = filled(d=3, memory_size=4, count=count)
    ones, zeros = jnp.ones(3), jnp.zeros(3)
    for s, y in [(ones, ones), (zeros, zeros), (ones * jnp.nan, ones), (ones, ones * jnp.inf)]:
        after, status = update(H, Pair(s, y), jnp.int32(reason))
        assert int(status) == reason
        assert_same_bits(after, H)


@pytest.mark.parametrize("count", [0, 2, 7])
@pytest.mark.parametrize(
    ("s", "y"),
    [
        ([1e20, 0.0, 0.0], [1e-20, 0.0, 0.0]),  # s.y = 1, but H would hold 1e40
        ([1e20, -1e20, 0.0], [1e-20, -1e-20, 0.0]),  # the same, invisible to a sum over the rows
        ([1e-15, 0.0, 0.0], [1e-15, 1e30, 0.0]),  # y s^T / s.y holds 1e45
        ([1e20, 0.0, 0.0], [1e20, 0.0, 0.0]),  # s.y itself
        ([1.0, 0.0, 0.0], [2.0**126] * 3),  # y.q of H times (1, -1, -1)
        ([1.0, 0.0, 0.0], [1.0, np.inf, 0.0]),
        ([np.nan, 0.0, 0.0], [1.0, 0.0, 0.0]),
    ],
)
def test_a_pair_that_would_overflow_is_refused(s, y, count):
    H = filled(3, 4, count, jnp.float32)
    after, status = update(H, Pair(jnp.float32(s), jnp.float32(y)), UPDATED)
    assert int(status) == pairs.NOT_FINITE
    assert_same_bits(after, H)


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize(
    ("dtype", "sy", "across", "status"),
    [
        # A pair by itself stretches the identity by (sy^2 + across^2) / sy^2, and by |s|^2 / s.y.
        (jnp.float32, 1.0, 280.0, pairs.UPDATED),
        (jnp.float32, 1.0, 300.0, pairs.RESET),  # 90,000 is more than 84,000
        (jnp.float32, 10.0, 300.0, pairs.UPDATED),
        (jnp.float32, 10.0, 1500.0, pairs.UPDATED),  # 22,500, and s.y asks for 0.1 along s
        (jnp.float32, 0.1, 90.0, pairs.UPDATED),  # 810,000, where s.y asks for 10 along s
        (jnp.float32, 0.1, 95.0, pairs.RESET),
        (jnp.float64, 1.0, 6e6, pairs.UPDATED),
        (jnp.float64, 1.0, 7e6, pairs.RESET),
    ],
)
def test_a_factor_that_rounding_would_take_is_emptied(dtype, sy, across, status, size):
    """Whatever the units of the pair."""
    H = filled(3, 4, 7, dtype)
    empty = lbfgs.init(3, 4, dtype)
    s, y = np.array([1.0, 0, 0]) * size, np.array([sy, across, 0]) * size
    pair = Pair(jnp.asarray(s, dtype), jnp.asarray(y, dtype))
    after, was = update(empty, pair, UPDATED)
    assert int(was) == status
    assert int(after.count) == (status == pairs.UPDATED)
    if status == pairs.RESET:
        assert_same_bits(after, empty)
        more = Pair(pair.s, pair.y * jnp.asarray([1, 100, 1], dtype))
        after, was = update(H, more, UPDATED)
        assert int(was) == pairs.RESET
        assert_same_bits(after, empty)
        after, was = update(H, more, jnp.int32(pairs.TOO_SMALL))
        assert int(was) == pairs.TOO_SMALL
        assert_same_bits(after, H)


def test_a_pair_that_stretches_what_earlier_pairs_made():
    """Neither pair by itself is too much; the second stands on the first."""
    s, y = np.array([[1.0, 0, 0], [0, 1, 0]]), np.array([[1.0, 10, 0], [0, 1, 100]])
    first, second = (Pair(jnp.float32(a), jnp.float32(b)) for a, b in zip(s, y, strict=True))
    H, status = update(lbfgs.init(3, 4, jnp.float32), second, UPDATED)
    assert int(status) == pairs.UPDATED
    H, status = update(H, first, UPDATED)  # y.Hy is some 10^2 (1 + 100^2)
    assert int(status) == pairs.RESET
    assert not np.any(H.s)
    H, _ = update(lbfgs.init(3, 4, jnp.float32), first, UPDATED)
    assert int(update(H, second, UPDATED)[1]) == pairs.UPDATED
    # Of what the second stretches, all is along the s of the first.
    first, second = (
        Pair(*jnp.float32([[1, 0, 0]] * 2)),
        Pair(*jnp.float32([[0, 1, 0], [300, 1, 0]])),
    )
    H, _ = update(lbfgs.init(3, 4, jnp.float32), first, UPDATED)
    assert int(update(H, second, UPDATED)[1]) == pairs.RESET


@pytest.mark.parametrize("scale", [1e-15, 1e-6, 1e6, 1e15])
def test_pairs_of_any_common_size_are_taken_in_float32(scale):
    """H is the same for s and y of any size; only R^-1 feels it, as 1 / scale^2."""
    H = lbfgs.init(6, 4, jnp.float32)
    for pair in averaged_pairs(0, 6, 9):
        H, status = update(H, Pair(*(jnp.float32(v * scale) for v in pair)), UPDATED)
        assert int(status) == pairs.UPDATED
    expected = dense_of(list(averaged_pairs(0, 6, 9))[-4:], 6)
    assert relative(dense(H), expected) < 1e-5


def test_the_authors_stored_pairs_and_matrix(golden):
    """Every step of their run: the memory of 4 fills, then wraps round twice."""
    z = golden("kbfgs_l_bce")
    meta = json.loads(str(z["meta"]))
    forgotten = 0
    for i, d in enumerate(meta["sizes"][1:]):
        H = lbfgs.init(d, meta["memory"], jnp.float64)
        for k in range(meta["steps"]):
            prefix = f"step{k:03d}/layer{i}/"
            assert z[prefix + "gamma"] == 1
            assert relative(dense(H), z[prefix + "H_g_before"]) < 1e-9
            forgotten += int(H.count) == meta["memory"]
            pair = Pair(jnp.asarray(z[prefix + "s_damped"]), jnp.asarray(z[prefix + "y_damped"]))
            H, status = update(H, pair, jnp.int32(z[prefix + "H_g_status"]))
            assert int(status) == z[prefix + "H_g_status"]
            assert int(H.count) == len(z[prefix + "s_pairs_after"])
            for ours, theirs in [(H.s, "s_pairs_after"), (H.y, "y_pairs_after")]:
                assert relative(ours[meta["memory"] - H.count :], z[prefix + theirs]) < 1e-12
            assert relative(dense(H), z[prefix + "H_g_after"]) < 1e-9
    assert forgotten == 4 * 8


@pytest.mark.parametrize(
    ("d", "drifting"),
    [(30, False), (30, True), (250, True), pytest.param(784, True, marks=pytest.mark.slow)],
)
def test_float32_stays_accurate(d, drifting):
    """1000 double-damped updates with memory 100; consecutive s have a cosine of 0.9 or 0.999.

    Measured: errors of 1e-7 to 2e-6, asymmetry below 1e-6, smallest eigenvalues from 0.01.
    """
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(d, d)))[0]
    curvature = jnp.asarray(rotation * np.geomspace(1e-2, 30, d) @ rotation.T, jnp.float32)

    def step(carry, key):
        H, drift, s, y = carry
        raw, noise = 1e-3 * jax.random.normal(key, (2, d), jnp.float32)
        drift = 0.99 * drift + 0.14 * raw if drifting else raw
        raw, noise = (drift + 0.05 * raw, 0.05 * noise) if drifting else (raw, noise)
        s = 0.9 * s + 0.1 * raw
        y = 0.9 * y + 0.1 * (curvature @ raw + noise)
        pair, _, _ = pairs.damp_double(Pair(s, y), lbfgs.apply(H, y), 0.2, np.float32(MU2))
        H, status = lbfgs.update(H, pair, pairs.pair_status(pair, raw, 1e-4))
        return (H, drift, s, y), status

    zero = jnp.zeros(d, jnp.float32)
    keys = jax.random.split(jax.random.key(0), 1000)
    start = (lbfgs.init(d, 100, jnp.float32), zero, zero, zero)
    (H, *_), status = jax.jit(lambda: jax.lax.scan(step, start, keys))()
    assert np.all(status == pairs.UPDATED)
    s = np.array(H.s) / np.linalg.norm(H.s, axis=1, keepdims=True)
    assert np.mean(np.sum(s[1:] * s[:-1], axis=1)) > (0.998 if drifting else 0.88)
    vectors = np.random.default_rng(1).normal(size=(d, 20)).astype(np.float32)
    expected = two_loop(np.float64(H.s), np.float64(H.y), np.float64(vectors))
    assert relative(lbfgs.apply(H, jnp.asarray(vectors)), expected) < 1e-5
    ours = np.array(dense(H), np.float64)
    assert relative(ours.T, ours) < 5e-6
    assert np.linalg.eigvalsh((ours + ours.T) / 2)[0] > 5e-3


def two_loop(S, Y, vectors):
    """Nocedal and Wright, algorithm 7.4, for the columns of ``vectors``."""
    q, alphas = vectors, []
    for s, y in zip(S[::-1], Y[::-1], strict=True):
        alphas.append(s @ q / (s @ y))
        q = q - np.outer(y, alphas[-1])
    for s, y, alpha in zip(S, Y, alphas[::-1], strict=True):
        q = q + np.outer(s, alpha - y @ q / (s @ y))
    return q


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("memory_size", [1, 4])
def test_types_stay_and_one_compilation_serves_all(memory_size, dtype):
    compiled = jax.jit(lambda H, pair, status: lbfgs.update(H, pair, status))
    H = lbfgs.init(3, memory_size, dtype)
    types = jax.tree.map(jax.typeof, H)
    for k, (s, y) in enumerate(averaged_pairs(0, 3, 7)):
        status = jnp.int32(REFUSED[k] if k in (1, 3) else pairs.UPDATED)
        H, after = compiled(H, Pair(s.astype(dtype), y.astype(dtype)), status)
        assert jax.tree.map(jax.typeof, H) == types
        assert jax.typeof(after) == jax.typeof(status)
        assert lbfgs.apply(H, H.y[-1]).dtype == dense(H).dtype == dtype
    assert compiled._cache_size() == 1


def test_vmap_is_a_loop():
    """Over factors that are empty, filling and full; one of them refuses its pair."""
    factors = [filled(d=5, memory_size=4, count=count) for count in (0, 2, 9, 3)]
    offered = list(averaged_pairs(3, 5, 4))
    statuses = jnp.int32([0, 0, 0, pairs.TOO_SMALL])
    vectors = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5, 3)))

    def stack(trees):
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    after, status = jax.jit(jax.vmap(lbfgs.update))(stack(factors), stack(offered), statuses)
    applied = jax.jit(jax.vmap(lbfgs.apply))(after, vectors)
    np.testing.assert_array_equal(status, statuses)
    for i, (H, pair) in enumerate(zip(factors, offered, strict=True)):
        expected, _ = update(H, pair, statuses[i])
        leaves = zip(jax.tree.leaves(after), jax.tree.leaves(expected), strict=True)
        for ours, theirs in leaves:
            np.testing.assert_allclose(ours[i], theirs, rtol=1e-12, atol=1e-14)
        assert relative(applied[i], lbfgs.apply(expected, vectors[i])) < 1e-12


@pytest.mark.parametrize("taken", [False, True])
def test_under_cond(taken):
    H, pair = filled(d=3, memory_size=4, count=5), next(averaged_pairs(4, 3, 1))
    after, status = jax.jit(
        lambda flag: jax.lax.cond(
            flag,
            lambda: lbfgs.update(H, pair, UPDATED),
            lambda: (H, jnp.int32(pairs.NOT_MEASURED)),
        )
    )(taken)
    assert int(status) == (pairs.UPDATED if taken else pairs.NOT_MEASURED)
    assert_same_bits(after.s, jnp.concatenate([H.s[1:], pair.s[None]]) if taken else H.s)


@pytest.mark.parametrize("make", [lbfgs.init, jax.jit(lbfgs.init, static_argnums=(0, 1, 2))])
def test_the_state_can_be_donated(make):
    """Donation fails when two fields share a buffer, as s and y, equal at first, could."""
    H = make(3, 3, jnp.float64)
    addresses = [field.unsafe_buffer_pointer() for field in jax.tree.leaves(H)]
    assert len(set(addresses)) == len(addresses)
    pair = Pair(jnp.ones(3), jnp.ones(3))
    after, _ = jax.jit(lbfgs.update, donate_argnums=0)(H, pair, UPDATED)
    assert all(field.is_deleted() for field in jax.tree.leaves(H))
    np.testing.assert_array_equal(after.s[-1], pair.s)
