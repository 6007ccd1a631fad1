"""Sums become means on the scale of the paper: per example, not per batch."""

import jax.numpy as jnp
import numpy as np
import pytest
from models import relative

from kfqn_optax.layers import Layer
from kfqn_optax.statistics import LayerStatistics, Sums, reduce, zero_sums


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("examples", "positions"), [(1, 1), (6, 1), (6, 5)])
def test_reduce_against_explicit_formulas(bias, examples, positions):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(examples, positions, 3)) + 0.5
    g = rng.normal(size=(examples, positions, 2))  # gradient of each example's own loss
    rows, mean_g = x.reshape(-1, 3), g.reshape(-1, 2) / examples  # the loss is a mean
    layer = Layer("d", 3 + bias, 2, bias)
    sums = Sums(rows.T @ rows, rows.sum(axis=0), mean_g.sum(axis=0), np.array([float(len(rows))]))
    actual = reduce(layer, Sums(*map(jnp.asarray, sums)), examples)

    a = np.concatenate([x, np.ones((examples, positions, int(bias)))], axis=-1)
    expected = LayerStatistics(
        input_moment=np.mean([sum(np.outer(v, v) for v in example) for example in a], axis=0),
        input_mean=a.mean(axis=(0, 1)),
        cotangent_mean=g.mean(axis=(0, 1)),
        rows=examples * positions,
        examples=examples,
    )
    for name in LayerStatistics._fields:
        ours, theirs = getattr(actual, name), np.asarray(getattr(expected, name))
        assert ours.shape == theirs.shape, name
        assert relative(ours, theirs) < 1e-14, name
    if bias:
        assert float(actual.input_mean[-1]) == 1
        assert float(actual.input_moment[-1, -1]) == positions


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_no_rows_give_zeros_and_no_nan(bias, dtype):
    layer = Layer("d", 3 + bias, 2, bias)
    sums = zero_sums(layer, dtype)
    assert [leaf.shape for leaf in sums] == [(3, 3), (3,), (2,), (1,)]
    statistics = reduce(layer, sums, 4)
    assert int(statistics.examples) == 4
    for leaf in statistics:
        assert leaf.dtype == dtype
    for leaf in statistics[:-1]:
        np.testing.assert_array_equal(leaf, np.zeros_like(leaf))
