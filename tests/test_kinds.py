"""Every kind of layer through the public names: what is measured against explicit sums of rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from models import relative
from steps import equal, layers_of, step_of

import kfqn_optax as kfqn
from kfqn_optax import inverse, linen_kinds, pairs
from kfqn_optax.geometry import Lookup
from kfqn_optax.layers import named_leaves, to_matrix

F64 = {"dtype": jnp.float64, "param_dtype": jnp.float64}


def image(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=(4, *shape)))


def tokens(*shape):
    return jnp.asarray(np.random.default_rng(0).integers(0, 7, (4, *shape)))


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(2, qkv_features=6, out_features=5, **F64)(x)


class Tied(nn.Module):
    """An embedding that is table and output layer."""

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(7, 4, **F64)
        return embed.attend(nn.tanh(nn.Dense(4, **F64)(embed(ids))))


class Attend(nn.Module):
    """An embedding that is an output layer only."""

    @nn.compact
    def __call__(self, x):
        return nn.Embed(7, 4, **F64).attend(x)


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.RNN(nn.GRUCell(3, **F64))(x)


class Siamese(nn.Module):
    """One convolution on two inputs of different sizes."""

    @nn.compact
    def __call__(self, x):
        conv = nn.Conv(3, (2, 2), **F64)
        return jnp.concatenate([conv(x).reshape(4, -1), conv(x[:, ::2]).reshape(4, -1)], -1)


MODELS = {
    "dense on sequences": (nn.Dense(3, **F64), image(6, 5)),
    "conv 1-d causal": (nn.Conv(3, 2, padding="CAUSAL", **F64), image(6, 2)),
    "conv 2-d strided": (nn.Conv(3, (3, 2), strides=2, **F64), image(6, 5, 2)),
    "conv 2-d valid, no bias": (
        nn.Conv(3, (3, 3), padding="VALID", use_bias=False, **F64),
        image(5, 5, 2),
    ),
    "conv 2-d dilated": (nn.Conv(3, (2, 2), kernel_dilation=2, **F64), image(6, 5, 2)),
    "conv 2-d explicit padding": (
        nn.Conv(3, (2, 2), padding=[(0, 2), (1, 0)], **F64),
        image(4, 4, 2),
    ),
    "conv 3-d": (nn.Conv(2, (2, 2, 2), **F64), image(3, 3, 3, 2)),
    "conv in groups": (nn.Conv(6, (2, 2), feature_group_count=2, **F64), image(4, 4, 4)),
    "depthwise conv": (nn.Conv(4, (3, 3), feature_group_count=4, **F64), image(4, 4, 4)),
    "dense general": (nn.DenseGeneral((2, 3), axis=(-2, -1), **F64), image(5, 3, 2)),
    "dense general, batch": (
        nn.DenseGeneral(3, axis=-1, batch_dims=(0,), **F64),
        image(5, 2),
    ),
    "einsum": (nn.Einsum((2, 5, 3), "btd,hdk->bthk", **F64), image(6, 5)),
    "attention": (Attention(), image(6, 5)),
    "recurrent": (Recurrent(), image(5, 2)),
    "shared": (Siamese(), image(4, 4, 2)),
    "embed": (nn.Embed(7, 4, **F64), tokens(5)),
    "attend": (Attend(), image(5, 4)),
    "tied": (Tied(), tokens(5)),
}


# They differ from others in their geometry alone, of which whole steps know nothing.
GEOMETRIES = {
    "dense on sequences", "conv 1-d causal", "conv 2-d valid, no bias", "conv 2-d dilated",
    "conv 2-d explicit padding", "conv 3-d", "depthwise conv", "dense general", "attend",
}  # fmt: skip
SLOW = pytest.mark.slow


def kinds(method=None):
    """The models as cases of a test, with a method if one is given; some of them slow."""
    for name in MODELS:
        case = (name,) if method is None else (name, method)
        yield pytest.param(*case, marks=SLOW if name in GEOMETRIES else ())


@functools.cache
def setup(name):
    model, x = MODELS[name]
    params = jax.jit(model.init)(jax.random.key(0), x)
    return model, curved_loss(model), params, x


def curved_loss(model):
    """The mean over 4 examples of a function that is curved in every output."""

    def loss_fn(params, x):
        out = model.apply(params, x)
        weights = jnp.asarray(np.random.default_rng(1).normal(size=out.shape))
        return jnp.sum(jnp.sin(out * weights)) / 4

    return loss_fn


def measure(loss_fn, params, x, **request):
    """The statistics at ``params``, by one compiled program."""
    return jax.jit(lambda p: kfqn.curvature_fn(loss_fn, p, x)(p, **request))(params)


def watched(model, params, x, loss_fn):
    """By layer path, the calls of a plain pass and what came in: an interceptor that only looks."""
    met = {}

    def look(next_fun, args, kwargs, context):
        output = next_fun(*args, **kwargs)
        module = context.module
        if linen_kinds.is_layer_call(module, context.orig_method):
            call, inputs = linen_kinds.describe(module, context.orig_method, args, kwargs)
            path = "/".join(("params", *module.path))
            met.setdefault(path, []).append((call, inputs, output))
        return output

    with nn.intercept_methods(look):
        loss_fn(params, x)
    return met


@pytest.mark.parametrize("name", MODELS)
def test_statistics_against_explicit_rows(name):
    model, loss_fn, params, x = setup(name)
    measured = measure(loss_fn, params, x)
    layers = {layer.path: layer for layer in kfqn.find_layers(loss_fn, params, x)}
    assert set(measured.layers) == set(layers)
    assert layers
    loss, gradients = jax.jit(jax.value_and_grad(loss_fn))(params, x)
    assert relative(measured.loss, loss) < 1e-14  # terms of both signs: a few ulp
    gradients = named_leaves(gradients)
    examples = 5 if name == "dense general, batch" else 4
    for path, met in watched(model, params, x, loss_fn).items():
        layer, ours = layers[path], measured.layers[path]
        if name == "recurrent":
            continue  # traced: below
        met = [m for m in met if m[0].kind == layer.kind]
        rows = [call.geometry.input_rows(inputs, jnp.float64) for call, inputs, _ in met]
        a = np.concatenate([np.asarray(r) for r in rows])
        if layer.bias is not None:
            a = np.concatenate([a, np.ones((*a.shape[:-1], 1))], axis=-1)
        moment = np.einsum("n...i,n...j->...ij", a, a) / examples
        mean = a.mean(axis=0)
        count = np.full(a.shape[1:-1], len(a))
        assert relative(ours.rows, count) == 0
        assert relative(ours.examples, np.full(a.shape[1:-1], examples)) == 0
        assert relative(ours.input_mean, mean) < 1e-10
        if layer.lookup:
            moment = np.diagonal(moment)
        assert relative(ours.input_moment, moment) < 1e-10
        # The gradient is the sum of a g^T: with one row per matrix g is known from it.
        if layer.bias is not None and len(met) == 1 and not path.endswith("key"):  # that is 0
            bias = layer.bias.to_matrix(gradients[layer.bias_path])[..., 0, :]
            assert relative(ours.cotangent_mean, bias * examples / len(a)) < 1e-10
        vector = jnp.asarray(np.random.default_rng(2).normal(size=mean.shape))
        again = measure(loss_fn, params, x, moments=[], vectors={path: vector})
        if layer.lookup:
            assert again.layers[path].input_product is None
        else:
            expected = np.einsum("...ij,...j->...i", moment, vector)
            assert relative(again.layers[path].input_product, expected) < 1e-10
            assert again.layers[path].input_moment is None


@pytest.mark.parametrize(
    "name", ["conv 2-d strided", "conv in groups", "einsum", "attend", "embed"]
)
def test_cotangents_against_the_output_rows(name):
    """g of every row, from the gradient with respect to the layer's own output."""
    model, loss_fn, params, x = setup(name)
    measured = measure(loss_fn, params, x)
    (path,) = measured.layers
    ((call, inputs, output),) = watched(model, params, x, loss_fn)[path]
    weights = jnp.asarray(np.random.default_rng(1).normal(size=output.shape))
    g = jnp.cos(output * weights) * weights  # of each example's own loss
    rows = np.asarray(call.geometry.output_rows(g, jnp.float64))
    assert relative(measured.layers[path].cotangent_mean, rows.mean(axis=0)) < 1e-10
    del inputs


def test_a_recurrent_cell_sums_over_time():
    _, loss_fn, params, x = setup("recurrent")
    measured = measure(loss_fn, params, x)
    assert {float(layer.rows) for layer in measured.layers.values()} == {20.0}
    assert {float(layer.examples) for layer in measured.layers.values()} == {4.0}
    layer = measured.layers["params/GRUCell_0/in"]
    flat = np.asarray(x).reshape(20, 2)
    assert relative(layer.input_moment[:2, :2], flat.T @ flat / 4) < 1e-10


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_key_projection_has_no_mean_cotangent(dtype):
    """Softmax does not see a shift of all keys: the pair is rounding, and must not enter."""
    _, loss_fn, params, x = setup("attention")
    params, x = jax.tree.map(lambda v: v.astype(dtype), (params, x))
    layers = kfqn.find_layers(loss_fn, params, x)
    assert len(layers) == 4
    measured = measure(loss_fn, params, x).layers
    (key,) = (path for path in measured if path.endswith("key"))
    (query,) = (path for path in measured if path.endswith("query"))
    size = {path: float(jnp.abs(measured[path].cotangent_mean).max()) for path in (key, query)}
    assert size[key] < 10 * jnp.finfo(dtype).eps < 1e-4 < size[query]
    for make in (kfqn.kbfgs, kfqn.kfqn):
        tx = make(0.1, layers=layers)
        state, step = tx.init(params), step_of(tx, loss_fn)
        for _ in range(5):
            params, state, _ = step(params, state, x)
        held = layers_of(state)
        assert int(held[key].output_status) == pairs.ROUNDING
        np.testing.assert_array_equal(held[key].output, np.eye(6))
        assert not np.any(held[key].s)
        assert int(held[query].output_status) == pairs.UPDATED


STEPS = [
    *kinds(kfqn.kbfgs),
    *((name, kfqn.kfqn) for name in ("conv in groups", "embed")),
    *(pytest.param(n, kfqn.kfqn, marks=SLOW) for n in ("conv 2-d strided", "attention")),
    pytest.param("conv in groups", kfqn.kbfgs_l, marks=SLOW),
]


@pytest.mark.parametrize(("name", "method"), STEPS)
def test_a_step_with_every_kind(name, method):
    """Direction, shapes, one compilation; and a small enough step goes down."""
    _, loss_fn, params, x = setup(name)
    layers = kfqn.find_layers(loss_fn, params, x)
    tx = method(1e-3, momentum=0.0, layers=layers)
    state, step, loss = tx.init(params), step_of(tx, loss_fn), jax.jit(loss_fn)
    start = params
    for _ in range(3):
        before = loss(params, x)
        params, state, updates = step(params, state, x)
        assert float(loss(params, x)) < float(before)
    assert step._cache_size() == 1
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, start)
    for layer in layers:
        held = layers_of(state)[layer.path]
        blocks = () if layer.blocks is None else (layer.blocks,)
        assert held.stage.shape == blocks
        assert inverse.size(held.input) == layer.d_in
        assert held.s.shape == (*blocks, layer.d_out)


@pytest.mark.parametrize("name", ["conv in groups", "dense general", "embed", "attention"])
def test_the_direction_is_the_product_with_both_factors(name):
    _, loss_fn, params, x = setup(name)
    layers = kfqn.find_layers(loss_fn, params, x)
    tx = kfqn.scale_by_kbfgs(0.1, layers=layers)
    state, step, gradient = tx.init(params), step_of(tx, loss_fn), jax.jit(jax.grad(loss_fn))
    for _ in range(2):
        before = state
        _, state, updates = step(params, state, x)
    grads = gradient(params, x)
    gradients, directions = named_leaves(grads), named_leaves(updates)
    for layer in layers:
        held = before.layers[layer.path]
        M, P = to_matrix(layer, gradients), to_matrix(layer, directions)
        H_a = jnp.diag(held.input.inverse) if layer.lookup else held.input
        expected = jnp.einsum("...ij,...jk,...kl->...il", H_a, M, held.output)
        assert relative(P, expected) < 1e-10


@pytest.mark.parametrize("name", [*kinds()])
def test_loss_and_gradient_are_untouched_to_the_last_bit(name):
    _, loss_fn, params, x = setup(name)
    plain = jax.jit(jax.value_and_grad(loss_fn))(params, x)

    @jax.jit
    def both(params, x):
        measured = kfqn.curvature_fn(loss_fn, params, x)(params)
        return jax.value_and_grad(loss_fn)(params, x), measured.loss

    together, loss = both(params, x)
    equal(together, plain)
    # The loss among the statistics is computed beside, by a pass that XLA may fuse otherwise.
    assert relative(loss, plain[0]) < 1e-14


def test_embedding_tied_to_the_output():
    """Its lookups do not count: the embedding is measured as the output layer that it is."""
    _, loss_fn, params, x = setup("tied")
    layers = {layer.path: layer for layer in kfqn.find_layers(loss_fn, params, x)}
    embed = layers["params/Embed_0"]
    assert (embed.kind, embed.d_in, embed.d_out, embed.lookup) == ("attend", 4, 7, False)
    measured = measure(loss_fn, params, x).layers["params/Embed_0"]
    assert float(measured.rows) == 20  # not 40


class TiedBackwards(nn.Module):
    """An embedding that is an output layer first."""

    @nn.compact
    def __call__(self, x):
        embed = nn.Embed(7, 4, **F64)
        return embed.attend(x), embed(jnp.zeros(3, int))


def test_an_embedding_that_is_looked_up_after_it_was_an_output_layer():
    x = image(5, 4)
    params = TiedBackwards().init(jax.random.key(0), x)

    def loss_fn(params, x):
        return sum(jnp.sum(out**2) for out in TiedBackwards().apply(params, x)) / 4

    (layer,) = kfqn.find_layers(loss_fn, params, x)
    assert (layer.kind, layer.lookup) == ("attend", False)


def test_an_embedding_is_inverted_exactly():
    _, loss_fn, params, x = setup("embed")
    layers = kfqn.find_layers(loss_fn, params, x)
    # The damping of the last step is no number, and what it would make is not taken.
    tx = kfqn.scale_by_kbfgs(0.1, lambda k: jnp.where(k == 2, jnp.nan, 0.25), layers=layers)
    state = tx.init(params)
    assert isinstance(layers[0], kfqn.Layer)
    assert layers[0].lookup
    step = step_of(tx, loss_fn)
    for _ in range(3):
        _, state, _ = step(params, state, x)
    assert int(state.layers["params"].input_status) == pairs.NOT_FINITE
    assert "7 diagonal and 4^2" in kfqn.summary(state, params)
    counts = np.bincount(np.asarray(x).ravel(), minlength=7) / 4
    held = state.layers["params"]
    assert relative(held.input_moment, counts) < 1e-12
    assert relative(held.input.inverse, 1 / (counts + 0.5)) < 1e-12
    assert isinstance(linen_kinds.calls.lookup((7, 4)).geometry, Lookup)


def test_padded_positions_count_as_inputs_and_not_as_cotangents():
    """A masked loss gives padded positions no gradient; their inputs are seen all the same."""
    model = nn.Dense(3, **F64)
    x = image(6, 5)
    mask = jnp.asarray(np.arange(6) < 4)[None, :, None]
    params = model.init(jax.random.key(0), x)

    def loss_fn(params, x):
        return jnp.sum(jnp.where(mask, model.apply(params, x) ** 2, 0)) / 4

    measured = measure(loss_fn, params, x).layers["params"]
    g = 2 * np.asarray(model.apply(params, x))[:, :4]
    assert relative(measured.cotangent_mean, g.sum(axis=(0, 1)) / 24) < 1e-12
    assert float(measured.rows) == 24


class TwoEquations(nn.Module):
    """One kernel that two calls read as different matrices."""

    @nn.compact
    def __call__(self, x):
        einsum = nn.Einsum((5, 5), use_bias=False, **F64)
        return einsum(nn.tanh(einsum(x, "bd,dh->bh")), "bd,hd->bh")


class Masked(nn.Module):
    """One convolution with a mask on its kernel beside a dense layer."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(3, (2,), mask=jnp.ones((2, 2, 3)), **F64)(x)
        return nn.Dense(3, **F64)(x)


@pytest.mark.parametrize(
    ("model", "shape", "found"),
    [(TwoEquations(), (5,), []), (Masked(), (6, 2), ["params/Dense_0"])],
)
def test_a_kernel_that_is_no_one_matrix_is_no_layer(model, shape, found):
    """It is left to the fallback, which `summary` says."""
    x = image(*shape)
    params = model.init(jax.random.key(0), x)

    def loss_fn(params, x):
        return jnp.mean(model.apply(params, x) ** 2)

    layers = kfqn.find_layers(loss_fn, params, x)
    assert [layer.path for layer in layers] == found
    tx = kfqn.kbfgs(0.1, layers=layers)
    state = tx.init(params)
    assert "fallback" in kfqn.summary(state, params) if found else True
    _, state, _ = step_of(tx, loss_fn)(params, state, x)
