"""Statistics against explicit per-example, per-position math; the user's loss left as it was."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from models import Mlp, loss_of, problem, relative
from steps import layers_of

import kfqn_optax as kfqn
from kfqn_optax.layers import dense

F64 = {"param_dtype": jnp.float64, "dtype": jnp.float64}


def explicit(model, params, x, targets):
    """Statistics of each layer of an `Mlp` from each example's own loss, position by position.

    Cotangents are gradients with respect to a zero added to each layer's output.
    """
    leaves = params["params"]
    names = sorted(leaves, key=lambda name: int(name.split("_")[1]))
    outputs = {n: (*x.shape[:-1], leaves[n]["kernel"].shape[1]) for n in names}
    zeros = {n: jnp.zeros(shape) for n, shape in outputs.items()}
    activations = model.activations or ["relu"] * (len(names) - 1) + ["linear"]

    def forward(zeros):
        h, inputs = x, {}
        for name, activation in zip(names, activations, strict=True):
            inputs[name] = h
            bias = jnp.broadcast_to(leaves[name].get("bias", 0.0), zeros[name].shape)
            h = h @ leaves[name]["kernel"] + bias + zeros[name]
            h = nn.relu(h) if activation == "relu" else h
        return 0.5 * jnp.sum((h - targets) ** 2), inputs  # the sum over examples of f_n

    g, inputs = jax.jit(jax.grad(forward, has_aux=True))(zeros)
    result = {}
    for name in names:
        a = np.asarray(inputs[name])
        if "bias" in leaves[name]:
            a = np.concatenate([a, np.ones((*a.shape[:-1], 1))], axis=-1)
        rows = a.reshape(-1, a.shape[-1])
        result["params/" + name] = {
            "input_moment": sum(np.outer(row, row) for row in rows) / len(x),
            "input_mean": rows.mean(axis=0),
            "cotangent_mean": np.asarray(g[name]).reshape(-1, g[name].shape[-1]).mean(axis=0),
            "rows": len(rows),
            "examples": len(x),
        }
    return result


def check(statistics, expected, tolerance=1e-10):
    assert set(statistics.layers) == set(expected)
    for path, layer in expected.items():
        for name, value in layer.items():
            assert relative(getattr(statistics.layers[path], name), value) < tolerance, (path, name)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("positions", "batch"), [((), 1), ((), 6), ((7,), 6), ((2, 3), 1)])
def test_dense_against_explicit_math(bias, positions, batch):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(batch, *positions, 5)))
    targets = jnp.asarray(rng.normal(size=(batch, *positions, 3)))
    model = Mlp([4, 6, 3], bias=bias)
    params = model.init(jax.random.key(0), x)
    loss_fn = loss_of(model)
    statistics = jax.jit(kfqn.curvature_fn(loss_fn, params, x, targets))(params)
    check(statistics, explicit(model, params, x, targets))
    assert relative(statistics.loss, jax.jit(loss_fn)(params, x, targets)) < 1e-14


def scanned(loss_fn, params, x, targets):
    """The same loss with the batch in four microbatches."""
    parts = jax.tree.map(lambda v: v.reshape(4, -1, *v.shape[1:]), (x, targets))
    return jax.lax.map(lambda xt: loss_fn(params, *xt), parts).mean()


class Remat(nn.Module):
    """`Mlp([4, 3])` with the first layer rematerialised and the second under `nn.jit`."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.remat(nn.Dense)(4, name="Dense_0", **F64)(x))
        return nn.jit(nn.Dense)(3, name="Dense_1", **F64)(x)


class OverExamples(nn.Module):
    """`Mlp([4, 3])` under `nn.vmap` over the examples, weights shared."""

    @nn.compact
    def __call__(self, x):
        shared = nn.vmap(nn.Dense, variable_axes={"params": None}, split_rngs={"params": False})
        return shared(3, name="Dense_1", **F64)(nn.relu(shared(4, name="Dense_0", **F64)(x)))


def test_every_way_to_run_the_same_layers():
    """jit, remat, vmap over examples, lifted transforms: the same statistics."""
    loss_fn, params, x, targets = problem()
    expected = jax.jit(kfqn.curvature_fn(loss_fn, params, x, targets))(params)
    one = lambda p, x, t: loss_fn(p, x[None], t[None])  # noqa: E731
    ways = {
        "jit": jax.jit(loss_fn),
        "checkpoint": jax.checkpoint(loss_fn),
        "vmap": lambda p, x, t: jax.vmap(lambda x, t: loss_of_vector(p, x, t))(x, t).mean(),
        "vmap of jit": lambda p, x, t: jax.vmap(jax.jit(one), in_axes=(None, 0, 0))(p, x, t).mean(),
        "nn.remat and nn.jit": loss_of(Remat()),
        "nn.vmap": loss_of(OverExamples()),
        "aux output": lambda p, x, t: (loss_fn(p, x, t), {"x": x}),
        "jitted before": warmed_up(loss_fn, params, x, targets),
    }
    for name, way in ways.items():
        actual = jax.jit(lambda p, way=way: kfqn.curvature_fn(way, params, x, targets)(p))(params)
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            assert relative(a, b) < 1e-12, name


def loss_of_vector(params, x, target):
    """One example's loss with the layers called on vectors, as under `jax.vmap`."""
    out = Mlp([4, 3]).apply(params, x)
    return 0.5 * jnp.sum((out - target) ** 2)


def warmed_up(loss_fn, *args):
    """A jitted loss that the user has called before."""
    jitted = jax.jit(loss_fn)
    jitted(*args)
    return jitted


def test_positions_include_vmapped_ones_within_an_example():
    rng = np.random.default_rng(0)
    x, targets = jnp.asarray(rng.normal(size=(6, 5, 5))), jnp.asarray(rng.normal(size=(6, 5, 3)))
    params = Mlp([4, 3]).init(jax.random.key(0), x)

    def over_examples_then_positions(params, x, targets):
        per_example = jax.vmap(jax.vmap(lambda x, t: loss_of_vector(params, x, t)))
        return per_example(x, targets).sum(axis=1).mean()

    expected = explicit(Mlp([4, 3]), params, x, targets)
    measure = jax.jit(kfqn.curvature_fn(over_examples_then_positions, params, x, targets))
    check(measure(params), expected)


class Siamese(nn.Module):
    """One layer called twice, on x and on its negative."""

    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(3, **F64)
        return jnp.tanh(dense(x)) + jnp.tanh(2 * dense(-x))


class Recurrent(nn.Module):
    """One layer scanned over time with shared weights."""

    @nn.compact
    def __call__(self, x):  # [batch, time, 3]
        def body(dense, carry, x):
            return jnp.tanh(dense(x + carry)), ()

        scan = nn.scan(body, variable_broadcast="params", split_rngs={"params": False}, in_axes=1)
        carry, _ = scan(nn.Dense(3, **F64), jnp.zeros_like(x[:, 0]), x)
        return carry


@pytest.mark.parametrize("model", [Siamese(), Recurrent()])
def test_calls_of_one_layer_count_as_positions(model):
    """G = (1/m) sum of g a^T over examples and calls, so the statistics must sum like it does."""
    rng = np.random.default_rng(0)
    shape = (6, 4, 3) if isinstance(model, Recurrent) else (6, 3)
    x = jnp.asarray(rng.normal(size=shape))
    targets = jnp.asarray(rng.normal(size=(6, 3)))
    params = model.init(jax.random.key(0), x)
    loss_fn = loss_of(model)
    (layer,) = kfqn.find_layers(loss_fn, params, x, targets)
    measured = jax.jit(kfqn.curvature_fn(loss_fn, params, x, targets))(params).layers[layer.path]
    calls = 4 if isinstance(model, Recurrent) else 2
    assert int(measured.rows) == 6 * calls
    assert int(measured.examples) == 6
    bias_gradient = jax.tree.leaves(jax.grad(loss_fn)(params, x, targets))[0]
    assert relative(measured.cotangent_mean * calls, bias_gradient) < 1e-10
    assert relative(measured.input_moment[-1, -1], calls) < 1e-12
    if isinstance(model, Siamese):
        moment = 2 * (x.T @ x) / 6
        assert relative(measured.input_moment[:-1, :-1], moment) < 1e-10
        assert float(jnp.max(jnp.abs(measured.input_mean[:-1]))) < 1e-15


def test_gradients_are_the_users_to_the_last_bit():
    loss_fn, params, x, targets = problem(dtype=jnp.float32)

    @jax.jit
    def both(params):
        grads = jax.grad(loss_fn)(params, x, targets)
        return grads, kfqn.curvature_fn(loss_fn, params, x, targets)(params)

    plain = jax.jit(jax.grad(loss_fn))(params, x, targets)
    for a, b in zip(jax.tree.leaves(both(params)[0]), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(a, b)


def test_other_collections_and_dropout_pass_through():
    """The probe sees the same random numbers and the same batch-norm mode."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.Dense(8, **F64)(x)
            x = nn.BatchNorm(use_running_average=not train, param_dtype=jnp.float64)(x)
            x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x))
            return nn.Dense(2, **F64)(x)

    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)))
    variables = Net().init(jax.random.key(0), x, False)
    params, stats = variables["params"], variables["batch_stats"]

    def loss_fn(params, stats, x, key, *, train):
        out, changed = Net().apply(
            {"params": params, "batch_stats": stats}, x, train,
            rngs={"dropout": key}, mutable=["batch_stats"],
        )  # fmt: skip
        return jnp.mean(jnp.sum(out**2, axis=-1)), changed

    key = jax.random.key(1)
    fn = kfqn.curvature_fn(loss_fn, params, stats, x, key, train=True)
    first, again = fn(params), fn(params)
    assert float(first.loss) == float(loss_fn(params, stats, x, key, train=True)[0])
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert set(first.layers) == {"Dense_0", "Dense_1"}
    other = kfqn.curvature_fn(loss_fn, params, stats, x, jax.random.key(2), train=True)(params)
    assert float(other.loss) != float(first.loss)


@pytest.mark.parametrize(
    ("param_dtype", "dtype", "factors", "tolerance"),
    [
        (jnp.bfloat16, jnp.bfloat16, jnp.float32, 2e-2),
        (jnp.float16, jnp.float16, jnp.float32, 3e-3),
        (jnp.float32, jnp.bfloat16, jnp.float32, 2e-2),
        (jnp.float32, jnp.float32, jnp.float32, 1e-5),
        (jnp.float64, jnp.float64, jnp.float64, 1e-12),
        (jnp.float64, jnp.float32, jnp.float64, 1e-5),
    ],
)
def test_dtypes(param_dtype, dtype, factors, tolerance):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, param_dtype=param_dtype, dtype=dtype)(x)

    loss_fn, params, x, targets = problem(widths=[3])
    params = jax.tree.map(lambda p: p.astype(param_dtype), params)
    expected = explicit(Mlp([3]), jax.tree.map(lambda p: p.astype(jnp.float64), params), x, targets)
    statistics = kfqn.curvature_fn(loss_of(Net()), params, x, targets)(params)
    (layer,) = statistics.layers.values()
    assert {leaf.dtype for leaf in jax.tree.leaves(layer)} == {jnp.dtype(factors)}
    check(statistics, expected, tolerance)


def test_containers_and_boxes():
    """Parameters in tuples, dataclasses of Flax and partitioning boxes; two models in one tree."""
    loss_fn, params, x, targets = problem()
    plain = kfqn.curvature_fn(loss_fn, params, x, targets)(params)

    def pair_loss(both, x, targets):
        return loss_fn(both[0]["enc"], x, targets) + loss_fn(both[1], x, targets)

    nested = ({"enc": params}, params)
    found = kfqn.find_layers(pair_loss, nested, x, targets)
    assert [layer.path for layer in found] == [
        "0/enc/params/Dense_0", "0/enc/params/Dense_1", "1/params/Dense_0", "1/params/Dense_1",
    ]  # fmt: skip
    measured = kfqn.curvature_fn(pair_loss, nested, x, targets)(nested)
    for path, layer in plain.layers.items():
        for prefix in ["0/enc/", "1/"]:
            jax.tree.map(np.testing.assert_array_equal, measured.layers[prefix + path], layer)

    class Boxed(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
            return nn.Dense(3, kernel_init=init, **F64)(x)

    boxed = Boxed().init(jax.random.key(0), x)
    measured = kfqn.curvature_fn(loss_of(Boxed()), boxed, x, targets)(boxed)
    unboxed = nn.meta.unbox(boxed)
    expected = kfqn.curvature_fn(loss_of(Boxed()), unboxed, x, targets)(unboxed)
    jax.tree.map(np.testing.assert_array_equal, measured, expected)


class ActorCritic(NamedTuple):
    """A field of the name that boxes use for what they hold."""

    policy: Any
    value: Any


def test_a_field_of_the_name_value():
    loss_fn, params, x, targets = problem()

    def both(pair, x, targets):
        return loss_fn(pair.policy, x, targets) + loss_fn(pair.value, x, targets)

    pair = ActorCritic(params, params)
    paths = [layer.path for layer in kfqn.find_layers(both, pair, x, targets)]
    assert paths == [f"{f}/params/Dense_{i}" for f in ("policy", "value") for i in (0, 1)]
    state = kfqn.kbfgs(0.1, layers=kfqn.find_layers(both, pair, x, targets)).init(pair)
    assert list(layers_of(state)) == paths


def test_the_order_of_a_dictionary_does_not_matter():
    """Else a `curvature_fn` that is an argument of a jitted step would compile it again."""
    loss_fn, params, x, targets = problem()
    turned = {"params": dict(reversed(params["params"].items()))}
    one, other = (kfqn.curvature_fn(loss_fn, p, x, targets) for p in (params, turned))
    assert one.func == other.func
    assert jax.tree.structure(one) == jax.tree.structure(other)


def test_an_empty_batch_has_no_rows():
    _, params, x, _ = problem()
    measured = kfqn.curvature_fn(lambda p, x: Mlp([4, 3]).apply(p, x).sum(), params, x[:0])(params)
    assert [int(layer.rows) for layer in measured.layers.values()] == [0, 0]


def test_a_subclass_is_seen_at_its_inner_call():
    class Doubled(nn.Dense):
        @nn.compact
        def __call__(self, x):
            return 2 * super().__call__(x)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Doubled(3, name="Dense_0", **F64)(x)

    loss_fn, params, x, targets = problem(widths=[3])
    measured = kfqn.curvature_fn(loss_of(Net()), params, x, targets)(params)
    layer = measured.layers["params/Dense_0"]
    grads = jax.grad(loss_of(Net()))(params, x, targets)["params"]["Dense_0"]
    assert int(layer.rows) == len(x)
    assert relative(layer.cotangent_mean, grads["bias"]) < 1e-12


def test_find_layers_needs_shapes_only():
    loss_fn, params, x, targets = problem()
    abstract = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in (x, targets)]
    assert kfqn.find_layers(loss_fn, params, *abstract) == (
        dense("params/Dense_0", (5, 4), True),
        dense("params/Dense_1", (4, 3), True),
    )


def test_a_layer_that_the_loss_does_not_depend_on_has_no_rows():
    loss_fn, params, x, targets = problem()

    def frozen(params, x, targets):
        kept = jax.lax.stop_gradient(Mlp([4, 3]).apply(params, x))
        return jnp.mean(jnp.sum((kept - targets) ** 2, axis=-1))

    measured = kfqn.curvature_fn(frozen, params, x, targets)(params)
    assert [int(layer.rows) for layer in measured.layers.values()] == [0, 0]
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(measured))
