"""The table says of every parameter who updates it, with what, and why; its bytes add up."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from models import problem

import kfqn_optax as kfqn
from kfqn_optax.layers import named_leaves


class Net(nn.Module):
    """A convolution, a normalization, two dense layers (one without bias)."""

    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(nn.Conv(3, (2,))(x)).mean(axis=1)
        x = nn.Dense(4)(x)
        return nn.Dense(2, use_bias=False)(x)


def net():
    x = jnp.ones((8, 6, 2))
    params = Net().init(jax.random.key(0), x)

    def loss_fn(params):
        return jnp.mean(Net().apply(params, x) ** 2)

    layers = kfqn.find_layers(loss_fn, params)
    return params, [layer for layer in layers if layer.kind == "dense"]


def rows_of(table):
    """The table as a list of dictionaries by column, without header, rule and total."""
    header, rule, *lines, total = (re.split(r"\s{2,}", line) for line in table.splitlines())
    assert set(rule[0]) == {"-"}
    assert total[0] == "total"
    return [dict(zip(header, line, strict=True)) for line in lines], int(total[1].replace(",", ""))


def number(text):
    return int(text.replace(",", ""))


def size_of(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def test_every_parameter_once_with_all_there_is_to_say():
    params, layers = net()
    state = kfqn.kbfgs(0.1, layers=layers).init(params)
    rows, _ = rows_of(kfqn.summary(state, params))
    leaves = named_leaves(params)
    assert [row["parameter"] for row in rows] == list(leaves)
    for row in rows:
        assert row["shape"] == str(leaves[row["parameter"]].shape)
        assert row["dtype"] == "float32"
    by_name = {row.pop("parameter").removeprefix("params/"): row for row in rows}
    said = {k: (v["updated by"], v["factors"], v["why"]) for k, v in by_name.items()}
    assert said == {
        "Conv_0/bias": ("fallback", "none", "no part of a layer"),
        "Conv_0/kernel": ("fallback", "none", "not among layers="),
        "Dense_0/bias": ("K-BFGS", "with its kernel", "layer"),
        "Dense_0/kernel": ("K-BFGS", "4^2 and 4^2", "layer"),
        "Dense_1/kernel": ("K-BFGS", "4^2 and 2^2", "layer"),
        "LayerNorm_0/bias": ("fallback", "none", "no part of a layer"),
        "LayerNorm_0/scale": ("fallback", "none", "no part of a layer"),
    }
    layer = optax.tree.get(state, "layers")["params/Dense_1"]
    assert number(by_name["Dense_1/kernel"]["state bytes"]) == size_of(layer) + 4 * 4 * 2
    assert number(by_name["Conv_0/kernel"]["state bytes"]) == 2 * 4 * 2 * 2 * 3  # Adam's two


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
@pytest.mark.parametrize("how", ["plain", "chain", "inject"])
def test_bytes_add_up(dtype, how):
    params, layers = net()
    params = jax.tree.map(lambda p: p.astype(dtype), params)
    tx = {
        "plain": kfqn.kbfgs(0.1, layers=layers),
        "chain": optax.chain(optax.clip(1.0), kfqn.kbfgs(0.1, layers=layers)),
        "inject": optax.inject_hyperparams(
            lambda learning_rate: kfqn.kbfgs(learning_rate, layers=layers)
        )(learning_rate=0.1),
    }[how]
    state = tx.init(params)
    rows, total = rows_of(kfqn.summary(state, params))
    assert total == size_of(state)
    layers_state = optax.tree.get(state, "layers")
    scalars = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim == 0]
    inside = [leaf for leaf in jax.tree.leaves(layers_state) if leaf.ndim == 0]
    counters = size_of(scalars) - size_of(inside)
    assert sum(number(row["state bytes"]) for row in rows) == total - counters
    assert {row["dtype"] for row in rows} == {jnp.dtype(dtype).name}


def test_shapes_will_do():
    params, layers = net()
    tx = kfqn.kbfgs(0.1, layers=layers)
    assert kfqn.summary(jax.eval_shape(tx.init, params), params) == kfqn.summary(
        tx.init(params), params
    )


def test_a_path_that_ends_like_another():
    """What is kept for enc/Dense_0 is not counted for Dense_0."""
    _, dense, *_ = problem()
    params = {**dense["params"], "enc": dense["params"]}
    state = kfqn.kbfgs(0.1).init(params)
    rows, total = rows_of(kfqn.summary(state, params))
    kept = {row["parameter"]: number(row["state bytes"]) for row in rows}
    assert kept["Dense_0/bias"] == kept["enc/Dense_0/bias"] == params["Dense_0"]["bias"].nbytes
    assert 0 <= total - sum(kept.values()) < 30  # counters


def test_two_states_of_ours():
    _, params, *_ = problem()
    labels = {"params": {"Dense_0": "a", "Dense_1": "b"}}
    state = optax.partition({"a": kfqn.kbfgs(0.1), "b": kfqn.kfqn(0.1)}, labels).init(params)
    rows, _ = rows_of(kfqn.summary(state, params))
    assert {row["updated by"] for row in rows} == {"K-BFGS"}
    assert kfqn.summary(state).splitlines()[2:] == kfqn.summary(state, params).splitlines()[2:]


def test_without_params_shapes_of_the_fallback_are_blank():
    params, layers = net()
    state = kfqn.kbfgs(0.1, layers=layers).init(params)
    lines = [line for line in kfqn.summary(state).splitlines() if line.strip("-")]
    full = [line for line in kfqn.summary(state, params).splitlines() if line.strip("-")]
    assert [line.split()[0] for line in lines] == [line.split()[0] for line in full]
    for line in lines:
        if "Dense" in line:
            assert line.split() in [other.split() for other in full]
        elif "Conv" in line or "Norm" in line:
            assert re.fullmatch(r"params/\S+\s+fallback\s+none\s+[\d,]+\s+n.*", line)
    assert lines[-1].split() == full[-1].split()


def test_after_a_step_it_says_the_same():
    _, params, *_ = problem()
    tx = kfqn.kbfgs(0.1)
    state = tx.init(params)
    _, after = tx.update(params, state, params, curvature_fn=None)
    assert kfqn.summary(after, params) == kfqn.summary(state, params)


def test_the_preconditioner_alone():
    """`scale_by_kbfgs` has no fallback: other parameters pass."""
    params = {"d": {"kernel": jnp.ones((5, 3))}, "scale": jnp.ones(2)}
    state = kfqn.scale_by_kbfgs(0.1).init(params)
    rows, total = rows_of(kfqn.summary(state, params))
    assert [(row["parameter"], row["updated by"]) for row in rows] == [
        ("d/kernel", "K-BFGS"), ("scale", "passed on"),
    ]  # fmt: skip
    assert total == size_of(state)
    assert number(rows[0]["state bytes"]) == total - state.count.nbytes
    assert "d/kernel" in kfqn.summary(state)
    assert "scale" not in kfqn.summary(state)


def test_columns_are_aligned():
    params, layers = net()
    header, rule, *lines, _ = kfqn.summary(
        kfqn.kbfgs(0.1, layers=layers).init(params), params
    ).splitlines()
    assert len(rule) == len(header)
    for title in ["updated by", "factors", "why"]:
        start = header.index(title)
        assert all(line[start - 1] == " " != line[start] for line in lines)
    assert np.ptp([line.index("dtype" if line is header else "float32") for line in lines]) == 0


def test_a_state_that_is_not_ours():
    params = {"kernel": jnp.ones((2, 2))}
    with pytest.raises(
        ValueError,
        match="holds no state of block_kbfgs, kbfgs, kbfgs_l, kfqn, kfac, mbf or tkfac: pass",
    ):
        kfqn.summary(optax.adam(0.1).init(params), params)
