"""Mini-block Fisher against explicit matrices, one filter and one row at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import relative
from nets import NET, batch_of, net_loss
from steps import random_like, types

import kfqn_optax as kfqn
from kfqn_optax.mini_block import inverses_of_small

EVERY, STEPS = 2, 6


def test_against_explicit_matrices():
    params = NET.init(jax.random.key(0), batch_of(0)[0])
    layers = kfqn.find_layers(net_loss, params, *batch_of(0))
    tx = kfqn.scale_by_mbf(0.2, momentum=0.6, factor_decay=0.7, inverse_every=EVERY, layers=layers)
    update, state = jax.jit(tx.update), tx.init(params)
    F, M, K = {}, {}, {}
    for k in range(STEPS):
        gradient = random_like(params, seed=k)
        before = types(state)
        updates, state = update(gradient, state)
        assert types(state) == before
        G, P = (jax.tree.map(np.asarray, tree["params"]) for tree in (gradient, updates))
        vectors = {}
        for name in ("wide", "out"):
            of_layer = np.vstack([G[name]["kernel"], G[name]["bias"]])
            vectors[name] = of_layer, np.vstack([P[name]["kernel"], P[name]["bias"]])
        for name in ("conv", "groups"):
            for c, f in np.ndindex(*G[name]["kernel"].shape[2:]):
                pair = [tree[name]["kernel"][:, :, c, f].reshape(1, -1) for tree in (G, P)]
                vectors[name, c, f] = pair
        for name, (g, p) in vectors.items():
            new = sum(np.outer(row, row) for row in g) / len(g)
            F[name] = 0.7 * F.get(name, new) + 0.3 * new
            M[name] = 0.6 * M.get(name, 0) + 0.4 * g
            if k <= EVERY or k % EVERY == 0:
                K[name] = np.linalg.inv(F[name] + 0.2 * np.eye(len(new)))
            assert relative(p, M[name] @ K[name]) < 1e-11, (name, k)
        np.testing.assert_array_equal(P["conv"]["bias"], G["conv"]["bias"])
    assert update._cache_size() == 1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_inverses_of_small_matrices(dtype):
    """The diagonal's where rounding leaves nothing else: a scale that dwarfs the damping."""
    rng = np.random.default_rng(0)
    v = rng.normal(size=(5, 3, 9, 2))
    F = jnp.asarray(v @ v.swapaxes(-1, -2), dtype)
    made = jax.jit(inverses_of_small)(F, jnp.asarray(0.1, dtype))
    expected = np.linalg.inv(np.asarray(F, np.float64) + 0.1 * np.eye(9))
    assert relative(made, expected) < (1e-13 if dtype == jnp.float64 else 1e-4)
    extreme = np.asarray(jax.jit(inverses_of_small)(1e12 * F, jnp.asarray(1e-9, dtype)))
    assert np.isfinite(extreme).all()
    assert (np.linalg.eigvalsh(extreme) > 0).all()
    assert (extreme == np.where(np.eye(9), extreme, 0)).all(axis=(-2, -1)).any()
