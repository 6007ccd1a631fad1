"""Geometries and the calls that make them, against loops over positions in plain NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kfqn_optax import calls
from kfqn_optax.geometry import Contraction, Convolution, Lookup, second_moment
from kfqn_optax.matrix import MatrixView

# name: (input shape, features, window, Flax's settings)
CONVOLUTIONS = {
    "1-d": ((2, 7, 3), 4, (3,), {}),
    "strides": ((2, 8, 3), 4, (3,), {"strides": 2}),
    "even window": ((2, 8, 3), 4, (4,), {"strides": (3,)}),
    "valid": ((2, 7, 3), 4, (3,), {"padding": "VALID"}),
    "causal": ((2, 7, 3), 4, (3,), {"padding": "CAUSAL", "kernel_dilation": 2}),
    "circular": ((2, 9, 2), 4, (4,), {"padding": "CIRCULAR", "strides": 2}),
    "circular, dilated": ((2, 9, 2), 4, (2,), {"padding": "CIRCULAR", "kernel_dilation": 3}),
    "reflect": ((2, 5, 6, 2), 3, (4, 3), {"padding": "REFLECT", "strides": (1, 2)}),
    "padding of one number": ((2, 5, 6, 2), 3, (3, 2), {"padding": 1}),
    "padding of pairs": ((2, 5, 6, 2), 3, (3, 2), {"padding": ((0, 2), (1, 0))}),
    "mixed padding": ((2, 5, 6, 2), 3, (3, 2), {"padding": [2, (0, 1)]}),
    "negative padding": ((2, 5, 6, 2), 3, (3, 2), {"padding": ((-1, 0), (2, -1))}),
    "kernel dilation": ((2, 5, 6, 2), 3, (3, 2), {"kernel_dilation": (1, 2)}),
    "dilated, same, strides": ((2, 6, 6, 2), 3, (3, 2), {"kernel_dilation": 2, "strides": (2, 3)}),
    "input dilation": ((2, 4, 3, 2), 3, (3, 2), {"input_dilation": (2, 3), "padding": 1}),
    "settings left open": ((2, 5, 6, 2), 3, (3, 2), {"strides": None, "kernel_dilation": None}),
    "groups": ((2, 5, 4, 6), 4, (3, 2), {"feature_group_count": 2}),
    "depthwise": ((2, 5, 4, 3), 6, (3, 2), {"feature_group_count": 3, "padding": "CIRCULAR"}),
    "patches": ((2, 6, 4, 2), 5, (3, 2), {"strides": (3, 2), "padding": "VALID"}),
    "3-d": ((2, 3, 4, 3, 2), 3, (2, 3, 1), {"strides": (1, 2, 1)}),
    "no batch axis": ((7, 3), 4, (3,), {}),
    "no batch axis, groups": ((5, 4, 4), 4, (3, 2), {"feature_group_count": 2, "strides": 2}),
    "two batch axes": ((2, 3, 5, 4, 2), 3, (3, 2), {}),
}
EINSUMS = {
    "dense": ("bd,dh->bh", (5, 3), (3, 4)),
    "ellipsis": ("...d,dh->...h", (2, 5, 3), (3, 4)),
    "ellipsis behind": ("d...,dh->h...", (3, 2, 5), (3, 4)),
    "permuted": ("tbdk,hkdj->jbht", (2, 5, 3, 4), (6, 4, 3, 2)),
    "blocks": ("bgd,gdh->bgh", (5, 2, 3), (2, 3, 4)),
    "permuted blocks": ("gbdf,hfdg->fbhg", (2, 5, 3, 6), (4, 6, 3, 2)),
    "scale": ("bg,g->bg", (5, 2), (2,)),
    "one row": ("dk,kdh->h", (3, 4), (4, 3, 2)),
}


def conv_of(input_shape, features, window, settings):
    """The `Call` of a convolution with a bias."""
    settings = {
        "strides": 1, "padding": "SAME", "input_dilation": 1, "kernel_dilation": 1,
        "feature_group_count": 1, **settings,
    }  # fmt: skip
    groups = settings.pop("feature_group_count")
    kernel_shape = (*window, input_shape[-1] // groups, features)
    return calls.conv(input_shape, kernel_shape, (features,), groups=groups, **settings)


def geometries():
    """Every geometry by name, with inputs for it."""
    rng = np.random.default_rng(0)
    for name, spec in CONVOLUTIONS.items():
        yield name, conv_of(*spec).geometry, jnp.asarray(rng.normal(size=spec[0]))
    for name, (equation, inputs, kernel) in EINSUMS.items():
        geometry = calls.einsum(equation, inputs, kernel, None).geometry
        yield f"einsum, {name}", geometry, jnp.asarray(rng.normal(size=inputs))
    yield "lookup", Lookup(6), jnp.asarray(rng.integers(-6, 6, size=(4, 5)))


GEOMETRIES = list(geometries())
every_geometry = pytest.mark.parametrize(
    ("geometry", "inputs"), [g[1:] for g in GEOMETRIES], ids=[g[0] for g in GEOMETRIES]
)


def close(actual, expected, tolerance=1e-12):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * abs(expected).max())


def patches(images, geometry):
    """The patches of [n, *spatial, channels], position by position: [n, positions, *window, C]."""
    mode = {"zeros": "constant"}.get(geometry.padding_mode, geometry.padding_mode)
    x = images
    for i, (low, high) in enumerate(geometry.padding):
        axis, holes = i + 1, geometry.input_dilation[i]
        wide = np.zeros([(n - 1) * holes + 1 if j == axis else n for j, n in enumerate(x.shape)])
        np.moveaxis(wide, axis, 0)[::holes] = np.moveaxis(x, axis, 0)
        added = [(max(low, 0), max(high, 0)) if j == axis else (0, 0) for j in range(x.ndim)]
        x = np.pad(wide, added, mode=mode)
        x = np.take(x, range(max(-low, 0), x.shape[axis] - max(-high, 0)), axis)
    apart = geometry.kernel_dilation
    extent = [(size - 1) * d + 1 for size, d in zip(geometry.window, apart, strict=True)]
    starts = [
        range(0, n - e + 1, stride)
        for n, e, stride in zip(x.shape[1:-1], extent, geometry.strides, strict=True)
    ]
    rows = []
    for corner in itertools.product(*starts):
        cut = [slice(c, c + e, d) for c, e, d in zip(corner, extent, apart, strict=True)]
        rows.append(x[(slice(None), *cut)])
    return np.stack(rows, axis=1)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_patches(name):
    spec = CONVOLUTIONS[name]
    geometry = conv_of(*spec).geometry
    x = np.random.default_rng(0).normal(size=spec[0])
    images = x.reshape(-1, *spec[0][-len(geometry.window) - 1 :])
    groups, channels = geometry.groups, x.shape[-1] // geometry.groups
    expected = patches(images, geometry).reshape(-1, *geometry.window, groups, channels)
    expected = np.moveaxis(expected, -2, 1).reshape(expected.shape[0], groups, -1)
    expected = expected[:, 0] if groups == 1 else expected
    close(geometry.input_rows(jnp.asarray(x), jnp.float64), expected)


@pytest.mark.parametrize("name", EINSUMS)
def test_contractions(name):
    """Rows times the view's matrix, row by row, are the einsum."""
    equation, inputs, kernel = EINSUMS[name]
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=inputs), rng.normal(size=kernel)
    call = calls.einsum(equation, inputs, kernel, None)
    output = np.einsum(equation, x, w)
    rows = np.asarray(call.geometry.input_rows(jnp.asarray(x), jnp.float64))
    assert rows.ndim == (3 if call.kernel.blocks else 2)
    expected = np.einsum("n...i,...ij->n...j", rows, np.asarray(call.kernel.to_matrix(w)))
    close(call.geometry.output_rows(jnp.asarray(output), jnp.float64), expected)


def test_permuted_contraction_by_hand():
    call = calls.einsum("tbdk,hkdj->jbht", (2, 5, 3, 4), (6, 4, 3, 2), (2, 6))
    assert call.geometry == Contraction((0, 1), (), (3, 2), (3, 1), (), (2, 0))
    assert call.kernel == MatrixView(((6,), (4,), (3,), (2,)), (), (1, 2), (0, 3))
    assert call.bias == MatrixView(((2,), (6,)), (), (), (1, 0))  # the bias's letters: j h


def test_padding_by_hand():
    """What Flax's words for padding come to."""
    words = {
        "SAME": (((1, 2), (0, 0)), "zeros"),
        "VALID": (((0, 0), (0, 0)), "zeros"),
        "CIRCULAR": (((2, 2), (0, 1)), "wrap"),
        "REFLECT": (((2, 2), (0, 1)), "reflect"),
        3: (((3, 3), (3, 3)), "zeros"),
        (1, (0, 4)): (((1, 1), (0, 4)), "zeros"),
    }
    for padding, (pads, mode) in words.items():
        settings = {"strides": (2, 3), "kernel_dilation": (2, 1), "padding": padding}
        geometry = conv_of((1, 8, 5, 1), 1, (3, 2), settings).geometry
        assert geometry == Convolution((3, 2), (2, 3), pads, mode, (1, 1), (2, 1), 1)
    causal = conv_of((1, 8, 1), 1, (3,), {"kernel_dilation": 2, "padding": "CAUSAL"}).geometry
    assert (causal.padding, causal.padding_mode) == (((4, 0),), "zeros")


def sums(geometry, inputs, vector, dtype=jnp.float64):
    return {
        "sum": geometry.input_sum(inputs, dtype),
        "moment": geometry.moment(inputs, dtype),
        "product": geometry.product(inputs, vector, dtype),
    }


jitted_sums = jax.jit(sums, static_argnums=(0, 3))


@every_geometry
def test_sums_are_sums_over_rows(geometry, inputs):
    rows = np.asarray(geometry.input_rows(inputs, jnp.float64))
    vector = np.random.default_rng(1).normal(size=rows.shape[1:])
    actual = jitted_sums(geometry, inputs, vector)
    moment = np.einsum("n...i,n...j->...ij", rows, rows)
    close(actual["sum"], rows.sum(0))
    close(actual["product"], np.einsum("...ij,...j->...i", moment, vector))
    close(actual["moment"], np.diag(moment) if isinstance(geometry, Lookup) else moment)


SOME = ["circular", "depthwise", "no batch axis", "einsum, permuted blocks", "lookup"]
some_geometries = pytest.mark.parametrize(
    ("geometry", "inputs"), [g[1:] for g in GEOMETRIES if g[0] in SOME], ids=SOME
)


@pytest.mark.parametrize("shape", [(4, 511), (4, 512), (4, 601), (3, 2, 517)], ids=str)
def test_a_wide_moment_is_made_in_parts(shape):
    rows = np.random.default_rng(0).normal(size=shape)
    blocks = (1,) if len(shape) == 3 else ()
    last = (len(shape) - 1,)
    geometry = Contraction((0,), blocks, last, (0,), blocks, last)
    moment = np.asarray(geometry.moment(jnp.asarray(rows), jnp.float64))
    close(moment, np.einsum("n...i,n...j->...ij", rows, rows))
    weights = np.random.default_rng(1).normal(size=(*shape[:-1], 3))
    weighted = np.asarray(second_moment(jnp.asarray(rows), jnp.asarray(weights)))
    close(weighted, np.einsum("n...i,n...j,n...k->...ij", rows, rows, weights**2))


@some_geometries
def test_under_jit_and_vmap(geometry, inputs):
    stack = jnp.stack([inputs, jnp.flip(inputs, axis=0), jnp.roll(inputs, 1, axis=-1)])
    shape = geometry.input_rows(inputs, jnp.float64).shape[1:]
    vectors = jnp.asarray(np.random.default_rng(1).normal(size=(3, *shape)))
    mapped = jax.jit(jax.vmap(lambda x, v: sums(geometry, x, v)))(stack, vectors)
    for i in range(3):
        for name, one in jitted_sums(geometry, stack[i], vectors[i]).items():
            close(mapped[name][i], one)
    shared = jax.vmap(lambda x: geometry.product(x, vectors[0], jnp.float64))(stack)
    close(shared[2], geometry.product(stack[2], vectors[0], jnp.float64))


@pytest.mark.parametrize("name", ["reflect", "groups", "einsum, permuted"])
def test_can_be_differentiated(name):
    """The sums may stand inside a loss, whose derivative comes in reverse over forward mode."""
    (geometry, inputs) = next(g[1:] for g in GEOMETRIES if g[0] == name)
    vector = jnp.asarray(
        np.random.default_rng(1).normal(size=geometry.input_sum(inputs, float).shape)
    )

    def of_rows(x):
        rows = geometry.input_rows(x, jnp.float64)
        along = jnp.einsum("n...i,...i->n...", rows, vector)
        return jnp.sum(along**2)

    def of_product(x):
        return jnp.sum(vector * geometry.product(x, vector, jnp.float64))

    close(of_product(inputs), of_rows(inputs))

    def derivatives(f):
        return jax.jit(lambda x: jax.jvp(jax.grad(f), (x,), (x,)))(inputs)

    for ours, expected in zip(derivatives(of_product), derivatives(of_rows), strict=True):
        close(ours, expected)


@every_geometry
def test_examples(geometry, inputs):
    if isinstance(geometry, Contraction):
        expected = [inputs.shape[axis] for axis in geometry.input_rest[:1]]
    else:
        behind = len(geometry.window) + 1 if isinstance(geometry, Convolution) else 0
        expected = list(inputs.shape[: inputs.ndim - behind][:1])
    assert geometry.examples(inputs) == (expected or [1])[0]


def test_examples_by_hand():
    by_name = {name: geometry.examples(inputs) for name, geometry, inputs in GEOMETRIES}
    assert by_name["no batch axis"] == by_name["no batch axis, groups"] == 1
    assert by_name["two batch axes"] == 2
    assert by_name["einsum, one row"] == 1
    assert by_name["einsum, blocks"] == 5
    assert by_name["einsum, permuted"] == 2
    assert by_name["lookup"] == 4
    assert Lookup(6).examples(jnp.asarray(3)) == 1


@pytest.mark.parametrize(
    ("low", "dtype"),
    [(jnp.bfloat16, jnp.float32), (jnp.float16, jnp.float32), (jnp.float32, jnp.float64)],
)
def test_low_precision_inputs_are_cast_before_they_are_summed(low, dtype):
    for name, geometry, inputs in GEOMETRIES:
        if name not in SOME or name == "lookup":
            continue
        inputs = inputs.astype(low)
        rows = geometry.input_rows(inputs, dtype)
        assert rows.dtype == dtype
        np.testing.assert_array_equal(rows, geometry.input_rows(inputs.astype(dtype), dtype))
        vector = jnp.asarray(np.random.default_rng(1).normal(size=rows.shape[1:]), dtype)
        actual = jitted_sums(geometry, inputs, vector.astype(low), dtype)
        exact = jitted_sums(geometry, inputs.astype(float), vector.astype(low).astype(float))
        for key in actual:
            assert actual[key].dtype == dtype
            close(actual[key], exact[key], 1e-12 if dtype == jnp.float64 else 1e-5)


def largest_array(fn, *args):
    """Number of elements of the largest array that a function makes."""

    def inner(jaxpr):
        for equation in jaxpr.eqns:
            yield from (var.aval.size for var in equation.outvars)
            for value in jax.tree.leaves(equation.params, is_leaf=lambda v: hasattr(v, "eqns")):
                value = getattr(value, "jaxpr", value)
                if hasattr(value, "eqns"):
                    yield from inner(value)

    return max(inner(jax.make_jaxpr(fn)(*args).jaxpr))


@pytest.mark.parametrize("settings", [{}, {"padding": "CIRCULAR"}, {"feature_group_count": 3}])
def test_product_and_sum_of_a_convolution_unfold_nothing(settings):
    shape = (4, 10, 10, 3)
    geometry = conv_of(shape, 6, (5, 5), settings).geometry
    x = jnp.zeros(shape)
    rows = geometry.input_rows(x, jnp.float64)
    vector = jnp.zeros(rows.shape[1:])
    assert largest_array(lambda x: geometry.input_rows(x, jnp.float64), x) >= rows.size
    largest = largest_array(jax.jit(lambda x, v: geometry.product(x, v, jnp.float64)), x, vector)
    assert largest <= 4 * 14 * 14 * 3  # the padded images
    largest = largest_array(jax.jit(lambda x: geometry.input_sum(x, jnp.float64)), x)
    assert largest <= rows.size // 4  # the patches of one image


def test_operations_of_a_product():
    """4 N d, as told by the compiler: two convolutions with one output channel."""
    shape = (8, 16, 16, 4)
    geometry = conv_of(shape, 6, (3, 3), {"padding": "VALID"}).geometry
    x, vector = jnp.ones(shape, jnp.float32), jnp.ones(36, jnp.float32)
    product = jax.jit(lambda x, v: geometry.product(x, v, jnp.float32)).lower(x, vector)
    flops = product.compile().cost_analysis()["flops"]
    assert 0.9 < flops / (4 * 8 * 14 * 14 * 36) < 1.2


def test_lookup_counts():
    inputs = jnp.asarray([[0, 2, 2], [-1, -5, 4]])
    np.testing.assert_array_equal(Lookup(5).moment(inputs, jnp.float64), [2, 0, 2, 0, 2])
    np.testing.assert_array_equal(Lookup(5).input_sum(inputs, jnp.float64), [2, 0, 2, 0, 2])
    outside = jnp.asarray([1, 5, 700])
    np.testing.assert_array_equal(Lookup(5).input_sum(outside, jnp.float32), [0, 1, 0, 0, 0])
    np.testing.assert_array_equal(
        Lookup(5).input_rows(outside, jnp.float32).sum(0), [0, 1, 0, 0, 0]
    )
    np.testing.assert_array_equal(Lookup(1).input_sum(inputs, jnp.float32), [6])
    np.testing.assert_array_equal(Lookup(1).input_rows(inputs, jnp.float32), np.ones((6, 1)))
    assert Lookup(5).input_sum(jnp.asarray(3), jnp.float32)[3] == 1


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint32, np.int64])
def test_lookup_with_any_integers_in_a_table_larger_than_their_range(dtype):
    inputs = np.asarray([1, 120, 120], dtype)
    expected = np.bincount(inputs.astype(int), minlength=70_000)
    np.testing.assert_array_equal(Lookup(70_000).input_sum(jnp.asarray(inputs), float), expected)
    if np.issubdtype(dtype, np.signedinteger):
        counts = Lookup(300).input_sum(-jnp.asarray(inputs), jnp.float64)
        assert (counts[299], counts[180]) == (1, 2)


def test_lookup_forms_no_one_hot_vectors():
    inputs, vector = jnp.zeros((50, 4), int), jnp.zeros(1000)
    assert largest_array(lambda x, v: sums(Lookup(1000), x, v), inputs, vector) == 1000


def test_equal_geometries_are_one_static_argument():
    traces = []

    def total(geometry, x):
        traces.append(geometry)
        return geometry.input_sum(x, jnp.float64)

    total = jax.jit(total, static_argnums=0)
    x = jnp.ones((2, 7, 3))
    for window in [(3,), (3,), (2,)]:
        total(conv_of(x.shape, 4, window, {}).geometry, x)
    assert len(traces) == 2
    assert hash(Lookup(3)) == hash(Lookup(3))
    assert Lookup(3) != Lookup(4)


@pytest.mark.parametrize(
    ("equation", "inputs", "kernel", "bias"),
    [
        ("bd,dh->h", (5, 3), (3, 4), None),  # b is summed away, without the kernel
        ("bd,dhk->bh", (5, 3), (3, 4, 2), None),  # k is
        ("dd,dh->h", (3, 3), (3, 4), None),  # a diagonal of the input
        ("bd,ddh->bh", (5, 3), (3, 3, 4), None),  # of the kernel
        ("...d,...h->...h", (5, 3), (3, 4), None),  # dots in the kernel
        ("...d,dh->h", (5, 3), (3, 4), None),  # summed behind dots
        ("bgd,gdh->bgh", (5, 1, 3), (2, 3, 4), None),  # a broadcast input
        ("bd,dhk->bhk", (5, 3), (3, 4, 2), (8,)),  # a flat bias of two letters
    ],
)
def test_einsums_without_a_matrix(equation, inputs, kernel, bias):
    assert calls.einsum(equation, inputs, kernel, bias) is None
