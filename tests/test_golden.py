"""The public optimizer against the recordings of the authors' own code, run free from the start."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models import Mlp, loss_of, relative

import kfqn_optax as kfqn
from kfqn_optax import inverse, pairs

CASES = ["kbfgs_bce", "kbfgs_mse", "kbfgs_l_bce"]
# Single operations on arrays would be compiled one by one, for each layer's shape.
apply, damp_double = jax.jit(inverse.apply), jax.jit(pairs.damp_double)


def replay(z, dtype):
    """Our run through the public names: yields step, state before and after, gradients, params."""
    meta = json.loads(str(z["meta"]))
    model = Mlp(meta["sizes"][1:], meta["activations"], dtype=dtype)
    loss_fn = loss_of(model, meta["loss"])
    params = {
        "params": {
            f"Dense_{i}": {
                "kernel": jnp.asarray(z[f"init/layer{i}/W"].T, dtype),
                "bias": jnp.asarray(z[f"init/layer{i}/b"], dtype),
            }
            for i in range(len(meta["sizes"]) - 1)
        }
    }
    tx = make(meta)
    state = tx.init(params)
    batches = [
        (jnp.asarray(x, dtype), jnp.asarray(t, dtype))
        for x, t in zip(z["train/X"], z["train/T"], strict=True)
    ]
    state = kfqn.warm_start(state, loss_fn, params, batches)

    @jax.jit
    def step(params, state, x, t):
        loss, grads = jax.value_and_grad(loss_fn)(params, x, t)
        updates, state = tx.update(
            grads, state, params, curvature_fn=kfqn.curvature_fn(loss_fn, params, x, t)
        )
        return optax.apply_updates(params, updates), state, updates, loss

    for k in range(meta["steps"]):
        x, t = (jnp.asarray(z[f"step{k:03d}/{name}"], dtype) for name in "XT")
        before = state
        params, state, updates, loss = step(params, state, x, t)
        yield k, meta, before, state, updates, params, loss
    assert step._cache_size() == 1


def make(meta):
    numbers = dict(
        learning_rate=meta["lr"],
        damping=meta["damping_lambda"],
        weight_decay=meta["weight_decay"],
    )
    if meta["algorithm"] == "K-BFGS(L)":
        return kfqn.kbfgs_l(**numbers, memory_size=meta["memory"])
    return kfqn.kbfgs(**numbers)


def dense(factor):
    """A factor as a matrix, whichever way it is kept."""
    return np.asarray(apply(jax.tree.map(jnp.asarray, factor), np.eye(inverse.size(factor))))


def matrix(tree, i):
    """Kernel and bias of layer i as the authors store them: [d_out, d_in + 1]."""
    layer = tree["params"][f"Dense_{i}"]
    return np.hstack([np.asarray(layer["kernel"]).T, np.asarray(layer["bias"])[:, None]])


def recorded(z, prefix, weight, bias):
    return np.hstack([z[prefix + weight], z[prefix + bias][:, None]])


@pytest.mark.parametrize("case", CASES)
def test_every_recorded_array_in_float64(golden, case):
    z = golden(case)
    for k, meta, before, after, updates, params, loss in replay(z, jnp.float64):
        assert relative(loss, z[f"step{k:03d}/loss"]) < 1e-9
        before, after, updates, params = jax.tree.map(np.asarray, (before, after, updates, params))
        momentum = optax.tree.get(after, "momentum")
        for i in range(len(meta["sizes"]) - 1):
            prefix, path = f"step{k:03d}/layer{i}/", f"params/Dense_{i}"
            old, new = optax.tree.get(before, "layers")[path], optax.tree.get(after, "layers")[path]
            damped, by_powell, by_second = jax.tree.map(
                np.asarray,
                damp_double(
                    pairs.Pair(new.s, new.y),
                    apply(old.output, new.y),
                    meta["powell_mu1"],
                    meta["powell_mu2"],
                ),
            )
            ours = {
                "A": new.input_moment,
                "A_LM": new.input_moment + meta["A_damping"] * np.eye(len(new.input)),
                "H_a_after": new.input,
                "H_g_before": dense(old.output),
                "H_g_after": dense(new.output),
                "s_avg": -new.s,
                "y_avg": -new.y,
                "s_damped": -damped.s,
                "y_damped": -damped.y,
            }
            if k > 0:  # at step 0 the factor is made from A within the step
                ours["H_a_before"] = old.input
            if meta["algorithm"] == "K-BFGS(L)":
                stored = len(z[prefix + "s_pairs_after"])
                assert int(new.output.count) == stored
                ours["s_pairs_after"] = -new.output.s[-stored:]
                ours["y_pairs_after"] = -new.output.y[-stored:]
            for name, value in ours.items():
                assert relative(value, z[prefix + name]) < 1e-9, (prefix, name)
            for tree, names, scale in [
                (params, ("W_after", "b_after"), 1),
                (momentum, ("momentum_W", "momentum_b"), 1),
                (updates, ("direction_W", "direction_b"), 1 / meta["lr"]),
            ]:
                expected = recorded(z, prefix, *names)
                assert relative(matrix(tree, i) * scale, expected) < 1e-9, (prefix, names)
            assert int(new.input_status) == z[prefix + "H_a_status"]
            assert int(new.output_status) == z[prefix + "H_g_status"]
            assert bool(by_powell) == bool(new.powell_damped) == z[prefix + "damping_H_applied"]
            assert bool(by_second) == bool(new.second_damped) == z[prefix + "damping_I_applied"]


@pytest.mark.parametrize("case", CASES)
def test_weights_in_float32(golden, case):
    z = golden(case)
    for k, meta, _, after, _, params, _ in replay(z, jnp.float32):
        for i in range(len(meta["sizes"]) - 1):
            prefix = f"step{k:03d}/layer{i}/"
            assert relative(matrix(params, i), recorded(z, prefix, "W_after", "b_after")) < 1e-4
            layer = optax.tree.get(after, "layers")[f"params/Dense_{i}"]
            assert jax.tree.leaves(layer.output)[0].dtype == jnp.float32
            assert int(layer.output_status) == z[prefix + "H_g_status"]


@pytest.mark.parametrize("case", CASES)
def test_the_recordings_enter_the_branches(golden, case):
    """What the golden tests prove depends on what the recordings went through."""
    z = golden(case)
    seen = {
        name: {int(z[key]) for key in z.files if key.endswith(name)}
        for name in ["damping_H_applied", "damping_I_applied", "H_g_status"]
    }
    assert seen["damping_H_applied"] == {0, 1}
    assert 1 in seen["damping_I_applied"]
    assert 0 in seen["H_g_status"]
