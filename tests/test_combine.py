"""Statistics of parts made into those of the whole: microbatches, and the devices of an axis."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec
from steps import close, equal

import kfqn_optax as kfqn
from kfqn_optax import combine
from kfqn_optax.statistics import LayerStatistics

PARTS, EXAMPLES, LENGTH = 4, 3, 2


# --- the rule, by hand ----------------------------------------------------------------------------


def of_rows(a, g, examples, loss):
    """Statistics from rows of inputs and of an example's cotangents, as they are defined."""
    rows = len(a)
    return kfqn.Statistics(
        jnp.asarray(loss),
        {
            "layer": LayerStatistics(
                input_moment=jnp.asarray(a.T @ a / examples),
                input_product=jnp.asarray(a.T @ (a @ np.arange(3.0)) / examples),
                input_mean=jnp.asarray(a.sum(axis=0) / max(rows, 1)),
                cotangent_mean=jnp.asarray(g.sum(axis=0) / max(rows, 1)),
                cotangent_noise=jnp.asarray(np.sqrt((g**2).sum() * 1e-7) / max(rows, 1)),
                rows=jnp.asarray(float(rows)),
                examples=jnp.asarray(float(examples)),
                output_moment=jnp.asarray(g.T @ g / max(rows, 1)),
                joint_moments=kfqn.JointMoments(
                    jnp.asarray((a.T * (g**2).sum(axis=1)) @ a / examples),
                    jnp.asarray((g.T * (a**2).sum(axis=1)) @ g / examples),
                ),
            )
        },
    )


def test_parts_count_by_their_rows_and_examples():
    """Unequal parts, one of which did not reach the layer."""
    rng = np.random.default_rng(0)
    sizes = [(6, 3), (0, 2), (5, 5)]  # rows and examples
    parts = [(rng.normal(size=(r, 3)), rng.normal(size=(r, 2)), m, rng.normal()) for r, m in sizes]
    a, g = (np.concatenate([part[i] for part in parts]) for i in range(2))
    loss = sum(part[2] * part[3] for part in parts) / 10
    each = [combine.sums(of_rows(*part)) for part in parts]
    total = jax.tree.map(lambda *numbers: sum(numbers), *each)
    close(combine.means(total), of_rows(a, g, 10, loss), rtol=1e-12)


def test_a_loss_of_few_bits_is_averaged_in_float32():
    rows = np.ones((2, 3)), np.ones((2, 2))
    part = of_rows(*rows, 1000, 500.0)
    part = part._replace(loss=part.loss.astype(jnp.float16))
    assert float(combine.means(combine.sums(part)).loss) == 500.0


# --- a model --------------------------------------------------------------------------------------


class Linen(nn.Module):
    """Lookups, a layer at several positions, and a stack of layers in one array."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(5, 3, param_dtype=jnp.float64)(tokens)
        x = jnp.tanh(nn.Dense(2, param_dtype=jnp.float64)(x))
        many = nn.vmap(
            nn.Dense,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,
            axis_size=2,
        )
        return many(2, param_dtype=jnp.float64)(x).sum(axis=(0, 2))


class Nnx(nnx.Module):
    def __init__(self):
        self.embed = nnx.Embed(5, 3, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        self.dense = nnx.Linear(3, 2, param_dtype=jnp.float64, rngs=nnx.Rngs(1))

    def __call__(self, tokens):
        return jnp.tanh(self.dense(self.embed(tokens))).sum(axis=1)


def linen_loss(params, tokens, targets):
    return jnp.mean(jnp.sum((Linen().apply(params, tokens) - targets) ** 2, axis=-1))


def nnx_loss(model, tokens, targets):
    return jnp.mean(jnp.sum((model(tokens) - targets) ** 2, axis=-1))


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 5, size=(PARTS * EXAMPLES, LENGTH)))
    return tokens, jnp.asarray(rng.normal(size=(PARTS * EXAMPLES, 2)))


@pytest.fixture(scope="module", params=["linen", "nnx"])
def model(request, batch):
    """A function from a batch to its curvature function, and the parameters."""
    if request.param == "linen":
        params = jax.jit(Linen().init)(jax.random.key(0), batch[0])
        return lambda *batch: kfqn.curvature_fn(linen_loss, params, *batch), params
    model = Nnx()
    return lambda *batch: kfqn.nnx_curvature_fn(nnx_loss, model, *batch), nnx.state(model)


def all_for(statistics):
    """To ask for everything: what K-BFGS wants, and K-FAC and its kin."""
    vectors = {
        path: jnp.cos(jnp.arange(s.input_mean.size).reshape(s.input_mean.shape) * 1.0)
        for path, s in statistics.layers.items()
    }
    return {"vectors": vectors, "output_moments": [*vectors], "joint_moments": [*vectors]}


def test_parts_are_the_whole(model, batch):
    """One microbatch at a time, or one part on each of several mapped devices."""
    make, params = model
    parts = kfqn.microbatches(batch, PARTS)
    asked = all_for(jax.eval_shape(make(*batch), params))

    @jax.jit
    def measure():
        in_turn = kfqn.over_microbatches(make, parts)
        side_by_side = jax.vmap(
            lambda *part: kfqn.over_axis(make(*part), "data")(params, **asked),
            axis_name="data",
        )
        whole = make(*batch)(params, **asked)
        return whole, in_turn(params, **asked), side_by_side(*parts)

    whole, in_turn, side_by_side = measure()
    assert float(next(iter(whole.layers.values())).rows.max()) == PARTS * EXAMPLES * LENGTH
    assert all(s.output_moment is not None for s in whole.layers.values())
    assert any(s.joint_moments is not None for s in whole.layers.values())
    close(in_turn, whole, rtol=1e-12)
    for number in range(PARTS):
        close(jax.tree.map(lambda a: a[number], side_by_side), whole, rtol=1e-12)  # noqa: B023


def test_what_was_not_asked_for_is_not_there(model, batch):
    make, params = model
    parts = kfqn.microbatches(batch, PARTS)

    def of_part(*part):
        return kfqn.over_axis(make(*part), "data")(params, moments=[])

    for measure in (
        lambda: kfqn.over_microbatches(make, parts)(params, moments=[]),
        lambda: jax.vmap(of_part, axis_name="data")(*parts),
    ):
        found = jax.eval_shape(measure).layers.values()
        assert all(s.input_product is None for s in found)
        assert sum(s.input_moment is not None for s in found) == 1  # the lookups' diagonal


def test_a_plain_function_stays_plain(batch):
    """The optimizer gives no keywords to a curvature function that takes none."""
    params = {"params": {"Dense_0": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}}
    model = nn.Dense(2)

    def loss(params, x):
        return jnp.mean(model.apply({"params": params["params"]["Dense_0"]}, x) ** 2)

    def step(x):
        def plain(p):
            return kfqn.curvature_fn(loss, params, x)(p)

        tx = kfqn.scale_by_kbfgs(0.1)
        fn = kfqn.over_axis(plain, "data")
        return tx.update(params, tx.init(params), params, curvature_fn=fn)[1].layers

    layers = jax.eval_shape(jax.vmap(step, axis_name="data"), jnp.ones((2, 4, 3)))
    assert layers["params/Dense_0"].input_moment.shape == (2, 4, 4)


# --- microbatches ---------------------------------------------------------------------------------


def test_each_part_of_a_batch_holds_a_part_of_each_microbatch():
    batch = jnp.arange(24).reshape(12, 2)
    parts = kfqn.microbatches({"x": batch}, 3)["x"]
    assert parts.shape == (3, 4, 2)
    equal(jnp.sort(parts[..., 0].reshape(-1)), batch[:, 0])
    for part in parts:  # a device of two has the first six examples
        assert int(jnp.sum(part[:, 0] < 12)) == 2


X = jnp.ones((8, 3))
MESH = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
DENSE = nn.Dense(2)
PARAMS = {"params": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}


def dense_loss(params, x):
    return jnp.mean(DENSE.apply(params, x) ** 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: kfqn.microbatches(X, 3), ValueError,
         "8 examples cannot be split into 3 microbatches of equal size; give a divisor of 8"),
        (lambda: kfqn.microbatches(X, 0), ValueError, "into 0 microbatches"),
        (lambda: kfqn.microbatches((X, X[:6]), 2), ValueError,
         r"microbatches: all arrays must have a first axis of the same length, got shapes \(8, 3\),"
         r" \(6, 3\)"),
        (lambda: kfqn.microbatches((X, 1.0), 2), ValueError, r"got shapes \(8, 3\), \(\)"),
        (lambda: kfqn.microbatches((), 2), ValueError, "got shapes none"),
        (lambda: kfqn.over_microbatches(None, (X, X[:6])), ValueError,
         "over_microbatches: all arrays"),
        (lambda: kfqn.over_microbatches(None, X), TypeError,
         r"needs a tuple of the arguments of make, got .*: write \(batches,\)"),
        (lambda: kfqn.over_axis(kfqn.curvature_fn(dense_loss, PARAMS, X), "data")(PARAMS),
         ValueError, "there is no axis named 'data' here. Call it inside jax.shard_map"),
    ],
)  # fmt: skip
def test_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def in_shard_map(measure, **options):
    return jax.eval_shape(
        jax.shard_map(
            measure,
            mesh=MESH,
            in_specs=(PartitionSpec(), PartitionSpec("data")),
            out_specs=PartitionSpec(),
            **options,
        ),
        PARAMS,
        X,
    )


def test_a_batch_that_differs_from_device_to_device_needs_over_axis():
    measure = lambda params, x: kfqn.curvature_fn(dense_loss, params, x)(params)  # noqa: E731
    with pytest.raises(ValueError, match=r"dense_loss is given a batch that differs .*over_axis\("):
        in_shard_map(measure)


def test_a_loss_that_averages_over_the_devices_itself():
    def averaged(params, x):
        return jax.lax.pmean(dense_loss(params, x), "data")

    def measure(params, x):
        return kfqn.over_axis(kfqn.curvature_fn(averaged, params, x), "data")(params)

    with pytest.raises(ValueError, match="averaged returns a loss that is the same on all devices"):
        in_shard_map(measure)
