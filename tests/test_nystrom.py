"""Factors of few directions: against matrices, and what they do with what is of no use."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import relative
from steps import dense, equal, grow

from kfqn_optax import generations, inverse, lbfgs, low_rank, nystrom


@functools.partial(jax.jit, static_argnames="times")
def follow(H, A, sketches, damping, first, times=1):
    """A factor after some updates from the same A, and whether the last was of use."""
    usable = jnp.zeros((), bool)
    for i in range(times):
        offer = nystrom.offer(H, A, sketches, damping, first if i == 0 else False)
        H, usable = nystrom.take(H, offer, nystrom.inverse_roots({0: offer.grams})[0])
    return H, usable


def moment(rng, eigenvalues):
    """A matrix with these eigenvalues, and its eigenvectors as columns."""
    d = len(eigenvalues)
    V, _ = np.linalg.qr(rng.normal(size=(d, d)))
    A = (V * eigenvalues) @ V.T
    return (A + A.T) / 2, V


def sketches_of(rng, A, q=3):
    values, V = np.linalg.eigh(A)
    return jnp.asarray(rng.normal(size=(q, len(A))) * np.sqrt(np.maximum(values, 0)) @ V.T)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.sampled_from([-140, -20, 0, 20, 140]))
def test_with_all_directions_it_is_the_inverse(seed, d, scale):
    """Whatever the scale of A; the damping is of the same."""
    rng = np.random.default_rng(seed)
    unit = 10.0**scale
    A, _ = moment(rng, unit * 10 ** rng.uniform(-3, 2, size=d))
    H = nystrom.init(d, d + 2, jnp.float64)
    equal(dense(H), jnp.eye(d))
    for first in (True, False):
        H, usable = follow(H, jnp.asarray(A), sketches_of(rng, A), 0.1 * unit, first, times=2)
        assert usable
    expected = np.linalg.inv(A + 0.1 * unit * np.eye(d))
    assert relative(dense(H) * unit, expected * unit) < 1e-6
    M = rng.normal(size=(2, d))
    assert relative(inverse.apply_to_rows(H, M) * unit, M @ expected * unit) < 1e-6


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_it_finds_the_largest_eigenvalues(dtype):
    """All others count as their mean."""
    rng = np.random.default_rng(0)
    values = np.concatenate([[2000, 90, 30, 12, 11, 4], rng.uniform(0.01, 0.1, size=34)])
    A, V = moment(rng, values)
    sketches = sketches_of(rng, A).astype(dtype)
    H, _ = follow(nystrom.init(40, 9, dtype), jnp.asarray(A, dtype), sketches, 0.2, True, times=6)
    made = V.T @ np.asarray(dense(H), np.float64) @ V
    np.testing.assert_allclose(np.diag(made)[:6], 1 / (values[:6] + 0.2), rtol=0.03)
    others = np.diag(made)[6:]
    np.testing.assert_allclose(others, 1 / (values[6:].mean() + 0.2), rtol=0.3)
    assert np.abs(made[:6, 6:]).max() < 0.02
    assert float(H.tail) == pytest.approx(values[9:].mean(), rel=0.2)


def test_a_direction_that_was_not_there_gets_in():
    """Also where nothing was there before: inputs of a layer that was dead."""
    rng = np.random.default_rng(1)
    old, _ = moment(rng, np.r_[[5.0, 2.0], np.zeros(18)])
    new, _ = moment(rng, np.r_[[900.0, 40.0], np.zeros(18)])
    for before in (np.zeros((20, 20)), old):
        H, usable = follow(
            nystrom.init(20, 6, jnp.float32), jnp.float32(before), jnp.zeros((0, 20)), 0.1, True, 3
        )
        assert usable
        H, usable = follow(H, jnp.float32(new), jnp.zeros((0, 20)), 0.1, False, 4)
        assert usable
        whitened = np.asarray(dense(H), np.float64) @ (new + 0.1 * np.eye(20))
        assert np.abs(np.linalg.eigvals(whitened) - 1).max() < 0.05


def test_float32_stays_positive_definite():
    """A long way, with an A that jumps by three orders of magnitude and loses its rank."""
    rng = np.random.default_rng(2)
    H = nystrom.init(30, 12, jnp.float32)
    for step in range(400):
        if step % 20 == 0:
            values = 10 ** rng.uniform(-6, 3.5, size=30) * (rng.uniform(size=30) < 0.7)
            A, _ = moment(rng, values)
        sketches = jnp.float32(sketches_of(rng, A))
        H, usable = follow(H, jnp.float32(A), sketches, 0.17, step == 0)
        assert usable
        if step % 20 in (0, 1, 19):
            lengths = np.linalg.svd(np.asarray(H.rows, np.float64))[1]
            assert lengths.max() < 1, step
            assert 0 < float(H.scale) <= 1 / 0.17 * (1 + 1e-6)
    assert H.rows.dtype == H.scale.dtype == H.tail.dtype == jnp.float32


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_leaves_the_factor(value):
    rng = np.random.default_rng(3)
    A, _ = moment(rng, np.arange(1.0, 9.0))
    H, _ = follow(nystrom.init(8, 4, jnp.float64), jnp.asarray(A), sketches_of(rng, A), 0.1, True)
    after, usable = follow(H, jnp.asarray(A).at[2, 2].set(value), sketches_of(rng, A), 0.1, False)
    assert not usable
    equal(after, H)
    after, usable = follow(H, jnp.asarray(A), jnp.full((2, 8), value), 0.1, False)
    assert usable
    assert np.linalg.eigvalsh(dense(after))[0] > 0


def test_inverse_roots():
    """Of several sizes, stacks of matrices, and rows that depend on others."""
    rng = np.random.default_rng(4)

    def gram(*shape):
        rows = rng.normal(size=(*shape, shape[-1] + 3))
        rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
        return rows @ np.swapaxes(rows, -1, -2)

    grams = {"small": gram(2), "stack": gram(3, 2, 5), "large": gram(7)}
    twice = gram(4)
    twice[3], twice[:, 3] = twice[1], twice[:, 1]
    roots = jax.jit(nystrom.inverse_roots)({**grams, "twice": twice})
    for key, of_key in grams.items():
        assert roots[key].shape == of_key.shape
        assert relative(roots[key], np.linalg.inv(np.linalg.cholesky(of_key))) < 1e-12
    assert relative(roots["twice"][:3, :3], np.linalg.inv(np.linalg.cholesky(twice[:3, :3]))) < 1e-9
    np.testing.assert_array_equal(roots["twice"][3], np.zeros(4))


# --- products ------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.booleans())
def test_products_from_both_sides(seed, steps, bias):
    """Of a matrix in parts, with a factor of generations and one of directions."""
    rng = np.random.default_rng(seed)
    H_g = generations.init(5, 2, 4, jnp.float64)._replace(scale=jnp.asarray(2.0))
    for _ in range(steps):
        H_g, _ = grow(H_g, *(jnp.asarray(rng.normal(size=(2, 5))) for _ in "sy"))
    A, _ = moment(rng, 10 ** rng.uniform(-1, 1, size=7))
    H_a, _ = follow(nystrom.init(7, 4, jnp.float64), A, sketches_of(rng, A), 0.3, True, times=2)
    left, right = inverse.as_low_rank(H_a), inverse.as_low_rank(H_g)
    assert relative(low_rank.apply_to_rows(right, jnp.eye(5)), dense(H_g)) < 1e-9
    M = rng.normal(size=(7, 5))
    expected = dense(H_a) @ M @ dense(H_g)
    parts = [M[:6], M[6:]] if bias else [M]
    made = low_rank.both_sides(left, parts, right)
    assert [part.shape for part in made] == [part.shape for part in parts]
    assert relative(np.concatenate(made), expected) < 1e-9
    assert relative(low_rank.apply_to_rows(right, M), M @ dense(H_g)) < 1e-9


def test_float32_products_keep_their_digits():
    """Beside those of a limited memory, which go over the matrix more often."""
    rng = np.random.default_rng(5)
    curvature = np.geomspace(0.1, 300, 24)
    H = generations.init(24, 4, 8, jnp.float32)._replace(scale=jnp.float32(5.8))
    for _ in range(11):
        s = rng.normal(size=(4, 24)) @ np.diag(curvature**-0.5)
        H, _ = grow(H, jnp.float32(s), jnp.float32(s * curvature))
    elder = generations.elder(H)
    exact = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), elder)
    M = rng.normal(size=(50, 24)) @ np.diag(curvature**0.5)
    expected = lbfgs.apply_to_rows(exact, jnp.asarray(M))
    assert relative(low_rank.apply_to_rows(low_rank.of(elder), jnp.float32(M)), expected) < 1e-4
