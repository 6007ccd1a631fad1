"""What is run: by plan, the budgets, the subsets, the seeds and the grids.

A method's epochs follow from the budget of its problem, which is counted in epochs of plain
gradient steps: a method whose step costs as much as 2.8 of them gets the budget over 2.8, rounded.
So all methods of a problem train for about the same time, on any machine where the prices are about
those of ours, and the number of epochs, unlike a stop by the clock, is the same in every run.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

PROBLEMS = ("mnist", "faces", "curves")
TRAIN = {"mnist": 60_000, "faces": 103_500, "curves": 20_000}
TEST = {"mnist": 10_000, "faces": 41_400, "curves": 10_000}
PLAIN = {"mnist": 0.119, "faces": 0.369, "curves": 0.039}  # seconds of a plain step, 2 CPU cores
# A step's price in plain steps on 2 CPU cores: `make bench`; K-FAC, RMSprop: reckoned.
PRICE = {
    "mnist": dict(kbfgs=2.82, kbfgs_l=2.68, kfac=2.4, adam=1.15, rmsprop=1.15, sgdm=1.14),
    "faces": dict(kbfgs=3.19, kbfgs_l=3.06, kfac=2.5, adam=1.03, rmsprop=1.05, sgdm=1.06),
    "curves": dict(kbfgs=2.56, kbfgs_l=2.57, kfac=2.4, adam=1.04, rmsprop=1.05, sgdm=1.06),
}
# K-FAC inverts all its matrices in each of the first 21 steps, which is in no price of a step; the
# plain steps that one time costs.
INVERSES, INVERSE = 21, {"mnist": 5.5, "faces": 4.0, "curves": 5.5}

Settings = Mapping[str, float]


class Plan(NamedTuple):
    """One of the commands.

    Attributes:
        budgets: by problem, epochs of plain gradient steps.
        seeds: of the runs that are reported; the first one is that of the tuning.
        overrides: by problem, what differs from its config: the subset of the examples.
        grids: by problem and method, the settings that are tried; a method without any is left
            out. None: the settings are those of the config.
    """

    budgets: Mapping[str, float]
    seeds: Sequence[int]
    overrides: Mapping[str, Mapping[str, int]]
    grids: Mapping[str, Mapping[str, Sequence[Settings]]] | None


def grid(**values: Sequence[float]) -> list[Settings]:
    """Every combination of the values."""
    return [
        dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())
    ]


def _some(second: str, *pairs: tuple[float, float]) -> list[Settings]:
    """Pairs of a learning rate and a second setting."""
    return [{"learning_rate": rate, second: value} for rate, value in pairs]


_OURS = grid(learning_rate=(0.1, 0.3, 0.8, 1.6), damping=(0.03, 0.1, 0.3))
_FIRST_ORDER = grid(learning_rate=(1e-4, 3e-4, 1e-3, 3e-3), epsilon=(1e-8, 1e-4))
_FULL = {
    "kbfgs": _OURS,
    "kbfgs_l": _OURS,
    "kfac": grid(learning_rate=(0.1, 0.3, 1.0, 3.0), damping=(0.3, 1.0, 3.0)),
    "adam": _FIRST_ORDER,
    "rmsprop": _FIRST_ORDER,
    "sgdm": grid(learning_rate=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1)),
}
# What time_to_loss.jsonl (K-BFGS, Adam and SGD-m on MNIST and CURVES), faces.json (K-BFGS and Adam)
# and the authors' notebook (K-FAC on MNIST) leave open.
_SMALL = {
    "mnist": {"rmsprop": _some("epsilon", (1e-3, 1e-4), (3e-4, 1e-8))},
    "curves": {
        "kbfgs": _some("damping", (0.8, 0.3), (0.8, 0.1)),
        "kbfgs_l": grid(learning_rate=(0.3, 0.8), damping=(0.03, 0.1))
        + _some("damping", (0.8, 0.3), (1.6, 0.1)),
        "kfac": grid(learning_rate=(0.3, 1.0), damping=(0.3, 1.0, 3.0))
        + _some("damping", (3.0, 3.0)),
        "rmsprop": _some("epsilon", (1e-3, 1e-4), (3e-4, 1e-8)),
    },
    "faces": {
        "kbfgs": _some("damping", (0.8, 0.1), (0.8, 0.3)),
        "kfac": _some("damping", (1.0, 3.0)),
        "rmsprop": _some("epsilon", (1e-3, 1e-4), (3e-4, 1e-8)),
        "sgdm": grid(learning_rate=(1e-3, 3e-4, 3e-3)),
    },
}
PLANS = {
    "full": Plan(
        budgets={"mnist": 60, "faces": 30, "curves": 300},
        seeds=(0, 1, 2),
        overrides={},
        grids=dict.fromkeys(PROBLEMS, _FULL),
    ),
    "tune": Plan(
        budgets={"mnist": 9, "faces": 8, "curves": 27},
        seeds=(0,),
        overrides={
            "mnist": {"train_examples": 20_000, "test_examples": 1_000},
            "faces": {"train_examples": 10_000, "test_examples": 1_000},
            "curves": {"test_examples": 1_000},
        },
        grids=_SMALL,
    ),
    "quick": Plan(
        budgets={"mnist": 7.2, "faces": 12.5, "curves": 28},
        seeds=(0,),
        overrides={"faces": {"train_examples": 20_000, "test_examples": 2_000}},
        grids=None,
    ),
}


def examples_of(plan: Plan, problem: str) -> tuple[int, int]:
    """How many training and test examples a plan takes of a problem."""
    subset = plan.overrides.get(problem, {})
    return (
        subset.get("train_examples", TRAIN[problem]),
        subset.get("test_examples", TEST[problem]),
    )


def epochs_of(plan: Plan, problem: str, method: str) -> int:
    """The epochs that a method has within the budget of a problem; at least 1."""
    left = plan.budgets[problem]
    if method == "kfac":
        left -= INVERSES * INVERSE[problem] / (examples_of(plan, problem)[0] // 1000)
    return max(1, round(left / PRICE[problem][method]))


def expected_hours(plan: Plan, problems: Sequence[str], methods: Sequence[str]) -> float:
    """What a plan takes on 2 CPU cores: training, evaluation, and 12 seconds a run to begin.

    An evaluation costs a third of a plain step for every batch of both sets.
    """
    seconds = 0.0
    for problem, method in itertools.product(problems, methods):
        train, test = examples_of(plan, problem)
        evaluations = epochs_of(plan, problem, method) * (train + test) / 3
        steps = (plan.budgets[problem] * train + evaluations) / 1000
        runs = len(plan.seeds)
        if plan.grids is not None:
            candidates = len(plan.grids[problem].get(method, ()))
            runs = candidates and candidates + runs - 1
        seconds += runs * (steps * PLAIN[problem] + 12)
    return seconds / 3600
