"""All methods on the CNN and on the transformer, each tuned on the same budget of steps.

    python benchmarks/methods.py --config configs/char_transformer.py --steps 160
        [--methods kbfgs adam ...] [--config.framework=nnx] [--config.key=value ...]
    python benchmarks/methods.py --config configs/char_transformer.py --steps 40 --rates 0.03 3
        --seeds 0 1 2 3 4 --methods block_kbfgs
    python benchmarks/methods.py --config configs/char_transformer.py --time
    python benchmarks/methods.py --draw

The budget is a number of steps on the config's problem, without warm start. Each method runs once
for every learning rate of its grid below; one compiled step serves them all. Results are written
run by run to ``benchmarks/results/methods_PROBLEM_FRAMEWORK.json``; what is there is not run again.
Block K-BFGS has no grid: it runs with its own defaults. With ``--rates`` and ``--seeds`` the runs
are those instead, kept apart, to see whether any diverges.
``--time`` lets a step of each method take turns in one process and keeps the medians, so that a
busy machine hits all alike; seconds in figure and table are these times the number of steps.
``--draw`` writes the figures and prints the tables from the committed results.
"""

import argparse
import itertools
import json
import math
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
from absl import flags
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from ml_collections import config_flags

from kfqn_optax.experiment.config import check
from kfqn_optax.experiment.optimizers import make_optimizer
from kfqn_optax.experiment.problems import make_problem
from kfqn_optax.experiment.steps import (
    TrainState,
    count,
    epoch_batches,
    make_evaluate,
    make_step,
    take,
)
from kfqn_optax.experiment.train import load_dataset

RESULTS = Path(__file__).parent / "results"
SECOND_ORDER = {
    "char_transformer": [30.0, 100.0, 300.0, 1000.0],
    "fashion_mnist_cnn": [1.0, 3.0, 10.0, 30.0],
}
GRIDS = {
    "adam": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2],
    "muon": [3e-3, 1e-2, 3e-2, 1e-1],
    "kbfgs": SECOND_ORDER,
    "kbfgs_l": SECOND_ORDER,
    "kfqn": SECOND_ORDER,
    "block_kbfgs": [0.5],
}
UNTUNED = {"block_kbfgs": {"damping": 0.03}}  # in place of the config's
COLORS = {
    "kbfgs": "tab:blue", "kbfgs_l": "tab:cyan", "kfqn": "tab:purple", "adam": "tab:orange",
    "muon": "tab:green", "block_kbfgs": "tab:red",
}  # fmt: skip
WORDS = {
    "kbfgs": "K-BFGS", "kbfgs_l": "K-BFGS(L)", "kfqn": "KFQN", "adam": "Adam", "muon": "Muon",
    "block_kbfgs": "block K-BFGS",
}  # fmt: skip
EVALUATED = 256  # examples of the train and the test set in each evaluation
POINTS = 8  # of a curve


def grid(method, problem):
    """The learning rates to try."""
    rates = GRIDS[method]
    return rates[problem] if isinstance(rates, dict) else rates


class Trial:
    """One method on one problem, compiled once."""

    def __init__(self, config, method, problem, dataset):
        changed = {"optimizer": method} | UNTUNED.get(method, {})
        self.config = SimpleNamespace(**config.to_dict() | changed)
        self.problem = problem
        self.examples = jax.device_put(dataset.train)
        evaluated = slice(EVALUATED)
        self.measure = make_evaluate(
            problem,
            take(self.examples, evaluated),
            take(jax.device_put(dataset.test), evaluated),
            weight_decay=config.weight_decay,
            batch_size=config.eval_batch_size,
        )
        self.step = jax.jit(self._step, donate_argnums=0)
        self.compiled = None
        params, model_state = problem.init(config.seed)
        self.layers = problem.layers(params, take(self.examples, slice(2)), model_state)

    def optimizer(self, learning_rate):
        config = SimpleNamespace(**{**vars(self.config), "learning_rate": learning_rate})
        return make_optimizer(config, lambda: self.layers)

    def _step(self, state, examples, indices, learning_rate):
        optimizer = self.optimizer(learning_rate)
        step = make_step(self.problem, optimizer, self.config.curvature_examples)
        return step(state, examples, indices)

    def start(self, learning_rate, seed):
        """The state before the first step; compiles the step if that is not done."""
        params, model_state = self.problem.init(seed)
        opt_state = self.optimizer(learning_rate).transformation.init(params)
        state = TrainState(params, opt_state, model_state)
        if self.compiled is None:
            begin = time.perf_counter()
            arguments = state, self.examples, next(self.batches(seed)), np.float32(learning_rate)
            self.compiled = self.step.lower(*arguments).compile()
            self.compile_s = time.perf_counter() - begin
        return state

    def run(self, learning_rate, steps, seed):
        """One run: a dictionary for the results."""
        state = self.start(learning_rate, seed)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state))
        curve, batches = [self._point(0, state)], self.batches(seed)
        for step in range(1, steps + 1):
            rate = np.float32(learning_rate)
            state, _ = self.compiled(state, self.examples, next(batches), rate)
            if step % (steps // POINTS) == 0:
                curve.append(self._point(step, state))
                if not math.isfinite(curve[-1]["train_loss"]):
                    break
        return {"learning_rate": learning_rate, "state_bytes": size, "curve": curve}

    def batches(self, seed):
        """Index vectors, epoch after epoch."""
        for epoch in itertools.count(1):
            size = count(self.examples)
            yield from epoch_batches(seed, epoch, size, self.config.batch_size)

    def _point(self, step, state):
        measured = self.measure(state.params, state.model_state)
        return {"step": step, **{name: round(value, 4) for name, value in measured.items()}}


def path_of(config):
    return RESULTS / f"methods_{config.problem}_{config.framework}.json"


def final(run):
    loss = run["curve"][-1]["train_loss"]
    return loss if math.isfinite(loss) else math.inf


def read(config):
    """The results so far, with the config and the device they are for."""
    path = path_of(config)
    results = json.loads(path.read_text()) if path.exists() else {"methods": {}, "time": {}}
    keys = ["problem", "framework", "batch_size", "train_examples", "curvature_examples", "damping",
            "norm_constraint", "fallback_learning_rate", "fallback_kinds", "weight_decay",
            "seed"]  # fmt: skip
    results["config"] = {key: config[key] for key in keys}
    device = jax.devices()[0]
    results["device"] = f"{device.platform}: {device.device_kind}, JAX {jax.__version__}"
    return results


def write(config, results):
    path_of(config).write_text(json.dumps(results) + "\n")


def run_all(config, methods, steps, rates=None, seeds=None):
    """Runs what is not in the results yet.

    Each method's grid with the config's seed; or, without a choice of the best, other rates and
    seeds, whose results are kept apart, under "spread".
    """
    results = read(config)
    kept = results["methods"] if rates is None else results.setdefault("spread", {})
    problem, dataset = make_problem(config), load_dataset(config)
    for method in methods:
        runs, trial = kept.setdefault(method, []), None
        for rate, seed in itertools.product(rates or grid(method, config.problem), seeds or [None]):
            key = {"learning_rate": rate} | ({} if seed is None else {"seed": seed})
            if any(key.items() <= run.items() for run in runs):
                continue
            trial = trial or Trial(config, method, problem, dataset)
            runs.append(key | trial.run(rate, steps, config.seed if seed is None else seed))
            write(config, results)
            print(method, key, runs[-1]["curve"][-1], flush=True)


def measure_time(config, methods, rounds):
    """Steps of all methods in turn, the first two rounds left out."""
    results = read(config)
    problem, dataset = make_problem(config), load_dataset(config)
    running, seconds = {}, {method: [] for method in methods}
    for method in methods:
        trial = Trial(config, method, problem, dataset)
        learning_rate = grid(method, config.problem)[0]
        state = trial.start(learning_rate, config.seed)
        running[method] = [trial, state, np.float32(learning_rate)]
    for indices, _ in zip(trial.batches(config.seed), range(rounds + 2), strict=False):
        for method, (trial, state, rate) in running.items():
            begin = time.perf_counter()
            running[method][1], _ = jax.block_until_ready(
                trial.compiled(state, trial.examples, indices, rate)
            )
            seconds[method].append(time.perf_counter() - begin)
    results["time"] = {
        method: {
            "median_s": round(statistics.median(taken[2:]), 4),
            "slowest_s": round(max(taken[2:]), 4),
            "compile_s": round(running[method][0].compile_s, 1),
        }
        for method, taken in seconds.items()
    }
    write(config, results)
    print(results["time"])


def draw(path):
    """The figure of one problem and network, where steps were timed, and its table."""
    results = json.loads(path.read_text())
    best = {method: min(runs, key=final) for method, runs in results["methods"].items()}
    step_s = {method: of_method["median_s"] for method, of_method in results["time"].items()}
    if step_s:
        draw_figure(path.with_suffix(".png"), best, step_s)
    steps = max(point["step"] for run in best.values() for point in run["curve"])
    print(f"\n{path.stem}: {steps} steps of {results['config']['batch_size']}\n")
    print("| method | learning rate | train loss | test loss | step, Adam's = 1 | state |")
    print("|---|---|---|---|---|---|")
    for method, run in sorted(best.items(), key=lambda item: final(item[1])):
        last = run["curve"][-1]
        ratio = f"{step_s[method] / step_s['adam']:.2f}" if step_s else "not timed"
        print(
            f"| {WORDS[method]} | {run['learning_rate']:g} | {last['train_loss']:.3f} | "
            f"{last['test_loss']:.3f} | {ratio} | {run['state_bytes'] / 1e6:.1f} MB |"
        )


def draw_figure(path, best, step_s):
    """Train loss against steps and seconds, for the best learning rate of each method."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, x in zip(figure.subplots(1, 2, sharey=True), ["steps", "seconds"], strict=True):
        for method, run in best.items():
            scale = 1 if x == "steps" else step_s[method]
            values = [[point["step"] * scale, point["train_loss"]] for point in run["curve"]]
            axes.plot(*zip(*values, strict=True), color=COLORS[method], label=WORDS[method])
        axes.set_xlabel(x if x == "steps" else "seconds of training")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("train loss")
    figure.axes[0].legend()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--rates", type=float, nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", default=list(GRIDS), choices=list(GRIDS))
    options, rest = parser.parse_known_args()
    if options.draw:
        for path in sorted(RESULTS.glob("methods_*.json")):
            draw(path)
        return
    config = config_flags.DEFINE_config_file("config")
    flags.FLAGS(["methods", *rest])
    check(config.value)
    if options.time:
        measure_time(config.value, options.methods, rounds=15)
    elif options.rates:
        run_all(config.value, options.methods, options.steps, options.rates, options.seeds)
    else:
        run_all(config.value, options.methods, options.steps)


if __name__ == "__main__":
    main()
