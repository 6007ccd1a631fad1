"""Sketches of every kind of layer from the examples one by one, and of a batch in parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from models import relative
from nets import NET, batch_of, net_loss

import kfqn_optax as kfqn
from kfqn_optax.sketch import signs

COUNT, EXAMPLES = 3, 4


class Stack(nn.Module):
    """Two layers under nn.scan between others, on sequences."""

    @nn.compact
    def __call__(self, x):
        kind = {"dtype": jnp.float64, "param_dtype": jnp.float64}

        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return nn.tanh(nn.Dense(4, **kind)(x)), None

        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        x, _ = nn.scan(Block, length=2, **axes)()(nn.Dense(4, **kind)(x), None)
        return nn.Dense(2, use_bias=False, **kind)(x)


def stack_loss(params, x):
    return jnp.mean(jnp.sum(Stack().apply(params, x) ** 2, axis=(1, 2)))


def of_net():
    batch = batch_of(0, EXAMPLES)
    return net_loss, NET.init(jax.random.key(0), batch[0]), batch


def of_stack():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(EXAMPLES, 5, 3)))
    return stack_loss, Stack().init(jax.random.key(0), x), (x,)


@pytest.mark.parametrize("make", [of_net, of_stack])
def test_sketches_from_single_examples(make):
    loss_fn, params, batch = make()

    @jax.jit
    def measure(params, *batch):
        fn = kfqn.curvature_fn(loss_fn, params, *batch)
        return fn(params, moments=[], sketches=COUNT, gradient=True)

    whole = measure(params, *batch)
    each = [measure(params, *(part[i : i + 1] for part in batch)) for i in range(EXAMPLES)]
    weights = signs(EXAMPLES, COUNT)
    for path, seen in whole.layers.items():
        for sketches, mean in zip(seen.sketches, ("input_mean", "cotangent_mean"), strict=True):
            rows = np.stack([getattr(one.layers[path], mean) for one in each])
            expected = np.einsum("mq,m...d->...qd", weights, rows)
            assert relative(sketches, expected) < 1e-12, (path, mean)
    gradient = jax.grad(loss_fn)(params, *batch)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), whole.gradient, gradient
    )


def test_sketches_of_parts():
    """Microbatches have the same signs, each its own: sums over them, scaled by their number."""
    loss_fn, params, batch = of_net()
    parts = kfqn.microbatches(batch, 2)
    asked = {"moments": [], "sketches": COUNT, "gradient": True}
    fn = kfqn.over_microbatches(lambda *part: kfqn.curvature_fn(loss_fn, params, *part), parts)
    whole = fn(params, **asked)
    each = [
        kfqn.curvature_fn(loss_fn, params, *(p[i] for p in parts))(params, **asked)
        for i in range(2)
    ]
    for path, seen in whole.layers.items():
        for side in ("input", "cotangent"):
            of_parts = [getattr(one.layers[path].sketches, side) for one in each]
            assert relative(getattr(seen.sketches, side), sum(of_parts) / np.sqrt(2)) < 1e-12
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12),
        whole.gradient,
        jax.grad(loss_fn)(params, *batch),
    )


def test_block_kbfgs_trains_convolutions_stacks_and_nnx():
    for make, rank in ((of_net, None), (of_stack, None), (of_net, 6), (of_stack, 3)):
        loss_fn, params, batch = make()
        layers = kfqn.find_layers(loss_fn, params, *batch)
        tx = kfqn.block_kbfgs(layers=layers, pairs=COUNT, input_rank=rank)
        state, before = tx.init(params), loss_fn(params, *batch)

        @jax.jit
        def step(params, state, tx=tx, loss_fn=loss_fn, batch=batch):
            fn = kfqn.curvature_fn(loss_fn, params, *batch)
            updates, state = tx.update(
                jax.grad(loss_fn)(params, *batch), state, params, curvature_fn=fn
            )
            return jax.tree.map(jnp.add, params, updates), state

        for _ in range(30):
            params, state = step(params, state)
        assert loss_fn(params, *batch) < before / 4
        assert step._cache_size() == 1

    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, kfqn.block_kbfgs(pairs=COUNT), wrt=nnx.Param)
    x = jax.random.normal(jax.random.key(0), (8, 3), jnp.float32)

    def loss_of(model, x):
        return jnp.mean(jnp.sum((model(x) - x[:, :2]) ** 2, axis=-1))

    @nnx.jit
    def train(model, optimizer, x):
        fn = kfqn.nnx_curvature_fn(loss_of, model, x)
        optimizer.update(model, nnx.grad(loss_of)(model, x), curvature_fn=fn)

    before = loss_of(model, x)
    for _ in range(20):
        train(model, optimizer, x)
    assert loss_of(model, x) < before / 10
