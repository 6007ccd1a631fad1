"""Vectors of many layers in the rows of few arrays: the same results as one by one."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kfqn_optax.packed import Rows

SHAPES = st.lists(
    st.tuples(st.one_of(st.none(), st.integers(1, 3)), st.integers(1, 40)), min_size=1, max_size=6
)


def trees(shapes, seed):
    """By key a vector and a number, with an axis of blocks where there are blocks."""
    rng = np.random.default_rng(seed)
    lead = [() if blocks is None else (blocks,) for blocks, _ in shapes]
    return {
        f"layer {i}": (
            jnp.asarray(rng.normal(size=(*blocks, d))),
            jnp.asarray(rng.normal(size=blocks)),
        )
        for i, (blocks, (_, d)) in enumerate(zip(lead, shapes, strict=True))
    }


def combine(one, other):
    """Entry by entry, a sum, an inner product, a comparison."""
    (x, a), (y, b) = one, other
    return x * jnp.dot(x, y) + a * y, jnp.sum(x) + b, a > b


@settings(max_examples=6, deadline=None)
@given(SHAPES, st.integers(0, 1000))
def test_a_map_over_rows_is_a_map_over_layers(shapes, seed):
    first, second = trees(shapes, seed), trees(shapes, seed + 1)
    rows = Rows({key: vector for key, (vector, _) in first.items()})
    results = rows.unpack(rows.map(combine, rows.pack(first), rows.pack(second)))
    assert list(results) == list(first)
    for key, (blocks, _) in zip(first, shapes, strict=True):
        alone = combine if blocks is None else jax.vmap(combine)
        for ours, expected in zip(results[key], alone(first[key], second[key]), strict=True):
            assert (ours.shape, ours.dtype) == (expected.shape, expected.dtype)
            np.testing.assert_allclose(ours, expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(SHAPES, st.integers(0, 1000))
def test_unpack_undoes_pack(shapes, seed):
    tree = trees(shapes, seed)
    rows = Rows({key: vector for key, (vector, _) in tree.items()})
    jax.tree.map(np.testing.assert_array_equal, rows.unpack(rows.pack(tree)), tree)


def test_long_vectors_do_not_lengthen_the_short_ones():
    """A vocabulary of 100,000 beside a hundred layers of width 64 would be 40 MB of zeros."""
    like = {i: jnp.zeros(64, jnp.float32) for i in range(100)} | {"head": jnp.zeros(100_000)}
    arrays = Rows(like).pack(like)
    assert sorted(array.shape for array in arrays) == [(1, 100_000), (100, 64)]


def test_dtypes_are_not_mixed():
    like = {"low": jnp.zeros(3, jnp.float32), "high": jnp.ones(3, jnp.float64)}
    rows = Rows(like)
    assert {array.dtype.name for array in rows.pack(like)} == {"float32", "float64"}
    assert rows.unpack(rows.pack(like))["high"].dtype == jnp.float64


def test_a_map_that_changes_nothing_changes_no_bit():
    """Its results are divided by 1 on the way, see `packed`."""
    special = jnp.array([0.0, -0.0, jnp.inf, -jnp.inf, 3e38, 1e-37, 1 / 3], jnp.float32)
    tree = {
        "layer": (special, jnp.float32(-0.0), jnp.int32(7), jnp.asarray(True)),
        "other": (special[:3], jnp.float32(jnp.inf), jnp.int32(-1), jnp.asarray(False)),
    }
    rows = Rows({key: vector for key, (vector, *_) in tree.items()})
    same = jax.jit(lambda tree: rows.unpack(rows.map(lambda x: x, rows.pack(tree))))(tree)
    for ours, expected in zip(jax.tree.leaves(same), jax.tree.leaves(tree), strict=True):
        assert ours.dtype == expected.dtype
        assert np.asarray(ours).tobytes() == np.asarray(expected).tobytes()


def test_depths_are_not_mixed_and_deep_rows_are_not_lengthened_much():
    """A memory of 100 pairs of 8000 beside thirty of 64 would be 25 times as large."""
    like = {"a": jnp.zeros(4), "b": jnp.zeros(4), "c": jnp.zeros(3)}
    assert Rows(like, {"b": 20}).groups == [["a", "c"], ["b"]]
    like = {i: jnp.zeros(64) for i in range(30)} | {"head": jnp.zeros(8000)}
    assert len(Rows(like).groups) == 1
    assert Rows(like, dict.fromkeys(like, 100)).groups == [["head"], list(range(30))]
