"""Train loss of the paper's autoencoders epoch by epoch, for each method and learning rate.

    python -m benchmarks.time_to_loss --problem curves --data FILE.npz [--methods kbfgs fast ...]
    python -m benchmarks.time_to_loss --problem curves --export FILE.npz [--data_dir FOLDER]
    python -m benchmarks.time_to_loss --table

Needs the core packages only, and runs unchanged on a GPU, where all epochs of a run are one
program. FILE.npz holds ``train`` and ``test``, examples [n, d] (uint8: 0 to 1); ``--export``
writes it where the packages of the training command are installed. One line of JSON a run, appended
to ``benchmarks/results/time_to_loss.jsonl`` as it ends; what that holds is not run again. No warm
start; weight decay 1e-5; batch 1000.

Learning rates are tried with one seed, and further ones beside them until the best is no edge; the
best is run with the other seeds. With ``--tune_epochs`` they are tried for so many epochs only.

``--table`` prints, for the best learning rate of each method, the plain-step equivalents until the
train loss first reaches some targets: steps (to the end of the epoch) times what a step costs, as a
multiple of a plain step, in ``benchmarks/results/price_cpu.json``; and the seconds that is there.
"""

import argparse
import functools
import json
import math
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kfqn_optax as kfqn
from benchmarks.price import problems
from benchmarks.price.candidates import LIGHT

RESULTS = Path(__file__).parent / "results"
BATCH = problems.BATCH
EDGES = 3  # at most so many learning rates are added to a grid
TARGETS = {
    "mnist": (100, 70, 60, 56),
    "curves": (150, 110, 90, 80),
    "faces": (40, 30, 20, 15),
}
LIMIT = {"weight_decay": 1e-5, "norm_constraint": 3.0}
FAST = {"output_memory": 20}
FIRST = 60  # steps, for which some methods have a price of their own


def light_every(count):
    """Curvature in every one of the first steps, in every 8th of the others."""
    return jnp.where(count < FIRST, 1, 8)


# By method: the transformation for a learning rate, the share of the batch that curvature is
# measured on (None: it takes none), the first learning rates, and its name among the candidates of
# `price`; or two names, that of the first steps and that of the others.
OURS = 0.2, 0.4, 0.8, 1.6
METHODS = {
    "kbfgs": (lambda lr: kfqn.kbfgs(lr, 0.3, **LIMIT), 1, OURS, "kbfgs"),
    "kbfgs, damping 0.1": (lambda lr: kfqn.kbfgs(lr, 0.1, **LIMIT), 1, OURS, "kbfgs"),
    "fast": (lambda lr: kfqn.kfqn(lr, 0.3, **FAST, **LIMIT), 0.1, OURS, "fast"),
    "fast, damping 0.1": (lambda lr: kfqn.kfqn(lr, 0.1, **FAST, **LIMIT), 0.1, OURS, "fast"),
    "fast, every 2nd step": (
        lambda lr: kfqn.kfqn(lr, 0.3, update_every=2, **FAST, **LIMIT),
        0.1,
        OURS,
        "fast, every 2nd step",
    ),
    "light": (
        lambda lr: kfqn.block_kbfgs(lr, weight_decay=1e-5, update_every=light_every, **LIGHT),
        0.1,
        (0.2, 0.5, 1.0),
        ("light", "light, every 8th step"),
    ),
    "kfqn": (lambda lr: kfqn.kfqn(lr, 0.3, **LIMIT), 1, OURS, "kfqn"),
    "kbfgs_l": (lambda lr: kfqn.kbfgs_l(lr, 0.3, **LIMIT), 1, OURS, "kbfgs_l"),
    "adam": (optax.adam, None, (3e-4, 1e-3, 3e-3, 1e-2), "adam"),
    "adam, eps 1e-4": (
        lambda lr: optax.adam(lr, eps=1e-4), None, (3e-4, 1e-3, 3e-3, 1e-2), "adam"
    ),
    "sgdm": (
        lambda lr: optax.sgd(lr, momentum=0.9),
        None,
        (1e-3, 3e-3, 1e-2, 3e-2),
        "sgd with momentum",
    ),
    "muon": (optax.contrib.muon, None, (3e-3, 1e-2, 3e-2, 1e-1), "muon"),
}  # fmt: skip


def initial(problem, seed):
    """Weights and biases uniform within 1 / sqrt(fan-in), as in the paper."""
    shapes = problem.shapes()
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


def mean_loss(loss_fn, params, examples):
    """The loss of all examples, some batches at a time."""
    parts = examples.reshape(-1, 5 * BATCH, examples.shape[1])
    return jnp.mean(jax.lax.map(lambda x: loss_fn(params, x), parts))


@functools.partial(jax.jit, static_argnames=("loss_fn", "make", "share"))
def train(params, examples, batches, learning_rate, loss_fn, make, share):
    """Train losses after each epoch."""
    tx = make(learning_rate)
    if share is None:
        tx = optax.chain(optax.add_decayed_weights(LIMIT["weight_decay"]), tx)

    def step(carry, batch):
        params, state = carry
        x = examples[batch]
        grads = jax.grad(loss_fn)(params, x)
        extra = {}
        if share is not None:
            part = x[: round(share * BATCH)]
            extra["curvature_fn"] = kfqn.curvature_fn(loss_fn, params, part)
        updates, state = tx.update(grads, state, params, **extra)
        return (optax.apply_updates(params, updates), state), None

    def epoch(carry, batches):
        carry, _ = jax.lax.scan(step, carry, batches)
        return carry, mean_loss(loss_fn, carry[0], examples)

    return jax.lax.scan(epoch, (params, tx.init(params)), batches)[1]


def examples_of(path, part):
    """``train`` or ``test`` of a file that ``--export`` wrote, float32, [n, d]."""
    examples = np.load(path)[part]
    if examples.dtype == np.uint8:
        examples = examples.astype(np.float32) / 255
    return jnp.asarray(examples, jnp.float32)


def run_all(options):
    problem, examples = problems.make(options.problem), examples_of(options.data, "train")

    def final(method, rate, seed, epochs):
        key = {"problem": problem.name, "method": method, "learning_rate": rate, "seed": seed}
        key |= {"examples": len(examples), "epochs": epochs}
        found = next((run for run in read(options.output) if key.items() <= run.items()), None)
        if found is None:
            make, share, _, _ = METHODS[method]
            batches, begin = orders(seed, epochs, len(examples)), time.perf_counter()
            arguments = initial(problem, seed), examples, batches, rate
            losses = jax.device_get(train(*arguments, problem.loss_fn, make, share))
            found = key | {
                "device": jax.devices()[0].device_kind,
                "jax": jax.__version__,
                "seconds_with_compile": round(time.perf_counter() - begin, 1),
                "train_loss": [round(float(loss), 2) for loss in losses],
            }
            with options.output.open("a") as file:
                file.write(json.dumps(found) + "\n")
        last = found["train_loss"][-1]
        return last if math.isfinite(last) else math.inf

    short = options.tune_epochs or options.epochs
    for method in options.methods:
        rates = options.rates or METHODS[method][2]
        losses = {rate: final(method, rate, options.seeds[0], short) for rate in rates}
        ratio = METHODS[method][2][1] / METHODS[method][2][0]
        for _ in range(0 if options.rates else EDGES):
            best = min(losses, key=losses.__getitem__)
            beside = {max(losses): best * ratio, min(losses): best / ratio}.get(best)
            if beside is None:
                break
            beside = float(f"{beside:.1g}")
            losses[beside] = final(method, beside, options.seeds[0], short)
        best = min(losses, key=losses.__getitem__)
        for seed in options.seeds:
            final(method, best, seed, options.epochs)


def read(path):
    """The runs in a file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def equivalents(steps, first_steps, first, later):
    """What so many steps cost, in plain ones: the first at one price, the others at another."""
    return min(steps, first_steps) * first + max(steps - first_steps, 0) * later


def table(path, name, prices):
    """Prints what a problem's runs came to."""
    runs = [run for run in read(path) if run["problem"] == name]
    rows, targets = prices[name]["rows"], TARGETS[name]
    print(f"\n{name}, {runs[0]['examples']} examples, train loss; plain-step equivalents (seconds)")
    print("\n| method | learning rate | seeds | step | runs |", end=" ")
    print(" | ".join(f"to {t}" for t in targets), end=" | epochs | half way | end |\n")
    print("|---" * (len(targets) + 8) + "|")
    for method in dict.fromkeys([*METHODS, *(run["method"] for run in runs)]):
        mine = [run for run in runs if run["method"] == method]
        if not any(math.isfinite(run["train_loss"][-1]) for run in mine):
            continue
        longest = max(run["epochs"] for run in mine)
        whole = [run for run in mine if run["epochs"] == longest]
        best = min(whole, key=_last)["learning_rate"]  # None: it adapts
        curves = [run["train_loss"] for run in whole if run["learning_rate"] == best]
        median = [statistics.median(losses) for losses in zip(*curves, strict=True)]
        if "ratio" in whole[0]:
            first = later = whole[0]["ratio"]
        else:
            names = METHODS[method][3]
            names = (names, names) if isinstance(names, str) else names
            first, later = (rows[of_price]["ratio"] for of_price in names)
        plain = rows["plain"]["median_s"]
        cells = []
        for target in targets:
            epoch = next((i for i, loss in enumerate(median, 1) if loss <= target), None)
            steps = (epoch or 0) * (runs[0]["examples"] // BATCH)
            cost = equivalents(steps, FIRST, first, later)
            cells.append("not" if epoch is None else f"{cost:.0f} ({cost * plain:.0f})")
        cells += [f"{longest}", f"{median[len(median) // 2 - 1]:.1f}", f"{median[-1]:.1f}"]
        price = f"{later:.2f}" if first == later else f"{first:.2f}, then {later:.2f}"
        print(
            f"| {method} | {best or 'adapts'} | {len(curves)} | {price} | {len(mine)} | ",
            end="",
        )
        print(" | ".join(cells), end=" |\n")


def _last(run):
    last = run["train_loss"][-1]
    return last if math.isfinite(last) else math.inf


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problem", default="mnist", choices=list(TARGETS))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--export", type=Path)
    parser.add_argument("--data_dir", default=None)
    parser.add_argument("--examples", type=int, help="exported of the training set")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS / "time_to_loss.jsonl")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rates", nargs="+", type=float, help="in place of a method's grid")
    parser.add_argument("--tune_epochs", type=int, help="of the runs that choose a learning rate")
    options = parser.parse_args()
    if options.export:
        from kfqn_optax.experiment.datasets import load

        data = load(options.problem, options.data_dir, train_examples=options.examples)
        parts = {"train": data.train, "test": data.test}
        if options.problem == "mnist":
            parts = {name: np.rint(255 * x).astype(np.uint8) for name, x in parts.items()}
        np.savez_compressed(options.export, **parts)
    elif options.table:
        prices = json.loads((RESULTS / "price_cpu.json").read_text())["steps"]
        for name in dict.fromkeys(run["problem"] for run in read(options.output)):
            table(options.output, name, prices)
    else:
        run_all(options)


if __name__ == "__main__":
    main()
