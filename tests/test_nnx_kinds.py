"""NNX's layers: the facts are linen's for the same layer, and rows times matrix is the output."""

import jax.numpy as jnp
import pytest
from flax import nnx
from test_geometry import CONVOLUTIONS, close
from test_linen_kinds import LAYERS, check, normal, watched

from kfqn_optax import nnx_kinds
from kfqn_optax.geometry import Lookup

F64 = {"param_dtype": jnp.float64, "dtype": jnp.float64}
SETTINGS = {**F64, "kernel_init": nnx.initializers.ones, "rngs": nnx.Rngs(0)}
OF_TABLE = {**F64, "embedding_init": nnx.initializers.ones, "rngs": nnx.Rngs(0)}

# name in test_linen_kinds.LAYERS: the same layer
SAME = {
    "vectors": nnx.Linear(3, 4, **SETTINGS),
    "one vector": nnx.Linear(3, 4, **SETTINGS),
    "sequences": nnx.Linear(3, 4, **SETTINGS),
    "no bias": nnx.Linear(3, 4, use_bias=False, **SETTINGS),
    "features": nnx.LinearGeneral(3, (2, 4), **SETTINGS),
    "axes": nnx.LinearGeneral((3, 6), (2, 4), axis=(-1, 1), **SETTINGS),
    "first axis": nnx.LinearGeneral(5, 4, axis=0, **SETTINGS),
    "batch axis": nnx.LinearGeneral(3, 4, batch_axis={0: 2}, **SETTINGS),
    "batch axes": nnx.LinearGeneral(
        (4, 6), (4, 2), axis=(4, -3), batch_axis={0: 2, 1: 3}, **SETTINGS
    ),
    "einsum": nnx.Einsum("...d,dhk->...hk", (3, 4, 2), (4, 2), **SETTINGS),
    "permuted": nnx.Einsum("tbdk, hkdj -> jbht", (6, 4, 3, 2), (2, 6), **SETTINGS),
    "einsum's blocks": nnx.Einsum("gbdf,hfdg->fbhg", (4, 6, 3, 2), (6, 4, 2), **SETTINGS),
    "einsum without bias": nnx.Einsum("bd,dh->hb", (3, 4), **SETTINGS),
    "lookup": nnx.Embed(6, 3, **OF_TABLE),
    "table of one": nnx.Embed(1, 3, **OF_TABLE),
} | {
    name: nnx.Conv(shape[-1], features, window, **settings, **SETTINGS)
    for name, (shape, features, window, settings) in CONVOLUTIONS.items()
}


def parameters(layer):
    return {name: v[...] for name, v in vars(layer).items() if isinstance(v, nnx.Param)}


def describe(layer, x, *args, method="__call__", **kwargs):
    """Runs a layer: the `Call`, the input, the output, the parameters."""
    output = getattr(layer, method)(x, *args, **kwargs)
    call = nnx_kinds.describe(layer, method, x, args, kwargs)
    return call, x, output, parameters(layer)


def test_all_layers_are_compared():
    assert set(SAME) == set(LAYERS)


@pytest.mark.parametrize("name", SAME)
def test_facts_are_those_of_linen(name):
    layer, (_, x) = SAME[name], LAYERS[name]
    params, [(expected, _, of_linen, _)] = watched(name)
    assert set(parameters(layer)) == set(params["params"])
    for key, value in params["params"].items():
        getattr(layer, key)[...] = value
    assert nnx_kinds.is_layer(layer)
    assert nnx_kinds.methods(type(layer))[0] == "__call__"
    call, _, output, own = describe(layer, x)
    assert call == expected
    close(output, of_linen)
    check(call, x, output, own)


def test_attend_multiplies_with_the_transposed_table():
    layer, x = nnx.Embed(7, 3, rngs=nnx.Rngs(0), **F64), normal(2, 5, 3)
    call, *seen = describe(layer, x, method="attend")
    assert (call.kind, call.kernel_name, call.bias) == ("attend", "embedding", None)
    check(call, *seen)
    assert nnx_kinds.methods(nnx.Embed) == ("__call__", "attend")
    assert describe(layer, jnp.asarray([0, 6]))[0].geometry == Lookup(7)


def test_attention_is_four_layers():
    attention = nnx.MultiHeadAttention(2, 4, 6, decode=False, rngs=nnx.Rngs(0), **F64)
    layers = {"/".join(p): m for p, m in nnx.iter_modules(attention) if nnx_kinds.is_layer(m)}
    assert set(layers) == {"query", "key", "value", "out"}
    for name, layer in layers.items():
        x = normal(2, 5, 2, 3) if name == "out" else normal(2, 5, 4)
        call, *seen = describe(layer, x)
        assert call.kernel.matrix_shape == ((6, 4) if name == "out" else (4, 6))
        check(call, *seen)


def test_cells_of_recurrent_nets_are_dense_layers():
    cell = nnx.GRUCell(3, 4, rngs=nnx.Rngs(0), **F64)
    layers = [m for _, m in nnx.iter_modules(cell) if nnx_kinds.is_layer(m)]
    shapes = {describe(m, normal(5, m.in_features))[0].kernel.shape for m in layers}
    assert shapes == {(3, 12), (4, 12)}


def test_equation_and_sharding_at_the_call():
    layer = nnx.Einsum("bd,dhk->bhk", (3, 4, 2), (2, 4), **SETTINGS)
    layer.kernel[...], layer.bias[...] = normal(3, 4, 2), normal(2, 4)
    layer.einsum_str = None
    for args, kwargs in ((("bd,dhk->kbh",), {}), ((), {"einsum_str": "bd,dhk->kbh"})):
        call, *seen = describe(layer, normal(5, 3), *args, **kwargs)
        assert call.geometry.output_free == (2, 0)
        check(call, *seen)
    call, *_ = describe(SAME["vectors"], normal(5, 3), out_sharding=None)
    assert call.kind == "dense"


class Doubled(nnx.Linear):
    """A subclass with a call of its own around Flax's."""

    def __call__(self, x):
        return super().__call__(2 * x)


class Renamed(nnx.Linear):
    """A subclass that changes nothing."""


class OwnAttend(nnx.Embed):
    """A table whose attend is its own; its lookups are Flax's."""

    def attend(self, query):
        return 2 * super().attend(query)


def test_only_the_methods_that_flax_wrote_count():
    rngs = nnx.Rngs(0)
    assert not nnx_kinds.is_layer(Doubled(3, 4, rngs=rngs))
    assert not nnx_kinds.is_layer(nnx.LoRALinear(3, 4, lora_rank=2, rngs=rngs))
    assert nnx_kinds.methods(OwnAttend) == ("__call__",)
    assert nnx_kinds.is_layer(OwnAttend(3, 4, rngs=rngs))
    layer = Renamed(3, 4, rngs=rngs, **F64)
    assert nnx_kinds.is_layer(layer)
    check(*describe(layer, normal(5, 3)))


def test_what_is_refused():
    rngs = nnx.Rngs(0)
    masked = nnx.Conv(2, 4, (3,), mask=jnp.ones((3, 2, 4)), rngs=rngs, **F64)
    assert describe(masked, normal(2, 5, 2))[0] is None
    flat = nnx.Einsum("bd,dhk->bhk", (3, 4, 2), (8,), **SETTINGS)
    assert describe(flat, normal(5, 3))[0] is None
    assert not nnx_kinds.is_layer(nnx.ConvTranspose(2, 4, (3,), rngs=rngs))
    assert not nnx_kinds.is_layer(nnx.LayerNorm(3, rngs=rngs))
