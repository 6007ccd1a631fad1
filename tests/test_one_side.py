"""The factors of one side of all layers at once: the same results as one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kfqn_optax import bfgs, lbfgs, pairs
from kfqn_optax.layers import Layer
from kfqn_optax.matrix import MatrixView
from kfqn_optax.one_side import Side
from kfqn_optax.pairs import Pair

# Of each layer: blocks, d, and how many pairs its memory has room for; None for a matrix.
FACTORS = [
    (None, 12, 3),
    (None, 5, None),
    (3, 7, 3),
    (2, 5, None),
    (None, 3, 12),
    (None, 12, 12),
    (2, 1, 3),
]


def pair(rng, d):
    """s and y = B s for a positive definite B, so that s.y is above 0."""
    root, s = rng.normal(size=(d, d)), rng.normal(size=d)
    return Pair(jnp.asarray(s), jnp.asarray(root @ root.T @ s + s))


def grown(rng, d, memory):
    """A factor after four pairs."""
    H = bfgs.init(d, jnp.float64) if memory is None else lbfgs.init(d, memory, jnp.float64)
    update = bfgs.update if memory is None else lbfgs.update
    for _ in range(4):
        H, _ = update(H, pair(rng, d), jnp.asarray(pairs.UPDATED))
    return H


def stacked(blocks, make, *arguments):
    if blocks is None:
        return make(*arguments)
    return jax.tree.map(lambda *x: jnp.stack(x), *(make(*arguments) for _ in range(blocks)))


def layer(path, blocks, d):
    one = MatrixView(((d,), (d,)), (), (0,), (1,))
    return Layer(path, "dense", one if blocks is None else one.stacked((0,), (blocks,)), None)


@pytest.mark.parametrize("seed", [0, 1])
def test_products_and_updates_are_those_of_each_factor_alone(seed):
    """Some pairs are refused; where a memory has as much room as its vectors are long, too."""
    rng = np.random.default_rng(seed)
    held, offered, statuses, layers = {}, {}, {}, []
    for at, (blocks, d, memory) in enumerate(FACTORS):
        path = f"layer {at}"
        layers.append(layer(path, blocks, d))
        held[path] = stacked(blocks, grown, rng, d, memory)
        offered[path] = stacked(blocks, pair, rng, d)
        of_all = rng.choice([pairs.UPDATED, pairs.TOO_SMALL], size=blocks or ())
        statuses[path] = jnp.asarray(of_all, jnp.int32)
    side = Side(layers, held)
    packed = side.rows.pack(offered)
    products = side.rows.unpack(side.apply([of_group.y for of_group in packed]))
    updated = side.update(packed, side.rows.pack(statuses))
    assert set(updated) == set(held)
    for of_layer, (_, _, memory) in zip(layers, FACTORS, strict=True):
        path, room = of_layer.path, bfgs if memory is None else lbfgs
        alone = of_layer.over_blocks(room.apply)(held[path], offered[path].y)
        np.testing.assert_allclose(products[path], alone, rtol=1e-9, atol=1e-12)
        one_by_one = of_layer.over_blocks(room.update)(held[path], offered[path], statuses[path])
        same = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12)  # noqa: E731
        jax.tree.map(same, updated[path], one_by_one)
        assert jax.tree.structure(updated[path][0]) == jax.tree.structure(held[path])
