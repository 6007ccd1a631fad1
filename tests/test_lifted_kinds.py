"""Every kind of layer under Flax's lifted transforms and in low precision: as it is without."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from models import relative
from steps import step_of
from test_kinds import F64, curved_loss, image, measure, setup

import kfqn_optax as kfqn

SLOW = pytest.mark.slow

LENGTH = 3


def remade(model, kind, **changes):
    """The same module of another class."""
    names = {f.name for f in dataclasses.fields(model) if f.init} - {"parent", "name"}
    return kind(**{name: getattr(model, name) for name in names} | changes)


def near(ours, theirs, tolerance):
    """Statistics of a layer, entry by entry."""
    for name, expected in theirs._asdict().items():
        if expected is not None:
            assert relative(getattr(ours, name), expected) < tolerance, name


@pytest.mark.parametrize(
    "name", ["conv 2-d strided", "conv in groups", "dense general", "einsum", "attention", "tied"]
)
def test_remat_and_jit(name):
    model, loss_fn, params, x = setup(name)
    lifted = curved_loss(remade(model, nn.jit(nn.remat(type(model)))))
    expected, measured = measure(loss_fn, params, x), measure(lifted, params, x)
    assert expected.layers.keys() == measured.layers.keys()
    for path, theirs in expected.layers.items():
        if not path.endswith("key"):  # its mean cotangent is rounding
            near(measured.layers[path], theirs._replace(cotangent_noise=None), 1e-12)


@pytest.mark.parametrize(
    ("name", "param_dtype"),
    [
        ("conv in groups", jnp.float32),
        ("dense general", jnp.bfloat16),
        pytest.param("conv in groups", jnp.bfloat16, marks=SLOW),
        pytest.param("dense general", jnp.float32, marks=SLOW),
    ],
)
def test_computing_in_bfloat16(name, param_dtype):
    """Factors in float32; means and moments as near as the rounding of bfloat16 allows."""
    model, loss_fn, params, x = setup(name)
    low = remade(model, type(model), dtype=jnp.bfloat16, param_dtype=param_dtype)
    low_params = jax.tree.map(lambda p: p.astype(param_dtype), params)
    params = jax.tree.map(lambda p: p.astype(jnp.float64), low_params)
    expected = measure(loss_fn, params, x)
    measured = measure(curved_loss(low), low_params, x)
    for path, theirs in expected.layers.items():
        near(measured.layers[path], theirs._replace(cotangent_noise=None), 3e-2)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(measured.layers[path])} == {"float32"}
    tx = kfqn.kbfgs(0.01, layers=kfqn.find_layers(curved_loss(low), low_params, x))
    state, step = tx.init(low_params), step_of(tx, curved_loss(low))
    for _ in range(2):
        low_params, state, _ = step(low_params, state, x)
    assert step._cache_size() == 1
    assert {leaf.dtype for leaf in jax.tree.leaves(low_params)} == {jnp.dtype(param_dtype)}


class Mixed(nn.Module):
    """Attention, a convolution in groups and an einsum, in the carry form that nn.scan wants.

    Attributes:
        attentive: False to leave the attention out.
    """

    attentive: bool = True

    @nn.compact
    def __call__(self, x, _=None):
        if self.attentive:
            x = x + nn.MultiHeadDotProductAttention(2, qkv_features=6, **F64, name="attention")(x)
        x = x + nn.Conv(4, (3,), feature_group_count=2, **F64, name="conv")(x)
        return x + nn.Einsum((4, 4), "btd,dh->bth", **F64, name="einsum")(x), None


class Blocks(nn.Module):
    """LENGTH `Mixed`, scanned (with or without nn.remat) or written out.

    Attributes:
        how: "plain", "scan" or "scan and remat".
        attentive: of the blocks.
    """

    how: str
    attentive: bool = True

    @nn.compact
    def __call__(self, x):
        if self.how == "plain":
            for i in range(LENGTH):
                x, _ = Mixed(self.attentive, name=f"b{i}")(x)
            return x
        block = nn.remat(Mixed) if self.how == "scan and remat" else Mixed
        stack = nn.scan(
            block, variable_axes={"params": 0}, split_rngs={"params": True}, length=LENGTH
        )
        return stack(self.attentive, name="blocks")(x, None)[0]


def plain_and_stacked(how, x, attentive=True):
    """Losses and parameters of blocks written out and of the same ones in a stack."""
    plain = Blocks("plain", attentive)
    params = jax.jit(plain.init)(jax.random.key(0), x)
    each = [params["params"][f"b{i}"] for i in range(LENGTH)]
    stacked = {"params": {"blocks": jax.tree.map(lambda *a: jnp.stack(a), *each)}}
    return curved_loss(plain), params, curved_loss(Blocks(how, attentive)), stacked


@pytest.mark.parametrize("how", [pytest.param("scan", marks=SLOW), "scan and remat"])
def test_a_scanned_stack_of_several_kinds(how):
    """Statistics of each, and the weights after three steps, as of the layers written out.

    The steps without the attention, four layers in each block, unless there is time.
    """
    x = image(5, 4)
    plain_loss, params, loss_fn, stacked = plain_and_stacked(how, x)
    expected, measured = measure(plain_loss, params, x), measure(loss_fn, stacked, x)
    assert len(measured.layers) == 6
    for path, together in measured.layers.items():
        for i in range(LENGTH):
            theirs = expected.layers[path.replace("blocks", f"b{i}")]
            blocks = theirs.rows.size
            one = jax.tree.map(
                lambda leaf, like: leaf[i * blocks : (i + 1) * blocks].reshape(like.shape),  # noqa: B023
                together,
                theirs,
            )
            if not path.endswith("key"):
                near(one, theirs._replace(cotangent_noise=None), 1e-11)
    if how != "scan":
        plain_loss, params, loss_fn, stacked = plain_and_stacked(how, x, attentive=False)
    results = []
    for loss, start in ((plain_loss, params), (loss_fn, stacked)):
        tx = kfqn.kbfgs(0.1, 0.1, layers=kfqn.find_layers(loss, start, x))
        state, step, weights = tx.init(start), step_of(tx, loss), start
        for _ in range(3):
            weights, state, _ = step(weights, state, x)
        results.append(weights["params"])
    for i in range(LENGTH):
        ours = jax.tree.map(lambda leaf: leaf[i], results[1]["blocks"])  # noqa: B023
        errors = jax.tree.map(relative, ours, results[0][f"b{i}"])
        assert max(jax.tree.leaves(errors)) < 1e-9
