"""What a step costs: K-BFGS and others as multiples of a plain forward and backward pass.

    python benchmarks/step.py [--rounds 17] [--batch 1000] [--only NAME ...]
        [--output benchmarks/results/step.json]

All programs take turns in one process, so that whatever else the machine does hits them alike; the
figure to read is the ratio of medians. The first two rounds are left out. Needs the core packages
only and runs unchanged on a GPU. The problem is the MNIST autoencoder of the K-BFGS paper
(784-1000-500-250-30-250-500-1000-784) on random images: the cost does not depend on what they show.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import kfqn_optax as kfqn

WIDTHS = (1000, 500, 250, 30, 250, 500, 1000, 784)
WARM_UP = 2


class Autoencoder(nn.Module):
    """Dense layers with relu, linear at the code and at the output."""

    @nn.compact
    def __call__(self, x):
        for i, width in enumerate(WIDTHS):
            x = nn.Dense(width)(x)
            x = x if i in (3, 7) else nn.relu(x)
        return x


def loss_fn(params, images):
    logits = Autoencoder().apply(params, images)
    return jnp.mean(jnp.sum(optax.sigmoid_binary_cross_entropy(logits, images), axis=-1))


def candidates():
    """By name: a transformation, and on which examples it measures curvature.

    None: it takes no such argument; "none": it is given None.
    """
    settings = {"weight_decay": 1e-5, "norm_constraint": 3.0}
    ours = kfqn.kbfgs(0.3, 0.3, **settings)
    fast = kfqn.kfqn(0.8, 0.3, output_memory=20, **settings)
    return {
        "adam": (optax.adam(1e-3), None),
        "sgd with momentum": (optax.sgd(1e-3, momentum=0.9), None),
        "muon": (optax.contrib.muon(1e-3), None),
        "kbfgs": (ours, "all"),
        "kbfgs, curvature from a tenth of the batch": (ours, "tenth"),
        "kbfgs_l": (kfqn.kbfgs_l(0.3, 0.3, **settings), "all"),
        "kfqn": (kfqn.kfqn(0.3, 0.3, **settings), "all"),
        "kfqn, a tenth of the batch, output_memory=20": (fast, "tenth"),
        "kbfgs, factors kept (curvature_fn=None)": (ours, "none"),
    }


def make_step(tx, measured):
    def step(params, state, images):
        loss, grads = jax.value_and_grad(loss_fn)(params, images)
        extra = {}
        if measured is not None:
            part = images if measured == "all" else images[: len(images) // 10]
            extra["curvature_fn"] = (
                None if measured == "none" else kfqn.curvature_fn(loss_fn, params, part)
            )
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state, loss

    return jax.jit(step, donate_argnums=(0, 1))


def compiled(jitted, *args):
    """The program, and the seconds that tracing and compiling took."""
    start = time.perf_counter()
    program = jitted.lower(*args).compile()
    return program, time.perf_counter() - start


def timed(program, *args):
    start = time.perf_counter()
    result = jax.block_until_ready(program(*args))
    return result, time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=17)
    parser.add_argument("--batch", type=int, default=1000)
    parser.add_argument("--only", nargs="+", default=list(candidates()), help="which candidates")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()

    images = jax.random.uniform(jax.random.key(1), (options.batch, 784))
    params = Autoencoder().init(jax.random.key(0), images)
    plain, plain_compile = compiled(jax.jit(jax.value_and_grad(loss_fn)), params, images)
    seconds, rows, running = {"plain": []}, {}, {}
    rows["plain"] = {"compile_s": plain_compile, "gflop": plain.cost_analysis()["flops"] / 1e9}
    for name in options.only:
        tx, measured = candidates()[name]
        state = tx.init(params)
        program, compile_s = compiled(make_step(tx, measured), params, state, images)
        state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        rows[name] = {
            "compile_s": compile_s,
            "gflop": program.cost_analysis()["flops"] / 1e9,
            "state_mb": state_bytes / 1e6,
            "temporary_mb": program.memory_analysis().temp_size_in_bytes / 1e6,
        }
        running[name] = (program, jax.tree.map(jnp.copy, params), state)
        seconds[name] = []
    for _ in range(options.rounds):
        seconds["plain"].append(timed(plain, params, images)[1])
        for name, (program, *carry) in running.items():
            (*carry, _), took = timed(program, *carry, images)
            running[name] = (program, *carry)
            seconds[name].append(took)
    medians = {name: statistics.median(taken[WARM_UP:]) for name, taken in seconds.items()}
    for name, row in rows.items():
        row["median_s"] = medians[name]
        row["ratio"] = medians[name] / medians["plain"]
        row["slowest_ratio"] = max(seconds[name][WARM_UP:]) / medians["plain"]

    device = jax.devices()[0]
    facts = {
        "device": f"{device.platform}: {device.device_kind}",
        "machine": platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "batch": options.batch,
        "rounds": options.rounds - WARM_UP,
    }
    print(facts)
    columns = ["ratio", "slowest_ratio", "median_s", "compile_s", "gflop", "state_mb"]
    columns.append("temporary_mb")
    print(" " * 46 + "".join(f"{column:>15}" for column in columns))
    for name, row in rows.items():
        print(f"{name:46}" + "".join(f"{row.get(column, 0):15.3g}" for column in columns))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
