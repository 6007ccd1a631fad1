"""Checks: several devices, in a process of their own."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import kfqn_optax as kfqn
from contract.optimizers import Optimizer
from contract.problem import BATCHES, alone, initial, loss_fn, step_of
from contract.trees import close

DEVICES = 8


def _sharded(optimizer: Optimizer, kind: AxisType) -> None:
    """The batch sharded over eight devices, parameters on all: as on one, in one program."""
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(kind,))
    tx, params = optimizer.make(), initial()

    def put(tree, *axes):
        def one(leaf):
            # JAX writes the axes that are not sharded in Explicit mode only, and compares that.
            more = leaf.ndim - len(axes) if kind == AxisType.Explicit else 0
            spec = PartitionSpec(*axes, *[None] * more)
            return jax.device_put(leaf, NamedSharding(mesh, spec))

        return jax.tree.map(one, tree)

    step = jax.jit(step_of(optimizer, tx))
    params, state = put(params), put(tx.init(params))
    for (x, targets, weight), expected in zip(BATCHES, alone(optimizer)[0], strict=True):
        batch = (*put((x, targets), "data"), put(weight))
        params, state, updates = step(params, state, batch)
        close(jax.device_get(updates), expected[2], "updates", rtol=1e-6)
    close(jax.device_get(state), alone(optimizer)[0][-1][1], "states", rtol=1e-6)
    assert step._cache_size() == 1, f"{step._cache_size()} programs"


def local_statistics(optimizer: Optimizer, check_vma: bool = False) -> None:
    """In ``jax.shard_map``: mean gradient and mean statistics of all devices, as on one device."""
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    tx, params = optimizer.make(), initial()

    def step(params, state, *batch):
        of_device = jax.lax.pcast(params, "data", to="varying")
        grads = jax.lax.pmean(jax.grad(loss_fn)(of_device, *batch), "data")
        fn = kfqn.over_axis(kfqn.curvature_fn(loss_fn, params, *batch), "data")
        updates, state = tx.update(grads, state, params, curvature_fn=fn)
        return optax.apply_updates(params, updates), state

    data, everywhere = PartitionSpec("data"), PartitionSpec()
    sharded = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(everywhere, everywhere, data, data, everywhere),
        out_specs=(everywhere, everywhere),
        check_vma=check_vma,
    )
    state, step = tx.init(params), jax.jit(sharded)
    for batch, expected in zip(BATCHES, alone(optimizer)[0], strict=True):
        params, state = step(params, state, *batch)
        close((params, state), expected[:2], "results", rtol=1e-6)


def checked_shard_map(optimizer: Optimizer) -> None:
    """The same with ``check_vma=True``, the default of ``jax.shard_map``."""
    local_statistics(optimizer, check_vma=True)


def auto_mode(optimizer: Optimizer) -> None:
    _sharded(optimizer, AxisType.Auto)


def explicit_mode(optimizer: Optimizer) -> None:
    _sharded(optimizer, AxisType.Explicit)


def on_devices(names: list[str], checks: list[str]) -> dict[str, dict[str, str]]:
    """Outcomes by check and name of the optimizer, from a process with eight devices."""
    tests = Path(__file__).parents[1]
    flags = f"--xla_force_host_platform_device_count={DEVICES}"
    path = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    more = {"XLA_FLAGS": flags, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "1"}
    more["NPROC"] = "32"  # threads for XLA, see devices/processes.py
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "outcomes.json"
        # -P: as for a script, no module is looked for in the working directory.
        command = [sys.executable, "-P", "-m", "contract", str(output), ",".join(checks), *names]
        subprocess.run(command, env=os.environ | more, check=True)
        return json.loads(output.read_text())
