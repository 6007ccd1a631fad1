"""K-FAC and TKFAC against the authors' recordings and against explicit matrices."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from models import Mlp, loss_of, relative
from steps import matrices, types

import kfqn_optax as kfqn

# --- the authors' own run -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def replayed():
    """The recording, and our free run beside it: state before and after, updates and params."""
    from conftest import SHARED

    path = SHARED / "golden" / "kfac_mse.npz"
    if not path.exists():
        pytest.skip(f"the recordings of the authors' code are not here: {path} is missing")
    z = np.load(path)
    meta = json.loads(str(z["meta"]))
    model = Mlp(meta["sizes"][1:], meta["activations"])
    loss_fn = loss_of(model, meta["loss"])
    params = {
        "params": {
            f"Dense_{i}": {
                "kernel": jnp.asarray(z[f"init/layer{i}/W"].T),
                "bias": jnp.asarray(z[f"init/layer{i}/b"]),
            }
            for i in range(len(meta["sizes"]) - 1)
        }
    }
    tx = kfqn.kfac(
        meta["lr"],
        meta["damping_lambda"],
        momentum=meta["momentum"],
        weight_decay=meta["weight_decay"],
        factor_decay=meta["factor_decay"],
        inverse_every=meta["inverse_every"],
    )
    state = tx.init(params)
    batches = [
        (jnp.asarray(x), jnp.asarray(t))
        for x, t in zip(z["train/X"], z["train/T_sampled"], strict=True)
    ]
    start = state = kfqn.warm_start(state, loss_fn, params, batches)

    @jax.jit
    def step(params, state, x, t, drawn):
        loss, grads = jax.value_and_grad(loss_fn)(params, x, t)
        updates, state = tx.update(
            grads, state, params, curvature_fn=kfqn.curvature_fn(loss_fn, params, x, drawn)
        )
        return optax.apply_updates(params, updates), state, updates, loss

    run = []
    for k in range(meta["steps"]):
        batch = [jnp.asarray(z[f"step{k:03d}/{name}"]) for name in ("X", "T", "T_sampled")]
        params, state, updates, loss = step(params, state, *batch)
        run.append((state, updates, params, loss))
    assert step._cache_size() == 1
    return z, meta, start, run


def test_every_recorded_array_in_float64(replayed):
    z, meta, start, run = replayed
    for i, layer in enumerate(optax.tree.get(start, "layers").values()):
        assert relative(layer.input_moment, z[f"init/layer{i}/A"]) < 1e-9
        assert relative(layer.output_moment, z[f"init/layer{i}/G"]) < 1e-9
    for k, (state, updates, params, loss) in enumerate(run):
        assert relative(loss, z[f"step{k:03d}/loss"]) < 1e-9
        momentum = matrices(optax.tree.get(state, "momentum"))
        for i, layer in enumerate(optax.tree.get(state, "layers").values()):
            prefix = f"step{k:03d}/layer{i}/"

            def both(name, prefix=prefix):
                weight, bias = z[prefix + name.format("W")], z[prefix + name.format("b")]
                return np.hstack([weight, bias[:, None]])

            pairs = {
                "A": (layer.input_moment, z[prefix + "A"]),
                "G": (layer.output_moment, z[prefix + "G"]),
                "A_inv": (layer.input, z[prefix + "A_inv"]),
                "G_inv": (layer.output, z[prefix + "G_inv"]),
                "momentum": (momentum[i], both("momentum_{}")),
                "direction": (matrices(updates)[i] / meta["lr"], both("direction_{}")),
                "weights": (matrices(params)[i], both("{}_after")),
            }
            for name, (ours, theirs) in pairs.items():
                assert relative(ours, theirs) < 1e-9, (prefix, name)
