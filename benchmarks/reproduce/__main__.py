"""The K-BFGS paper's comparison: six methods on three autoencoders, tuned, with three seeds.

    python -m benchmarks.reproduce full [--data_dir FOLDER]     # make reproduce
    python -m benchmarks.reproduce quick [--data_dir FOLDER]    # make reproduce-quick
    python -m benchmarks.reproduce tune --problems faces --methods kfac

A plan (see `plans`) tries each method's settings over a grid, in runs of kfqn-train one after the
other, takes those with the smallest train loss at the end, and runs them with the other seeds;
``quick`` takes the settings of ``configs/paper_*.py`` instead. Results go to
``benchmarks/results/reproduce[_PLAN].json`` after each method, and at the end a figure is drawn
beside it and a table printed.

Given again, the same command goes on: a run that has ended is not run again, and one that was
broken off goes on from its checkpoint. All runs are under ``runs/reproduce-PLAN``.
"""

import argparse
import json
import math
import os
import platform
import re
import signal
import sys
from pathlib import Path
from typing import Any

from benchmarks.reproduce import report, runs
from benchmarks.reproduce.plans import PLANS, PROBLEMS, Plan, Settings, epochs_of, expected_hours
from kfqn_optax.experiment.config import ConfigError
from kfqn_optax.experiment.paper import METHODS

RESULTS = Path(__file__).parents[1] / "results"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.reproduce", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("plan", choices=PLANS)
    parser.add_argument("--problems", nargs="+", default=PROBLEMS, choices=PROBLEMS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, help="in place of the plan's")
    parser.add_argument("--scale", type=float, default=1.0, help="of all budgets")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="of the configs")
    parser.add_argument("--data_dir", help="folder with the raw files, as for kfqn-train")
    parser.add_argument("--runs", type=Path, help="where the runs go")
    parser.add_argument("--output", type=Path, help="the JSON file; the figure goes beside it")
    parser.add_argument("--readme", type=Path, help="a file whose marked section gets the table")
    options = parser.parse_args(argv)
    plan = PLANS[options.plan]
    if options.seeds:
        plan = plan._replace(seeds=options.seeds)
    overrides = dict(pair.split("=", 1) for pair in options.set)
    if options.data_dir:
        overrides["data_dir"] = options.data_dir
    suffix = "" if options.plan == "full" else f"_{options.plan}"
    output = options.output or RESULTS / f"reproduce{suffix}.json"
    folder = options.runs or Path("runs") / f"reproduce-{options.plan}"
    plan = plan._replace(budgets={name: options.scale * x for name, x in plan.budgets.items()})
    hours = expected_hours(plan, options.problems, options.methods)
    print(f"{options.plan}: about {hours:.1f} hours on 2 CPU cores, less what is done", flush=True)
    try:
        for problem in options.problems:
            for method in options.methods:
                if plan.grids is not None and method not in plan.grids[problem]:
                    continue
                found = run_method(plan, problem, method, folder, overrides)
                save(output, options.plan, problem, method, found)
    except (runs.Failed, ConfigError) as error:
        print(f"reproduce: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("reproduce: interrupted; the same command goes on from here.", file=sys.stderr)
        return 130
    results = json.loads(output.read_text())
    table = report.table(results)
    print(table)
    if options.plan != "tune":
        report.figure(results).savefig(output.with_suffix(".png"), dpi=110)
    if options.readme:
        options.readme.write_text(report.with_table(options.readme.read_text(), table))
    return 0


def run_method(
    plan: Plan, problem: str, method: str, folder: Path, overrides: dict[str, Any]
) -> dict[str, Any]:
    """All runs of a method on a problem: ``tuning``, if there is a grid, and ``runs`` by seed."""
    epochs = epochs_of(plan, problem, method)
    shared = {"epochs": epochs, **plan.overrides.get(problem, {}), **overrides}

    def run(settings: Settings, seed: int) -> dict[str, Any]:
        values = [f"{key}={value:g}" for key, value in settings.items()]
        name = "-".join([method, *values, f"seed={seed}"])
        found = runs.train(
            folder / problem / name, problem, method, {**shared, **settings, "seed": seed}
        )
        last = found["curve"] and dict(zip(runs.COLUMNS, found["curve"][-1], strict=True))
        said = (
            f"train loss {last['train_loss']:.2f}, {last['seconds']:.0f} s" if last else "diverged"
        )
        print(f"{problem} {name}, {found['epochs']} epochs: {said}", flush=True)
        return found

    first, *others = plan.seeds
    candidates = [{}] if plan.grids is None else plan.grids[problem][method]
    tuning = [run(settings, first) for settings in candidates]
    losses = [final_loss(found) for found in tuning]
    best = losses.index(min(losses))
    return {
        "tuning": [
            {**found["settings"], "train_loss": _finite(loss)}
            for found, loss in zip(tuning, losses, strict=True)
            if plan.grids is not None
        ],
        "runs": [tuning[best], *(run(candidates[best], seed) for seed in others)],
        "overrides": {
            key: value for key, value in shared.items() if key not in ("data_dir", "epochs")
        },
    }


def final_loss(run: dict[str, Any]) -> float:
    """The train loss at the end; infinite for a run that diverged."""
    return run["curve"][-1][runs.COLUMNS.index("train_loss")] if run["curve"] else math.inf


def _finite(loss: float) -> float | None:
    return round(loss, 2) if math.isfinite(loss) else None


def save(output: Path, plan: str, problem: str, method: str, found: dict[str, Any]) -> None:
    """Puts a method's results into the file, in place of older ones."""
    problems = json.loads(output.read_text())["problems"] if output.exists() else {}
    problems.setdefault(problem, {})[method] = found
    results = {"plan": plan, "machine": machine(), "columns": runs.COLUMNS, "problems": problems}
    output.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1)
    # A row of numbers to a line.
    text = re.sub(r"\[[^][{}]*\]", lambda row: re.sub(r"\s*\n\s*", " ", row[0]), text)
    output.write_text(text + "\n")


def machine() -> str:
    """The processor and how many of its cores there are."""
    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return f"{named[1] if named else platform.processor()}, {os.cpu_count()} cores"


if __name__ == "__main__":
    # So that a run in progress ends before this process does: nothing is left that goes on alone.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
