"""Train loss of the MNIST autoencoder epoch by epoch, for each method and learning rate.

    python -m benchmarks.time_to_loss --data FILE.npz --output FILE.jsonl [--methods kbfgs fast ...]
    python -m benchmarks.time_to_loss --export FILE.npz --data_dir FOLDER
    python -m benchmarks.time_to_loss --table benchmarks/results/time_to_loss.jsonl

Needs the core packages only, and runs unchanged on a GPU, where all epochs of a run are one
program. FILE.npz holds ``mnist_train``, the images as uint8 [60000, 784]; ``--export`` writes it
where the packages of the training command are installed. One line of JSON a run, appended as it
ends; what the output holds is not run again. No warm start; weight decay 1e-5; batch 1000.

``--table`` prints, for the best learning rate of each method, the plain-step equivalents until the
train loss first reaches some targets: steps (to the end of the epoch) times what a step costs, as a
multiple of a plain step, in ``benchmarks/results/price_cpu.json``.
"""

import argparse
import functools
import json
import math
import statistics
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kfqn_optax as kfqn
from benchmarks.price import problems

PROBLEM = problems.make("mnist")
BATCH = PROBLEM.examples
TARGETS = (100, 70, 60, 58)
LIMIT = {"weight_decay": 1e-5, "norm_constraint": 3.0}
# By method: the transformation for a learning rate, the examples that curvature is measured on
# (None: it takes none), the learning rates to run, and its name among the candidates of `price`.
METHODS = {
    "kbfgs": (lambda lr: kfqn.kbfgs(lr, 0.3, **LIMIT), 1000, (0.3, 0.8), "kbfgs"),
    "fast": (
        lambda lr: kfqn.kfqn(lr, 0.3, output_memory=20, **LIMIT),
        100,
        (0.3, 0.5, 0.8, 1.2),
        "kfqn, a tenth, 20 pairs out",
    ),
    "kfqn": (lambda lr: kfqn.kfqn(lr, 0.3, **LIMIT), 1000, (0.3, 0.8), "kfqn"),
    "kbfgs_l": (lambda lr: kfqn.kbfgs_l(lr, 0.3, **LIMIT), 1000, (0.3, 0.8), "kbfgs_l"),
    "adam": (optax.adam, None, (3e-4, 1e-3, 2e-3, 3e-3, 1e-2), "adam"),
    "adam, eps=1e-4": (
        lambda lr: optax.adam(lr, eps=1e-4), None, (3e-4, 1e-3, 2e-3, 3e-3, 1e-2), "adam"
    ),
    "sgdm": (
        lambda lr: optax.sgd(lr, momentum=0.9),
        None,
        (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
        "sgd with momentum",
    ),
    "muon": (optax.contrib.muon, None, (3e-3, 1e-2, 3e-2, 6e-2, 1e-1), "muon"),
}  # fmt: skip


def initial(seed):
    """Weights and biases uniform within 1 / sqrt(fan-in), as in the paper."""
    shapes = PROBLEM.shapes()
    fan_in = {name: layer["kernel"].shape[0] for name, layer in shapes["params"].items()}
    keys = iter(jax.random.split(jax.random.key(seed), 2 * len(fan_in)))

    def draw(path, leaf):
        bound = fan_in[path[1].key] ** -0.5
        return jax.random.uniform(next(keys), leaf.shape, minval=-bound, maxval=bound)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def orders(seed, epochs, count):
    """The examples of each batch, [epochs, steps, BATCH]."""
    steps = count // BATCH
    return np.stack(
        [
            np.random.default_rng([seed, epoch]).permutation(count)[: steps * BATCH]
            .reshape(steps, BATCH).astype(np.int32)
            for epoch in range(1, epochs + 1)
        ]
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("make", "measured"))
def train(params, images, batches, learning_rate, make, measured):
    """Train losses after each epoch."""
    tx = make(learning_rate)
    if measured is None:
        tx = optax.chain(optax.add_decayed_weights(LIMIT["weight_decay"]), tx)

    def step(carry, batch):
        params, state = carry
        x = images[batch]
        grads = jax.grad(PROBLEM.loss_fn)(params, x)
        extra = {}
        if measured is not None:
            extra["curvature_fn"] = kfqn.curvature_fn(PROBLEM.loss_fn, params, x[:measured])
        updates, state = tx.update(grads, state, params, **extra)
        return (optax.apply_updates(params, updates), state), None

    def epoch(carry, batches):
        carry, _ = jax.lax.scan(step, carry, batches)
        parts = images.reshape(-1, 5 * BATCH, images.shape[1])
        return carry, jnp.mean(jax.lax.map(lambda x: PROBLEM.loss_fn(carry[0], x), parts))

    return jax.lax.scan(epoch, (params, tx.init(params)), batches)[1]


def run_all(options):
    done = []
    if options.output.exists():
        done = [json.loads(line) for line in options.output.read_text().splitlines()]
    images = jnp.asarray(np.load(options.data)["mnist_train"], jnp.float32) / 255
    device = jax.devices()[0].device_kind
    for method in options.methods:
        make, measured, rates, _ = METHODS[method]
        best = {}
        for seed in options.seeds:
            # Further seeds for the best learning rate of the first only.
            for rate in rates if not best else [min(best, key=best.get)]:
                key = {"method": method, "learning_rate": rate, "seed": seed}
                found = next((r for r in done if key.items() <= r.items()), None)
                if found is None:
                    batches = orders(seed, options.epochs, len(images))
                    losses = train(initial(seed), images, batches, rate, make, measured)
                    losses = [round(float(loss), 2) for loss in losses]
                    found = key | {"device": device, "jax": jax.__version__, "train_loss": losses}
                    with options.output.open("a") as file:
                        file.write(json.dumps(found) + "\n")
                final = found["train_loss"][-1]
                if seed == options.seeds[0]:
                    best[rate] = final if math.isfinite(final) else math.inf


def table(path):
    runs = [json.loads(line) for line in path.read_text().splitlines()]
    prices = json.loads((Path(__file__).parent / "results" / "price_cpu.json").read_text())
    rows = prices["steps"][PROBLEM.name]["rows"]
    print("| method | learning rate | step | " + " | ".join(f"to {t}" for t in TARGETS), end="")
    print(" | loss after 5 epochs | 10 |\n|---|---|---|" + "---|" * (len(TARGETS) + 2))
    for method, (_, _, _, name) in METHODS.items():
        mine = [run for run in runs if run["method"] == method]
        finished = [run for run in mine if math.isfinite(run["train_loss"][-1])]
        if not finished:
            continue
        rate = min(finished, key=lambda run: run["train_loss"][-1])["learning_rate"]
        curves = [run["train_loss"] for run in mine if run["learning_rate"] == rate]
        median = [statistics.median(losses) for losses in zip(*curves, strict=True)]
        ratio = rows[name]["ratio"]
        cells = []
        for target in TARGETS:
            epoch = next((i for i, loss in enumerate(median, 1) if loss <= target), None)
            cells.append("not" if epoch is None else f"{epoch * 60 * ratio:.0f}")
        print(f"| {method} | {rate:g} | {ratio:.2f} | " + " | ".join(cells), end="")
        print(f" | {median[4]:.1f} | {median[-1]:.1f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--export", type=Path)
    parser.add_argument("--data_dir")
    parser.add_argument("--table", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()
    if options.export:
        from kfqn_optax.experiment.datasets import load

        images = np.rint(255 * load("mnist", options.data_dir).train).astype(np.uint8)
        np.savez_compressed(options.export, mnist_train=images)
    elif options.table:
        table(options.table)
    else:
        run_all(options)


if __name__ == "__main__":
    main()
