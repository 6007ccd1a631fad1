"""Train steps on the tiny models, and how states are compared."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kfqn_optax as kfqn
from kfqn_optax import block_bfgs, generations, inverse
from kfqn_optax.layers import named_leaves

D0, D1 = "params/Dense_0", "params/Dense_1"
POWELL = 0.2
CURVATURE = ("input", "output", "input_moment", "s", "y")


def step_of(tx, loss_fn, **jit_options):
    """A jitted train step: params, state, updates."""

    def step(params, state, *batch):
        grads = jax.grad(loss_fn)(params, *batch)
        fn = kfqn.curvature_fn(loss_fn, params, *batch)
        updates, state = tx.update(grads, state, params, curvature_fn=fn)
        return optax.apply_updates(params, updates), state, updates

    return jax.jit(step, **jit_options)


def batches_for(params, batch=8, count=6, seed=1):
    """Batches of inputs and targets in [0, 1] for an `Mlp` of `problem`."""
    leaves = list(named_leaves(params).values())
    d_in, d_out, dtype = leaves[1].shape[0], leaves[-1].shape[-1], leaves[1].dtype
    rng = np.random.default_rng(seed)
    for _ in range(count):
        x, t = rng.normal(size=(batch, d_in)), rng.uniform(size=(batch, d_out))
        yield jnp.asarray(x, dtype), jnp.asarray(t, dtype)


def dense(H):
    """A factor that is kept as pairs or directions, as a matrix."""
    return inverse.apply(H, jnp.eye(inverse.size(H), dtype=jax.tree.leaves(H)[0].dtype))


@jax.jit
def grow(H, s, y):
    """Generations after q pairs, and what became of these."""
    offer = generations.offer(H, s, y)
    solved = block_bfgs.solve_all({0: offer.products}, {0: offer.usable}, POWELL)[0]
    return generations.take(H, offer, solved)


def layers_of(state):
    return optax.tree.get(state, "layers")


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def close(a, b, rtol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * 1e-3), a, b)


def types(tree):
    return jax.tree.map(lambda v: (v.shape, v.dtype), tree)


def random_like(tree, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), tree)


def matrices(tree):
    """Each layer as the paper has it: [d_out, d_in + 1]."""
    layers = tree["params"]
    return [
        np.hstack([np.asarray(layers[n]["kernel"]).T, np.asarray(layers[n]["bias"])[:, None]])
        for n in sorted(layers)
    ]
