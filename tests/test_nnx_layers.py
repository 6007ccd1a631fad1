"""NNX layers of every kind: the same layers and the same numbers as linen for the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from models import relative

import kfqn_optax as kfqn
from kfqn_optax.layers import named_leaves

F64 = {"dtype": jnp.float64, "param_dtype": jnp.float64}


def image(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=(4, *shape)))


def tokens(*shape):
    return jnp.asarray(np.random.default_rng(0).integers(0, 7, (4, *shape)))


def rngs():
    return nnx.Rngs(0)


class Attend(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Embed(7, 4, **F64, name="embed").attend(x)


class NnxAttend(nnx.Module):
    def __init__(self):
        self.embed = nnx.Embed(7, 4, rngs=rngs(), **F64)

    def __call__(self, x):
        return self.embed.attend(query=x)


class NnxTied(nnx.Module):
    """An embedding that is table and output layer."""

    def __init__(self):
        self.embed = nnx.Embed(7, 4, rngs=rngs(), **F64)
        self.hidden = nnx.Linear(4, 4, rngs=rngs(), **F64)

    def __call__(self, ids):
        return self.embed.attend(jnp.tanh(self.hidden(self.embed(ids))))


class Tied(nn.Module):
    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(7, 4, **F64, name="embed")
        return embed.attend(jnp.tanh(nn.Dense(4, **F64, name="hidden")(embed(ids))))


PAIRS = {
    "dense": (nn.Dense(3, **F64), lambda: nnx.Linear(5, 3, rngs=rngs(), **F64), image(6, 5)),
    "conv": (
        nn.Conv(4, (3, 2), strides=2, **F64),
        lambda: nnx.Conv(2, 4, (3, 2), strides=2, rngs=rngs(), **F64),
        image(6, 5, 2),
    ),
    "conv in groups": (
        nn.Conv(4, (3,), feature_group_count=2, padding="VALID", **F64),
        lambda: nnx.Conv(4, 4, (3,), feature_group_count=2, padding="VALID", rngs=rngs(), **F64),
        image(6, 4),
    ),
    "dense general": (
        nn.DenseGeneral((2, 3), axis=(-2, -1), **F64),
        lambda: nnx.LinearGeneral((3, 2), (2, 3), axis=(-2, -1), rngs=rngs(), **F64),
        image(5, 3, 2),
    ),
    "einsum": (
        nn.Einsum((2, 5, 3), "btd,hdk->bthk", **F64),
        lambda: nnx.Einsum("btd,hdk->bthk", (2, 5, 3), (2, 3), rngs=rngs(), **F64),
        image(6, 5),
    ),
    "embed": (nn.Embed(7, 4, **F64), lambda: nnx.Embed(7, 4, rngs=rngs(), **F64), tokens(5)),
    "attend": (Attend(), NnxAttend, image(6, 4)),
    "tied": (Tied(), NnxTied, tokens(5)),
}


def setup(name):
    """The losses of both, and the linen parameters, which the NNX model is given too."""
    linen, make, x = PAIRS[name]
    model = make()
    params = linen.init(jax.random.key(3), x)
    leaves = {path.removeprefix("params/"): leaf for path, leaf in named_leaves(params).items()}
    state = nnx.state(model, nnx.Param)
    for path, variable in nnx.to_flat_state(state):
        variable[...] = leaves["/".join(path)].reshape(variable[...].shape)
    nnx.update(model, state)

    def mean(out):
        return jnp.sum(jnp.sin(out) * jnp.cos(3 * out)) / 4

    return (lambda p, x: mean(linen.apply(p, x))), params, (lambda m, x: mean(m(x))), model, x


@pytest.mark.parametrize("name", PAIRS)
def test_statistics_are_those_of_linen(name):
    loss, params, nnx_loss, model, x = setup(name)
    expected = jax.eval_shape(kfqn.curvature_fn(loss, params, x), params)
    vectors = {
        path: jnp.asarray(np.random.default_rng(1).normal(size=layer.input_mean.shape))
        for path, layer in expected.layers.items()
    }
    expected = jax.jit(kfqn.curvature_fn(loss, params, x))(params, vectors=vectors)
    measure = jax.jit(kfqn.nnx_curvature_fn(nnx_loss, model, x))
    names = {path: path.removeprefix("params").removeprefix("/") for path in vectors}
    measured = measure(
        nnx.state(model, nnx.Param), vectors={names[path]: v for path, v in vectors.items()}
    )
    assert set(measured.layers) == set(names.values())
    for path, layer in expected.layers.items():
        ours = measured.layers[names[path]]
        assert jax.tree.structure(ours) == jax.tree.structure(layer)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(layer), strict=True):
            assert relative(a, b) < 1e-12
    linen_layer, nnx_layer = (
        kfqn.find_layers(loss, params, x)[0],
        kfqn.find_nnx_layers(nnx_loss, model, x)[0],
    )
    for field in ("kind", "kernel", "bias", "lookup", "kernel_name"):
        assert getattr(linen_layer, field) == getattr(nnx_layer, field), field


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("conv", kfqn.kbfgs),
        ("embed", kfqn.kbfgs),
        ("dense general", kfqn.kfqn),
        pytest.param("conv", kfqn.kfqn, marks=pytest.mark.slow),
        pytest.param("embed", kfqn.kfqn, marks=pytest.mark.slow),
        pytest.param("dense general", kfqn.kbfgs, marks=pytest.mark.slow),
    ],
)
def test_training_is_that_of_linen(name, method):
    loss, params, nnx_loss, model, x = setup(name)
    layers = kfqn.find_layers(loss, params, x)
    tx = method(0.05, 0.1, layers=layers)
    state = tx.init(params)
    optimizer = nnx.Optimizer(
        model,
        method(0.05, 0.1, layers=kfqn.find_nnx_layers(nnx_loss, model, x)),
        wrt=nnx.Param,
    )

    @nnx.jit
    def nnx_step(model, optimizer, x):
        fn = kfqn.nnx_curvature_fn(nnx_loss, model, x)
        optimizer.update(model, nnx.grad(nnx_loss)(model, x), curvature_fn=fn)

    @jax.jit
    def step(params, state, x):
        fn = kfqn.curvature_fn(loss, params, x)
        updates, state = tx.update(jax.grad(loss)(params, x), state, params, curvature_fn=fn)
        return optax.apply_updates(params, updates), state

    for _ in range(4):
        params, state = step(params, state, x)
        nnx_step(model, optimizer, x)
    leaves = list(named_leaves(params).values())
    ours = jax.tree.leaves(nnx.state(model, nnx.Param))
    for a, b in zip(ours, leaves, strict=True):
        assert relative(a, b.reshape(a.shape)) < 1e-10


class Attentive(nnx.Module):
    """Attention, batch norm and a convolution, as people write it."""

    def __init__(self):
        self.attention = nnx.MultiHeadAttention(
            2, 6, decode=False, rngs=rngs(), dtype=jnp.float64, param_dtype=jnp.float64
        )
        self.norm = nnx.BatchNorm(6, rngs=rngs())
        self.conv = nnx.Conv(6, 3, (2,), rngs=rngs(), **F64)

    def __call__(self, x):
        return self.conv(self.norm(self.attention(x)))


def test_attention_and_batch_norm_leave_the_model_alone():
    model, x = Attentive(), image(5, 6)
    before = jax.tree.map(np.asarray, nnx.state(model))

    def loss_fn(model, x):
        return jnp.mean(jnp.sum(model(x) ** 2, axis=(1, 2)))

    layers = kfqn.find_nnx_layers(loss_fn, model, x)
    assert [layer.path for layer in layers] == [
        *(f"attention/{name}" for name in ("key", "out", "query", "value")),
        "conv",
    ]
    measured = jax.jit(kfqn.nnx_curvature_fn(loss_fn, model, x))(nnx.state(model, nnx.Param))
    assert {float(layer.rows) for layer in measured.layers.values()} == {20.0}
    after = jax.tree.map(np.asarray, nnx.state(model))
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_a_normalized_kernel_is_no_layer():
    """nnx.WeightNorm multiplies with another kernel than the parameter."""
    model = nnx.Sequential(
        nnx.WeightNorm(nnx.Linear(5, 4, rngs=rngs()), rngs=rngs()), nnx.Linear(4, 3, rngs=rngs())
    )
    layers = kfqn.find_nnx_layers(lambda m, x: jnp.mean(m(x) ** 2), model, jnp.ones((4, 5)))
    assert [layer.path for layer in layers] == ["layers/1"]


@pytest.mark.parametrize("axis", [0, 1])
def test_a_stack_whose_axis_no_shape_tells(axis):
    """Three layers of size 3 x 3 under nnx.scan: the loss is traced again to find the axis."""

    class Stack(nnx.Module):
        def __init__(self):
            make = nnx.vmap(lambda rngs: nnx.Linear(3, 3, rngs=rngs, **F64), out_axes=axis)
            self.layers = make(nnx.Rngs(0).split(3))

        def __call__(self, x):
            run = nnx.scan(
                lambda x, layer: jnp.tanh(layer(x)), in_axes=(nnx.Carry, axis), out_axes=nnx.Carry
            )
            return run(x, self.layers)

    (layer,) = kfqn.find_nnx_layers(lambda m, x: jnp.mean(m(x) ** 2), Stack(), image(3))
    assert (layer.path, layer.blocks, layer.d_in, layer.d_out) == ("layers", 3, 4, 3)
    assert layer.kernel.blocks == (axis,)
