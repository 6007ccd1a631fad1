"""The table and the figure of the comparison, from its JSON alone."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from kfqn_optax.experiment.paper import METHODS

FIRST_ORDER = ("adam", "rmsprop", "sgdm")
BEGIN, END = "<!-- reproduce-quick: begin -->", "<!-- reproduce-quick: end -->"
HEAD = (
    "problem", "method", "settings", "train loss", "test loss", "epochs", "seconds",
    "seconds to the best first-order end",
)  # fmt: skip
# Okabe and Ito's colours, one a method in every panel.
COLOURS = dict(zip(METHODS, ("#0072B2", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#E69F00")))  # noqa: B905
TITLES = {"mnist": "MNIST", "faces": "FACES", "curves": "CURVES"}
SHORT = {"learning_rate": "lr", "damping": "damping", "epsilon": "eps", "norm_constraint": "limit"}
PANELS = (
    ("epoch", "train_loss", "epoch", "train loss"),
    ("seconds", "train_loss", "seconds of training", "train loss"),
    ("epoch", "test_mse", "epoch", "test error (mean squared)"),
    ("seconds", "test_mse", "seconds of training", "test error (mean squared)"),
)


def columns(results: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, list[float]]:
    """A run's curve by column."""
    rows = zip(*run["curve"], strict=True)
    return {name: list(row) for name, row in zip(results["columns"], rows, strict=True)}


def finished(results: Mapping[str, Any], problem: str) -> dict[str, list[dict[str, list[float]]]]:
    """By method, the curves of the seeds that did not diverge; a method without any is left out."""
    found = {
        method: [columns(results, run) for run in of_method["runs"] if run["curve"]]
        for method, of_method in results["problems"][problem].items()
    }
    return {method: found[method] for method in METHODS if found.get(method)}


def first_order_end(curves: Mapping[str, Sequence[Mapping[str, list[float]]]]) -> float:
    """The smallest final train loss of Adam, RMSprop and SGD-m, each the median of its seeds."""
    ends = [
        statistics.median(seed["train_loss"][-1] for seed in curves[method])
        for method in FIRST_ORDER
        if method in curves
    ]
    return min(ends, default=-math.inf)


def seconds_to(curve: Mapping[str, list[float]], loss: float) -> float:
    """The seconds at the first epoch's end with so small a train loss; infinite if none has."""
    reached = (
        seconds
        for seconds, found in zip(curve["seconds"], curve["train_loss"], strict=True)
        if found <= loss
    )
    return next(reached, math.inf)


def table(results: Mapping[str, Any]) -> str:
    """A Markdown table, a line for each problem and method; medians (least to largest) of seeds.

    The smallest train loss of a problem is bold, and so are the fewest seconds to the best end of
    a first-order method.
    """
    lines = ["| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
    for problem in filter(results["problems"].__contains__, TITLES):
        methods = results["problems"][problem]
        curves = finished(results, problem)
        goal = first_order_end(curves)
        ends = {
            method: [seed["train_loss"][-1] for seed in seeds] for method, seeds in curves.items()
        }
        waits = {
            method: [seconds_to(seed, goal) for seed in seeds] for method, seeds in curves.items()
        }
        for method in filter(methods.__contains__, METHODS):
            first, *others = methods[method]["runs"]
            cells = [TITLES[problem], METHODS[method][0], settings(first["settings"])]
            diverged = sum(run["curve"] is None for run in (first, *others))
            if diverged:
                cells[1] += f", {diverged} of {1 + len(others)} seeds diverged"
            if method in curves:
                seeds = curves[method]
                cells += [
                    _cell(ends[method], 2, _least(ends) == statistics.median(ends[method])),
                    _cell([seed["test_loss"][-1] for seed in seeds], 2),
                    str(first["epochs"]),
                    _cell([seed["seconds"][-1] for seed in seeds], 0),
                    _cell(waits[method], 0, _least(waits) == statistics.median(waits[method])),
                ]
            else:
                cells += ["", "", str(first["epochs"]), "", ""]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def settings(values: Mapping[str, float]) -> str:
    """Settings in a few words, those that are off left out."""
    return ", ".join(f"{SHORT[name]} {value:g}" for name, value in values.items() if value)


def _least(values: Mapping[str, list[float]]) -> float:
    least = min(statistics.median(of_method) for of_method in values.values())
    return least if math.isfinite(least) else math.nan


def _cell(values: list[float], digits: int, bold: bool = False) -> str:
    median = statistics.median(values)
    if not math.isfinite(median):
        return "not reached"
    text = f"{median:.{digits}f}"
    text = f"**{text}**" if bold else text
    if len(values) == 1:
        return text
    largest = f"{max(values):.{digits}f}" if math.isfinite(max(values)) else "not reached"
    return f"{text} ({min(values):.{digits}f} to {largest})"


def with_table(text: str, table: str) -> str:
    """A page with the table between its two markers, in place of what was there.

    Raises:
        ValueError: the page lacks one of them.
    """
    if BEGIN not in text or END not in text:
        raise ValueError(f"the page lacks {BEGIN} or {END}; put both where the table is to go.")
    return f"{text.split(BEGIN)[0]}{BEGIN}\n{table}\n{END}{text.split(END)[1]}"


def figure(results: Mapping[str, Any]) -> Figure:
    """Four panels a problem; a line is the median of the seeds, a band their least to largest."""
    problems = [name for name in TITLES if name in results["problems"]]
    drawing = Figure(figsize=(15, 0.8 + 3.1 * len(problems)), layout="constrained")
    FigureCanvasAgg(drawing)
    axes = drawing.subplots(len(problems), len(PANELS), squeeze=False)
    shown = {}
    for row, problem in zip(axes, problems, strict=True):
        curves = finished(results, problem)
        for panel, (x, y, x_name, y_name) in zip(row, PANELS, strict=True):
            for method, seeds in curves.items():
                shown[method] = _draw(panel, seeds, x, y, COLOURS[method])
            panel.set(yscale="log", xlabel=x_name, ylabel=y_name, title=TITLES[problem])
            _cut(panel, curves, y)
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_formatter(NullFormatter())
            panel.grid(alpha=0.25, linewidth=0.6)
            panel.spines[["top", "right"]].set_visible(False)
    methods = [method for method in METHODS if method in shown]
    drawing.legend(
        [shown[method] for method in methods],
        [METHODS[method][0] for method in methods],
        loc="outside upper center",
        ncols=len(METHODS),
        frameon=False,
    )
    return drawing


def _draw(panel: Any, seeds: Sequence[Mapping[str, list[float]]], x: str, y: str, colour: str):
    """A method's line and band; all seeds that did not diverge have the same epochs."""
    across = [statistics.median(values) for values in zip(*(s[x] for s in seeds), strict=True)]
    rows = list(zip(*(seed[y] for seed in seeds), strict=True))
    few = "o" if len(across) < 15 else None
    (line,) = panel.plot(
        across, [statistics.median(row) for row in rows], color=colour, marker=few, markersize=3
    )
    panel.fill_between(across, [*map(min, rows)], [*map(max, rows)], color=colour, alpha=0.2, lw=0)
    return line


def _cut(panel: Any, curves: Mapping[str, Sequence[Mapping[str, list[float]]]], y: str) -> None:
    """Leaves the fall of the first epoch out of the panel, which would flatten all the rest."""
    after = [value for seeds in curves.values() for seed in seeds for value in seed[y][1:]]
    if after:
        panel.set_ylim(min(after) / 1.05, 1.1 * _quantile(after, 0.95))


def _quantile(values: list[float], share: float) -> float:
    return sorted(values)[round(share * (len(values) - 1))]
