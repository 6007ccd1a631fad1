"""`kbfgs` as a whole: who updates what, among other transformations of Optax, training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from models import Mlp, loss_of, problem, relative
from steps import (
    D0,
    D1,
    batches_for,
    close,
    equal,
    layers_of,
    matrices,
    random_like,
    step_of,
)

import kfqn_optax as kfqn
from kfqn_optax import pairs
from kfqn_optax.layers import named_leaves

# --- who updates what -----------------------------------------------------------------------------


def test_without_curvature_the_factors_stay_and_precondition(trained):
    """And extra arguments that mean nothing to us are ignored."""
    tx, _, params, state = trained
    grads, old = random_like(params), optax.tree.get(state, "momentum")
    extra = {"curvature_fn": None, "value": 1.0, "anything": "else"}
    updates, after = jax.jit(lambda g, s: tx.update(g, s, params, **extra))(grads, state)
    equal(layers_of(after), layers_of(state))
    momentum = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, old, grads)
    for i, (M, P) in enumerate(zip(matrices(momentum), matrices(updates), strict=True)):
        layer = layers_of(state)[f"params/Dense_{i}"]
        assert relative(P, -0.1 * layer.output @ M @ layer.input) < 1e-12


@pytest.mark.parametrize("lr", [0.1, optax.linear_schedule(0.1, 0.01, 3)], ids=["float", "sched"])
@pytest.mark.parametrize(
    "params", [jnp.ones((2, 3)), {"norm": {"scale": jnp.ones(3)}, "w": [jnp.ones((2, 2))]}]
)
def test_a_tree_without_layers_is_adams(params, lr):
    tx, adam = kfqn.kbfgs(lr, momentum=0.5, weight_decay=0.3), optax.adam(lr)
    state, adams = tx.init(params), adam.init(params)
    for k in range(3):
        grads = random_like(params, k)
        updates, state = tx.update(grads, state, params)
        expected, adams = adam.update(grads, adams, params)
        equal(updates, expected)


class ConvNet(nn.Module):
    """A convolution, a normalization, a dense layer."""

    @nn.compact
    def __call__(self, x):  # [batch, 6, 2]
        kinds = {"dtype": jnp.float64, "param_dtype": jnp.float64}
        x = nn.relu(nn.Conv(3, (2,), **kinds)(x))
        return nn.Dense(2, **kinds)(nn.LayerNorm(**kinds)(x).mean(axis=1))


@pytest.mark.parametrize("fallback", [None, optax.sgd(0.5, momentum=0.8)], ids=["adam", "sgd"])
def test_what_is_no_layer_goes_to_the_fallback(fallback):
    """With a state of its own, and untouched by weight decay and momentum."""
    rng = np.random.default_rng(0)
    x, t = jnp.asarray(rng.normal(size=(8, 6, 2))), jnp.asarray(rng.normal(size=(8, 2)))
    params, loss_fn = ConvNet().init(jax.random.key(0), x), loss_of(ConvNet())
    found = kfqn.find_layers(loss_fn, params, x, t)
    layers = [layer for layer in found if layer.kind == "dense"]
    assert [layer.path for layer in layers] == [D0]
    tx = kfqn.kbfgs(0.1, momentum=0.7, weight_decay=0.3, layers=layers, fallback=fallback)
    other = optax.adam(0.1) if fallback is None else fallback
    state, others, step = tx.init(params), other.init(params), step_of(tx, loss_fn)
    named = {k: set(named_leaves(s)) for k, s in state.inner_states.items()}
    assert not any("Dense" in name for name in named["fallback"])
    assert not any("Conv" in name or "Norm" in name for name in named["kbfgs"])
    gradient = jax.jit(jax.grad(loss_fn))
    for _ in range(3):
        grads = gradient(params, x, t)
        expected, others = other.update(grads, others, params)
        params, state, updates = step(params, state, x, t)
        for name in ["Conv_0", "LayerNorm_0"]:
            close(updates["params"][name], expected["params"][name], rtol=1e-9)
        ratio = updates["params"]["Dense_0"]["kernel"] / expected["params"]["Dense_0"]["kernel"]
        assert np.ptp(ratio) > 1e-3  # the dense layer is not the fallback's


# --- among other transformations ------------------------------------------------------------------


def test_behind_a_clipped_gradient():
    """The chain hands the extra argument on; the probe follows the clipped step."""
    loss_fn, params, *_ = problem([3])
    batch = next(batches_for(params))
    tx, clip = kfqn.kbfgs(0.1), optax.clip_by_global_norm(0.05)
    chained = optax.chain(clip, tx)
    grads = jax.grad(loss_fn)(params, *batch)
    clipped, _ = clip.update(grads, clip.init(params))
    assert relative(*map(matrices, (clipped, grads))) > 0.1
    fn = kfqn.curvature_fn(loss_fn, params, *batch)
    update = jax.jit(lambda g, s: tx.update(g, s, params, curvature_fn=fn))
    expected, state = update(clipped, tx.init(params))
    _, chain_state, updates = step_of(chained, loss_fn)(params, chained.init(params), *batch)
    close((updates, layers_of(chain_state)), (expected, layers_of(state)), rtol=1e-9)


def test_holes_of_masked_and_partition_are_filled():
    """Our layer sees what it sees when the rest of the model is frozen."""
    loss_fn, full, *_ = problem()
    batches, mine = list(batches_for(full, count=3)), kfqn.kbfgs(0.1, weight_decay=0.1)

    def select(ours, other):
        choice = {"Dense_0": other, "Dense_1": ours}
        return {"params": {name: {"kernel": c, "bias": c} for name, c in choice.items()}}

    def run(tx, loss_fn, params):
        state, step = tx.init(params), step_of(tx, loss_fn)
        for batch in batches:
            after, state, updates = step(params, state, *batch)
            params = {"params": params["params"] | {"Dense_1": after["params"]["Dense_1"]}}
        return updates["params"]["Dense_1"], layers_of(state)

    def of_one_layer(params, *batch):
        return loss_fn({"params": full["params"] | params["params"]}, *batch)

    expected = run(mine, of_one_layer, {"params": {"Dense_1": full["params"]["Dense_1"]}})
    assert set(expected[1]) == {D1}
    partition = optax.partition({"a": mine, "b": optax.set_to_zero()}, select("a", "b"))
    for tx in (partition, optax.masked(mine, select(True, False))):
        close(run(tx, loss_fn, full), expected, rtol=1e-9)


def test_apply_if_finite_skips_a_bad_step_whole(trained):
    tx, loss_fn, params, inner = trained
    batch = next(batches_for(params))
    fn = kfqn.curvature_fn(loss_fn, params, *batch)
    safe = optax.apply_if_finite(tx, 2)
    state = safe.init(params)._replace(inner_state=inner)
    update = jax.jit(lambda g, s: safe.update(g, s, params, curvature_fn=fn))
    grads = jax.grad(loss_fn)(params, *batch)
    updates, after = update(jax.tree.map(lambda g: g * jnp.nan, grads), state)
    assert not any(np.any(u) for u in jax.tree.leaves(updates))
    equal(after.inner_state, inner)
    updates, after = update(grads, after)
    assert all(np.any(u) for u in jax.tree.leaves(updates))
    assert int(optax.tree.get(after, "layers")[D1].output_status) == pairs.UPDATED


# --- training -------------------------------------------------------------------------------------


def test_training_goes_where_gradient_descent_does_not():
    """A regression on inputs of very different sizes."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(64, 6)) * 10.0 ** np.linspace(0.5, -2, 6)
    t = np.tanh(x / x.std(axis=0)) @ rng.normal(size=(6, 2))
    x, t = jnp.asarray(x), jnp.asarray(t)
    model = Mlp([16, 2])
    loss_fn, start = loss_of(model), model.init(jax.random.key(0), x)
    losses = {}
    for name, tx in {"kbfgs": kfqn.kbfgs(0.1, 0.001), "sgd": optax.sgd(0.1)}.items():
        params, state = start, tx.init(start)
        tx = optax.with_extra_args_support(tx)
        step = step_of(tx, loss_fn)
        for _ in range(150):
            params, state, _ = step(params, state, x, t)
        losses[name] = float(loss_fn(params, x, t))
    assert losses["kbfgs"] < 0.4
    assert losses["sgd"] > 0.8
