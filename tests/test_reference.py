"""The NumPy reference against the recordings of the authors' own code."""

import json

import numpy as np
import pytest
import reference
from models import relative


def replay(z):
    """The reference run free from the recorded initial weights, beside the recording."""
    meta = json.loads(str(z["meta"]))
    count = len(meta["sizes"]) - 1
    weights = [
        np.hstack([z[f"init/layer{i}/W"], z[f"init/layer{i}/b"][:, None]]) for i in range(count)
    ]
    mlp = reference.Mlp(
        weights, meta["activations"], meta["loss"], meta["lr"], meta["damping_lambda"],
        meta["weight_decay"], meta["momentum"],
    )  # fmt: skip
    mlp.warm_start(list(zip(z["train/X"], z["train/T"], strict=True)))
    for k in range(meta["steps"]):
        records = mlp.step(z[f"step{k:03d}/X"], z[f"step{k:03d}/T"])
        for i, record in enumerate(records):
            yield f"step{k:03d}/layer{i}/", record


@pytest.mark.parametrize("case", ["kbfgs_bce", "kbfgs_mse"])
def test_reference_is_the_authors_run(golden, case):
    z = golden(case)
    statuses = set()
    for prefix, r in replay(z):
        for ours, theirs, sign in [
            ("A", "A", 1), ("H_a", "H_a_after", 1), ("H_g", "H_g_after", 1), ("s", "s_avg", -1),
            ("y", "y_avg", -1), ("s_damped", "s_damped", -1), ("y_damped", "y_damped", -1),
            ("a_mean", "a_mean", 1), ("g_mean", "g_mean", 1), ("h_mean", "h_mean", 1),
            ("H_a_s", "H_a_s", 1), ("H_a_y", "H_a_y", 1),
        ]:  # fmt: skip
            assert relative(sign * r[ours], z[prefix + theirs]) < 1e-9, (prefix, ours)
        for ours, weight, bias in [
            ("W", "W_after", "b_after"), ("M", "momentum_W", "momentum_b"),
            ("direction", "direction_W", "direction_b"), ("G", "grad_W", "grad_b"),
        ]:  # fmt: skip
            expected = np.hstack([z[prefix + weight], z[prefix + bias][:, None]])
            assert relative(r[ours], expected) < 1e-9, (prefix, ours)
        assert r["H_g_status"] == z[prefix + "H_g_status"]
        assert r["H_a_status"] == z[prefix + "H_a_status"]
        assert r["powell"] == z[prefix + "damping_H_applied"]
        assert r["second"] == z[prefix + "damping_I_applied"]
        statuses.add((r["H_g_status"], r["powell"], r["second"]))
    assert len(statuses) > 2, "the recording should enter several branches"
