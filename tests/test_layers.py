"""What counts as a layer, by name and shape; kernel and bias as one matrix and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from kfqn_optax import layers as layers_lib
from kfqn_optax.layers import dense

F32 = jnp.float32


def shape(*sizes, dtype=F32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def test_infer_layers_by_names_and_shapes_in_the_order_of_the_tree():
    tree = {
        "enc": [{"kernel": shape(5, 4), "bias": shape(4)}, {"kernel": shape(4, 3)}],
        "embed": {"embedding": shape(7, 7)},
        "norm": {"scale": shape(3), "bias": shape(3)},
    }
    assert layers_lib.infer_layers(layers_lib.named_leaves(tree)) == (
        dense("enc/0", (5, 4), True),
        dense("enc/1", (4, 3), False),
    )
    assert layers_lib.infer_layers({"embed/embedding": shape(7, 7)}) == ()


def test_a_layer_at_the_root_has_an_empty_path():
    (layer,) = layers_lib.infer_layers({"kernel": shape(2, 3), "bias": shape(3)})
    assert layer == dense("", (2, 3), True)
    assert layer.parameter_paths == ("kernel", "bias")
    assert dense("a/b", (2, 3), False).parameter_paths == ("a/b/kernel",)


def test_layers_are_facts():
    layer = dense("d", (2, 4), True)
    assert {layer: 1}[dense("d", (2, 4), True)] == 1
    with pytest.raises(AttributeError):
        layer.d_in = 5


def test_named_leaves_by_path():
    tree = {"b": (jnp.zeros(1), {"x": jnp.zeros(2)}), "a": jnp.zeros(3)}
    assert {k: v.shape for k, v in layers_lib.named_leaves(tree).items()} == {
        "a": (3,), "b/0": (1,), "b/1/x": (2,),
    }  # fmt: skip
    assert list(layers_lib.named_leaves(tree)) == ["a", "b/0", "b/1/x"]
    (name,) = layers_lib.named_leaves(jnp.zeros(2))
    assert name == ""


def test_named_leaves_look_through_boxes():
    kernel, bias = jnp.ones((2, 3)), jnp.ones(3)
    boxed = {"d": {"kernel": nn.Partitioned(kernel, (None, "model")), "bias": bias}}
    leaves = layers_lib.named_leaves(boxed)
    assert set(leaves) == {"d/kernel", "d/bias"}
    assert leaves["d/kernel"] is kernel
    assert layers_lib.infer_layers(leaves) == (dense("d", (2, 3), True),)
    bare = layers_lib.named_leaves({"value": {"value": kernel}})  # a module of that name stays
    assert set(bare) == {"value/value"}


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 5), st.booleans(), st.sampled_from(["", "a", "a/b"]),
    st.sampled_from([jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64]),
)  # fmt: skip
def test_matrix_and_back(d, d_out, bias, path, dtype):
    rng = np.random.default_rng(d * 10 + d_out)
    layer = dense(path, (d, d_out), bias)
    leaves = {layer.kernel_path: jnp.asarray(rng.normal(size=(d, d_out)), dtype)}
    if bias:
        leaves[layer.bias_path] = jnp.asarray(rng.normal(size=d_out), dtype)
    matrix = layers_lib.to_matrix(layer, {**leaves, "other": jnp.zeros(3)})
    assert matrix.shape == (layer.d_in, layer.d_out)
    assert matrix.dtype == (jnp.float64 if dtype == jnp.float64 else jnp.float32)
    if bias:
        np.testing.assert_array_equal(matrix[-1], leaves[layer.bias_path].astype(matrix.dtype))
    back = layers_lib.from_matrix(layer, matrix)
    assert set(back) == set(layer.parameter_paths)
    for name, leaf in leaves.items():
        np.testing.assert_array_equal(back[name].astype(dtype), leaf)


def test_check_layers_passes_what_fits():
    layers_lib.check_layers(
        [dense("d", (2, 3), True)], {"d/kernel": shape(2, 3), "d/bias": shape(3)}
    )
    layers_lib.check_layers([dense("d", (2, 3), False)], {"d/kernel": shape(2, 3)})


@pytest.mark.parametrize(
    ("leaves", "error", "message"),
    [
        ({}, ValueError, "'d' has no parameter 'd/kernel' in .* given; they hold: nothing"),
        ({"d/kernel": shape(2, 3)}, ValueError, "no parameter 'd/bias'.*they hold: 'd/kernel'"),
        (
            {"d/kernel": shape(2, 3), "d/bias": shape(4)},
            ValueError,
            r"parameter 'd/bias' has shape \(4,\), but layer 'd' needs \(3,\)",
        ),
        (
            {"d/kernel": shape(2, 3), "d/bias": shape(3, dtype=jnp.complex64)},
            TypeError,
            "parameter 'd/bias' has dtype complex64; K-BFGS needs real floating-point",
        ),
    ],
)
def test_check_layers_refuses(leaves, error, message):
    with pytest.raises(error, match=message):
        layers_lib.check_layers([dense("d", (2, 3), True)], leaves)


def test_as_layers_takes_any_iterable_and_a_single_layer():
    one, two = dense("a", (1, 1), False), dense("b", (1, 1), False)
    assert layers_lib.as_layers(None) is None
    assert layers_lib.as_layers(one) == (one,)
    assert layers_lib.as_layers(layer for layer in [one, two]) == (one, two)
    with pytest.raises(TypeError, match=r"layers must hold what .*find_layers returns, got 'b'"):
        layers_lib.as_layers([one, "b"])


def test_some_names_in_words():
    assert layers_lib.some([]) == "nothing"
    assert layers_lib.some("ab") == "'a', 'b'"
    assert layers_lib.some("abcdefgh") == "'a', 'b', 'c', 'd', 'e', 'f' and 2 more"
    assert layers_lib.some("abc", most=1) == "'a' and 2 more"


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (jnp.bfloat16, jnp.float32),
        (jnp.float16, jnp.float32),
        (jnp.float32, jnp.float32),
        (jnp.float64, jnp.float64),
    ],
)
def test_dtype_rule(dtype, expected):
    assert layers_lib.factor_dtype(dtype) == expected
