"""All methods on the CNN and on the transformer, each tuned on the same budget of steps.

    python benchmarks/methods.py --config configs/char_transformer.py --steps 64
        [--methods kbfgs adam ...] [--config.key=value ...]
    python benchmarks/methods.py --draw

The budget is a number of steps on the config's problem. Each method runs once for every setting of
its grid below; one compiled step serves all settings of a method. Results are written run by run to
``benchmarks/results/methods_PROBLEM.json``, and what is there is not run again. Seconds count steps
alone (and the warm start), not compilation or evaluation. ``--draw`` writes the figures and prints
the tables from the committed results.
"""

import argparse
import itertools
import json
import math
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
    warm_start,
)
from kfqn_optax.experiment.train import load_dataset

RESULTS = Path(__file__).parent / "results"
SECOND_ORDER = {"learning_rate": [3.0, 10.0, 30.0, 100.0], "damping": [0.3]}
GRIDS = {
    "adam": {"learning_rate": [3e-4, 1e-3, 3e-3, 1e-2]},
    "muon": {"learning_rate": [3e-3, 1e-2, 3e-2, 1e-1]},
    "kbfgs": SECOND_ORDER,
    "kbfgs_l": SECOND_ORDER,
    "kfqn": SECOND_ORDER,
}
COLORS = {
    "kbfgs": "tab:blue", "kbfgs_l": "tab:cyan", "kfqn": "tab:purple", "adam": "tab:orange",
    "muon": "tab:green",
}  # fmt: skip
WORDS = {
    "kbfgs": "K-BFGS", "kbfgs_l": "K-BFGS(L)", "kfqn": "KFQN", "adam": "Adam", "muon": "Muon",
}  # fmt: skip
EVALUATED = 256  # examples of the train and the test set in each evaluation
POINTS = 8  # of a curve


def settings_of(method):
    """The settings of a method's grid, as dictionaries."""
    names = list(GRIDS[method])
    for values in itertools.product(*GRIDS[method].values()):
        yield dict(zip(names, values, strict=True))


class Trial:
    """One method on one problem, compiled once."""

    def __init__(self, config, method, problem, dataset):
        self.config = SimpleNamespace(**{**config.to_dict(), "optimizer": method})
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

    def optimizer(self, **numbers):
        config = SimpleNamespace(**{**vars(self.config), **numbers})
        return make_optimizer(config, lambda: self.layers)

    def _step(self, state, examples, indices, numbers):
        optimizer = self.optimizer(**numbers)
        step = make_step(self.problem, optimizer, self.config.curvature_examples)
        return step(state, examples, indices)

    def start(self, settings):
        params, model_state = self.problem.init(self.config.seed)
        optimizer = self.optimizer(**settings)
        opt_state, seconds = optimizer.transformation.init(params), 0.0
        if optimizer.warm_starts and self.config.warm_start:
            opt_state, seconds, _ = warm_start(
                opt_state, self.problem, params, self.examples, self.config.batch_size, model_state
            )
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(opt_state))
        return TrainState(params, opt_state, model_state), seconds, size

    def run(self, settings, steps):
        """One run: a dictionary for the results."""
        state, seconds, size = self.start(settings)
        numbers = {name: np.float32(value) for name, value in settings.items()}
        curve, taken = [self._point(0, 0.0, state)], 0
        batches = self._batches()
        if self.compiled is None:
            arguments = state, self.examples, next(self._batches()), numbers
            self.compiled = self.step.lower(*arguments).compile()
        while taken < steps:
            begin = time.perf_counter()
            for _ in range(steps // POINTS):
                state, _ = self.compiled(state, self.examples, next(batches), numbers)
                taken += 1
            jax.block_until_ready(state)
            seconds += time.perf_counter() - begin
            curve.append(self._point(taken, seconds, state))
            if not math.isfinite(curve[-1]["train_loss"]):
                break
        return {**settings, "state_bytes": size, "curve": curve}

    def _batches(self):
        for epoch in itertools.count(1):
            size = count(self.examples)
            yield from epoch_batches(self.config.seed, epoch, size, self.config.batch_size)

    def _point(self, step, seconds, state):
        measured = self.measure(state.params, state.model_state)
        point = {"step": step, "seconds": seconds, **measured}
        return {name: round(float(value), 4) for name, value in point.items()}


def path_of(problem):
    return RESULTS / f"methods_{problem}.json"


def final(run):
    loss = run["curve"][-1]["train_loss"]
    return loss if math.isfinite(loss) else math.inf


def tune(config, methods, steps):
    """Runs what is not in the results yet."""
    path = path_of(config.problem)
    results = json.loads(path.read_text()) if path.exists() else {"methods": {}}
    problem, dataset = make_problem(config), load_dataset(config)
    keys = ["problem", "batch_size", "train_examples", "curvature_examples", "norm_constraint",
            "fallback_learning_rate", "weight_decay", "seed"]  # fmt: skip
    results["config"] = {**{key: config[key] for key in keys}, "steps": steps}
    device = jax.devices()[0]
    results["device"] = f"{device.platform}: {device.device_kind}, JAX {jax.__version__}"
    for method in methods:
        runs = results["methods"].setdefault(method, [])
        trial = None
        for settings in settings_of(method):
            if any(all(run[k] == v for k, v in settings.items()) for run in runs):
                continue
            trial = trial or Trial(config, method, problem, dataset)
            runs.append(trial.run(settings, steps))
            path.write_text(json.dumps(results) + "\n")
            print(method, settings, runs[-1]["curve"][-1], flush=True)


def draw(path):
    """The figure and the table of one problem: the best setting of each method."""
    results = json.loads(path.read_text())
    best = {method: min(runs, key=final) for method, runs in results["methods"].items()}
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, x in zip(figure.subplots(1, 2, sharey=True), ["step", "seconds"], strict=True):
        for method, run in best.items():
            values = [[point[x], point["train_loss"]] for point in run["curve"]]
            axes.plot(*zip(*values, strict=True), color=COLORS[method], label=WORDS[method])
        axes.set_xlabel(x if x == "step" else "seconds of training")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("train loss")
    figure.axes[0].legend()
    figure.savefig(path.with_suffix(".png"), dpi=120)
    config = results["config"]
    print(f"{config['problem']}, {config['steps']} steps of {config['batch_size']}\n")
    print("| method | best setting | train loss | test loss | seconds | state |")
    print("|---|---|---|---|---|---|")
    for method, run in sorted(best.items(), key=lambda item: final(item[1])):
        setting = ", ".join(f"{name} {run[name]:g}" for name in GRIDS[method])
        last = run["curve"][-1]
        state = f"{run['state_bytes'] / 1e6:.1f} MB"
        print(
            f"| {WORDS[method]} | {setting.replace('_', ' ')} | {last['train_loss']:.3f} | "
            f"{last['test_loss']:.3f} | {last['seconds']:.0f} | {state} |"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--methods", nargs="+", default=list(GRIDS), choices=list(GRIDS))
    options, rest = parser.parse_known_args()
    if options.draw:
        for path in sorted(RESULTS.glob("methods_*.json")):
            draw(path)
        return
    config = config_flags.DEFINE_config_file("config")
    flags.FLAGS(["methods", *rest])
    check(config.value)
    tune(config.value, options.methods, options.steps)


if __name__ == "__main__":
    main()
