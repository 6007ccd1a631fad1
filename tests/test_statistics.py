"""Sums become means on the scale of the paper: per example, not per batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import relative

from kfqn_optax.layers import dense
from kfqn_optax.statistics import JointMoments, LayerStatistics, reduce


def weighted(rows, weights):
    return sum((w @ w) * np.outer(row, row) for row, w in zip(rows, weights, strict=True))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("examples", "positions"), [(1, 1), (6, 1), (6, 5)])
def test_reduce_against_explicit_formulas(bias, examples, positions):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(examples, positions, 3)) + 0.5
    g = rng.normal(size=(examples, positions, 2))  # gradient of each example's own loss
    rows, mean_g = x.reshape(-1, 3), g.reshape(-1, 2) / examples  # the loss is a mean
    a_rows = np.hstack([rows, np.ones((len(rows), int(bias)))])
    layer = dense("d", (3, 2), bias)
    v = rng.normal(size=3 + bias)
    sums = {
        "moment": rows.T @ rows,
        "product": rows.T @ (rows @ v[:3]),
        "inputs": rows.sum(axis=0),
        "cotangents": mean_g.sum(axis=0),
        "roundings": (1e-7 * mean_g**2).sum(keepdims=True)[0],
        "rows": np.array(float(len(rows))),
        "output_moment": mean_g.T @ mean_g,
        "joint_input": weighted(a_rows, mean_g),
        "joint_output": weighted(mean_g, a_rows),
    }
    sums = jax.tree.map(jnp.asarray, sums)
    actual = reduce(layer, sums, examples, jnp.asarray(v))

    a = np.concatenate([x, np.ones((examples, positions, int(bias)))], axis=-1)
    moment = np.mean([sum(np.outer(v, v) for v in example) for example in a], axis=0)
    expected = LayerStatistics(
        input_moment=moment,
        input_product=moment @ v,
        input_mean=a.mean(axis=(0, 1)),
        cotangent_mean=g.mean(axis=(0, 1)),
        cotangent_noise=np.sqrt(1e-7 * np.sum(g**2)) / (examples * positions),
        rows=examples * positions,
        examples=examples,
        output_moment=np.mean([np.outer(v, v) for v in g.reshape(-1, 2)], axis=0),
        joint_moments=JointMoments(
            weighted(a_rows, g.reshape(-1, 2)) / examples,
            weighted(g.reshape(-1, 2), a_rows) / examples,
        ),
    )
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, ours), theirs in zip(
        jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        assert ours.shape == np.shape(theirs), path
        assert relative(ours, theirs) < 1e-14, path
    traces = [np.trace(moment) for moment in actual.joint_moments]
    np.testing.assert_allclose(*traces)
    if bias:
        assert float(actual.input_mean[-1]) == 1
        assert float(actual.input_moment[-1, -1]) == positions


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_no_rows_give_zeros_and_no_nan(bias, dtype):
    layer = dense("d", (3, 2), bias)
    shapes = {"moment": (3, 3), "inputs": (3,), "cotangents": (2,), "roundings": (1,), "rows": ()}
    sums = {name: jnp.zeros(shape, dtype) for name, shape in shapes.items()}
    statistics = reduce(layer, sums, 4)
    assert statistics.input_product is None
    statistics = [leaf for leaf in statistics if leaf is not None]
    assert int(statistics[-1]) == 4
    for leaf in statistics:
        assert leaf.dtype == dtype
    for leaf in statistics[:-1]:
        np.testing.assert_array_equal(leaf, np.zeros_like(leaf))
