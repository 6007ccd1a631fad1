"""Linen's layers, seen by an interceptor: rows times matrix is what the layer returned."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from test_geometry import CONVOLUTIONS, close

from kfqn_optax import linen_kinds
from kfqn_optax.geometry import Contraction, Lookup
from kfqn_optax.matrix import MatrixView

F64 = {"param_dtype": jnp.float64, "dtype": jnp.float64}


def normal(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape))


# name: (layer, its input)
CONTRACTIONS = {
    "vectors": (nn.Dense(4, **F64), normal(5, 3)),
    "one vector": (nn.Dense(4, **F64), normal(3)),
    "sequences": (nn.Dense(4, **F64), normal(2, 5, 3)),
    "no bias": (nn.Dense(4, use_bias=False, **F64), normal(5, 3)),
    "features": (nn.DenseGeneral((2, 4), **F64), normal(5, 3)),
    "axes": (nn.DenseGeneral((2, 4), axis=(-1, 1), **F64), normal(5, 3, 2, 6)),
    "first axis": (nn.DenseGeneral(4, axis=0, **F64), normal(5, 3, 2)),
    "batch axis": (nn.DenseGeneral(4, batch_dims=0, **F64), normal(2, 5, 3)),
    "batch axes": (
        nn.DenseGeneral((4, 2), axis=(4, -3), batch_dims=(0, 1), **F64),
        normal(2, 3, 4, 5, 6),
    ),
    "einsum": (nn.Einsum((3, 4, 2), "...d,dhk->...hk", **F64), normal(2, 5, 3)),
    "permuted": (nn.Einsum((6, 4, 3, 2), "tbdk, hkdj -> jbht", **F64), normal(2, 5, 3, 4)),
    "einsum's blocks": (nn.Einsum((4, 6, 3, 2), "gbdf,hfdg->fbhg", **F64), normal(2, 5, 3, 6)),
    "einsum without bias": (nn.Einsum((3, 4), "bd,dh->hb", use_bias=False, **F64), normal(5, 3)),
    "lookup": (nn.Embed(6, 3, **F64), jnp.asarray([[0, 5, 5], [-1, 2, 0]])),
    "table of one": (nn.Embed(1, 3, **F64), jnp.asarray([0, 0, 7])),
}
LAYERS = CONTRACTIONS | {
    name: (nn.Conv(features, window, **settings, **F64), normal(*shape))
    for name, (shape, features, window, settings) in CONVOLUTIONS.items()
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def watch(module, *args, **kwargs):
    """Runs a module: its parameters, and what an interceptor makes of each layer call in it."""
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *args, **kwargs))
    rng = np.random.default_rng(2)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), shapes)
    seen = []

    def intercept(next_fun, args, kwargs, context):
        output = next_fun(*args, **kwargs)
        if linen_kinds.is_layer_call(context.module, context.orig_method):
            call, inputs = linen_kinds.describe(context.module, context.orig_method, args, kwargs)
            parameters = nn.meta.unbox(context.module.variables["params"])
            seen.append((call, inputs, output, parameters))
        return output

    with nn.intercept_methods(intercept):
        module.apply(params, *args, **kwargs)
    return params, seen


@functools.partial(jax.jit, static_argnums=0)
def from_rows(call, inputs, parameters):
    """The output rows that the call's matrices say."""
    rows = call.geometry.input_rows(inputs, jnp.float64)
    kernel = call.kernel.to_matrix(parameters[call.kernel_name])
    output = jnp.einsum("n...i,...ij->n...j", rows, kernel)
    if call.bias is not None:
        bias = call.bias.to_matrix(parameters[call.bias_name])
        output += jnp.broadcast_to(bias[..., 0, :], output.shape)
    return output


def check(call, inputs, output, parameters):
    """Shapes of the views, and rows times matrix plus bias against the layer's output."""
    assert call.kernel.shape == parameters[call.kernel_name].shape
    assert (call.bias is not None) == (call.bias_name in parameters)
    if call.bias is not None:
        assert call.bias.shape == parameters[call.bias_name].shape
    expected = from_rows(call, inputs, parameters)
    close(call.geometry.output_rows(output, jnp.float64), expected)


@functools.cache
def watched(name):
    """`watch` for one of `LAYERS`."""
    return watch(*LAYERS[name])


@every_layer
def test_output_is_rows_times_matrix(name):
    _, [seen] = watched(name)
    check(*seen)


@every_layer
def test_gradient_is_the_sum_over_rows(name):
    layer, x = LAYERS[name]
    params, [(call, inputs, output, _)] = watched(name)
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=output.shape))

    @jax.jit
    def gradient_of(params):
        return jax.vjp(lambda p: layer.apply(p, x), params)[1](cotangent)[0]["params"]

    gradient = gradient_of(params)
    a = call.geometry.input_rows(inputs, jnp.float64)
    g = call.geometry.output_rows(cotangent, jnp.float64)
    kernel = call.kernel.to_matrix(gradient[call.kernel_name])
    close(kernel, jnp.einsum("n...i,n...j->...ij", a, g))
    if call.bias is not None:
        close(call.bias.to_matrix(gradient[call.bias_name])[..., 0, :], g.sum(0))


@every_layer
def test_examples_are_those_of_the_first_axis(name):
    _, x = LAYERS[name]
    _, [(call, inputs, *_)] = watched(name)
    expected = x.shape[0]
    if name in ("first axis", "batch axis", "batch axes", "einsum's blocks"):
        # Its first axis is contracted, or counts blocks: examples are along the first one left.
        expected = {"first axis": 3, "batch axis": 5, "batch axes": 5, "einsum's blocks": 5}[name]
    if name in ("one vector", "no batch axis", "no batch axis, groups"):
        expected = 1
    assert call.geometry.examples(inputs) == expected


def test_kinds_and_views_by_hand():
    def call_of(layer, x):
        return watch(layer, x)[1][0][0]

    dense = call_of(nn.Dense(4), normal(2, 5, 3))
    assert (dense.kind, dense.kernel_name, dense.bias_name) == ("dense", "kernel", "bias")
    assert dense.geometry == Contraction((0, 1), (), (2,), (0, 1), (), (2,))
    assert dense.kernel == MatrixView(((3,), (4,)), (), (0,), (1,))
    assert dense.bias == MatrixView(((4,),), (), (), (0,))
    conv = call_of(nn.Conv(6, (2, 3), feature_group_count=2, dtype=jnp.float64), normal(1, 4, 4, 4))
    assert conv.kind == "conv"
    assert conv.kernel == MatrixView(((2,), (3,), (2,), (2, 3)), (3,), (0, 1, 2), (4,))
    assert conv.bias == MatrixView(((2, 3),), (0,), (), (1,))
    general = call_of(*CONTRACTIONS["batch axes"])
    assert general.kind == "dense general"
    assert general.geometry == Contraction((3,), (0, 1), (2, 4), (2,), (0, 1), (3, 4))
    assert general.kernel.matrix_shape == (6, 24, 8)
    assert call_of(*CONTRACTIONS["einsum"]).kind == "einsum"
    table = call_of(*CONTRACTIONS["lookup"])
    assert (table.kind, table.geometry, table.kernel_name) == ("embed", Lookup(6), "embedding")
    assert table.kernel == MatrixView(((6,), (3,)), (), (0,), (1,))
    assert table.bias is None


class Tied(nn.Module):
    """A table that is also the output layer."""

    @nn.compact
    def __call__(self, tokens):
        table = nn.Embed(7, 3, **F64)
        return table.attend(query=table(tokens))


def test_attend_multiplies_with_the_transposed_table():
    _, seen = watch(Tied(), jnp.asarray([[1, 5, 2], [0, 0, 6]]))
    assert [call.kind for call, *_ in seen] == ["embed", "attend"]
    for call in seen:
        check(*call)
    assert seen[1][0].kernel == MatrixView(((7,), (3,)), (), (1,), (0,))
    assert seen[1][0].kernel_name == "embedding"


def test_attention_is_four_layers():
    attention = nn.MultiHeadDotProductAttention(2, qkv_features=6, **F64)
    _, seen = watch(attention, normal(2, 5, 4))
    assert [call.kernel.matrix_shape for call, *_ in seen] == [(4, 6)] * 3 + [(6, 4)]
    for call in seen:
        check(*call)
        assert call[0].geometry.examples(call[1]) == 2


def test_cells_of_recurrent_nets_are_dense_layers():
    for cell, layers in ((nn.GRUCell, 6), (nn.LSTMCell, 8)):
        cell = cell(4, **F64)
        carry = (normal(5, 4),) * 2 if layers == 8 else normal(5, 4)
        _, seen = watch(cell, carry, normal(5, 3))
        assert [call.kind for call, *_ in seen] == ["dense"] * layers
        for call in seen:
            check(*call)


class Transforms(nn.Module):
    """Layers under lifted transforms, and a kernel in a box."""

    @nn.compact
    def __call__(self, x):
        x = nn.remat(nn.Dense)(4, **F64)(x)
        x = nn.jit(nn.DenseGeneral)(4, **F64)(x)
        boxed = nn.with_partitioning(nn.initializers.normal(1.0), ("in", "out"))
        x = nn.Dense(2, kernel_init=boxed, **F64)(x)
        stack = nn.vmap(
            nn.Dense, variable_axes={"params": 1}, split_rngs={"params": True}, axis_size=6
        )
        return stack(3, **F64)(jnp.stack([x] * 6))


def test_layers_under_transforms():
    """The shapes are those that the layer sees, of one of the stack of six."""
    params, seen = watch(Transforms(), normal(5, 3))
    assert params["params"]["VmapDense_0"]["kernel"].shape == (2, 6, 3)
    assert [(call.kind, call.kernel.shape, inputs.shape) for call, inputs, *_ in seen] == [
        ("dense", (3, 4), (5, 3)),
        ("dense general", (4, 4), (5, 4)),
        ("dense", (4, 2), (5, 4)),
        ("dense", (2, 3), (5, 2)),
    ]


class Doubled(nn.Dense):
    """A subclass with a call of its own around Flax's."""

    def __call__(self, x):
        return nn.relu(super().__call__(2 * x))


class Renamed(nn.Conv):
    """A subclass that changes nothing."""


def test_only_the_call_that_flax_wrote_counts():
    x = normal(5, 3)
    _, [seen] = watch(Doubled(4, **F64), x)
    check(*seen)
    np.testing.assert_array_equal(seen[1], 2 * x)
    assert seen[2].min() < 0  # before the relu
    _, [seen] = watch(Renamed(4, 3, **F64), normal(2, 5, 3))
    check(*seen)


@pytest.mark.parametrize("name", ["vectors", "axes", "einsum", "groups", "lookup"])
def test_input_by_keyword(name):
    layer, x = LAYERS[name]
    _, [seen] = watch(layer, inputs=x)
    check(*seen)
    np.testing.assert_array_equal(seen[1], x)


def test_equation_of_an_einsum_at_the_call():
    layer, x = nn.Einsum((3, 4, 2), **F64), normal(5, 3)
    for args, kwargs in (((x, "bd,dhk->kbh"), {}), ((x,), {"einsum_str": "bd,dhk->kbh"})):
        _, [seen] = watch(layer, *args, **kwargs)
        check(*seen)
        assert seen[0].geometry.output_free == (2, 0)


def test_numpy_inputs_come_back_as_jax_arrays():
    _, [seen] = watch(nn.Dense(4, **F64), np.ones((5, 3)))
    assert isinstance(seen[1], jax.Array)
    check(*seen)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Conv(4, (3,), mask=jnp.ones((3, 2, 4)), **F64), normal(2, 5, 2)),
        (nn.Einsum((3, 4), "bcd,dh->bh", use_bias=False, **F64), normal(5, 2, 3)),
        (nn.Einsum((3, 4), "dd,dh->h", **F64), normal(3, 3)),
    ],
)
def test_calls_that_are_refused(layer, x):
    _, [(call, inputs, *_)] = watch(layer, x)
    assert call is None
    np.testing.assert_array_equal(inputs, x)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.ConvLocal(4, (3,)), (2, 5, 3)),
        (nn.ConvTranspose(4, (3,)), (2, 5, 3)),
        (nn.LayerNorm(), (5, 3)),
        (nn.OptimizedLSTMCell(3), None),
    ],
)
def test_modules_that_are_no_layers(module, shape):
    args = ((normal(5, 3),) * 2, normal(5, 3)) if shape is None else (normal(*shape),)
    params, seen = watch(module, *args)
    assert seen == []
    assert jax.tree.leaves(params)
