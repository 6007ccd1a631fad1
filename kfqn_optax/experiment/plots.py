"""Figures of one run and of several, and a table of their numbers.

The comparison is the figure of the K-BFGS paper: the training loss against epochs and against
seconds, on a logarithmic axis. Figures are made without matplotlib's global state, so they can be
drawn in the middle of a training run and from any thread.

A run here is anything with the attributes `folder`, `config` and `metrics` of `workdir.Run`.
"""

import io
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, ScalarFormatter
from rich.console import Console
from rich.table import Table

from kfqn_optax.experiment.atomic import replace

# Okabe and Ito's colours, which people with any colour vision can tell apart; yellow left out.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_GREY = "#555555"
_NAMES = {
    "kbfgs": "K-BFGS",
    "kbfgs_l": "K-BFGS(L)",
    "kfqn": "KF-QN",
    "adam": "Adam",
    "sgdm": "SGD with momentum",
    "rmsprop": "RMSprop",
    "muon": "Muon",
}


def label(config: dict[str, Any]) -> str:
    """Returns a run's name in legends.

    >>> label({"optimizer": "adam", "learning_rate": 0.001})
    'Adam, lr 0.001'
    >>> label({"optimizer": "kbfgs", "learning_rate": 0.3, "damping": 0.1})
    'K-BFGS, lr 0.3, damping 0.1'
    """
    optimizer = config["optimizer"]
    text = f"{_NAMES.get(optimizer, optimizer)}, lr {config['learning_rate']:g}"
    if optimizer in ("kbfgs", "kbfgs_l", "kfqn"):
        text += f", damping {config['damping']:g}"
    return text + (", NNX" if config.get("framework") == "nnx" else "")


def labels(runs: Sequence[Any]) -> list[str]:
    """Returns one name a run, no two alike: those that would be are followed by their folder."""
    names = [label(run.config) for run in runs]
    count = Counter(names)
    return [
        f"{name} ({run.folder})" if count[name] > 1 else name
        for name, run in zip(names, runs, strict=True)
    ]


def losses_figure(run: Any) -> Figure:
    """Draws one run: train and test loss against epoch and against seconds."""
    figure, panels = _two_panels(f"{run.config['problem']}: {label(run.config)}")
    _draw(panels, run, _COLOURS[0], "train", "test")
    panels[0].legend(frameon=False)
    return figure


def compare_figure(runs: Sequence[Any]) -> Figure:
    """Draws several runs of one problem: train loss (test dashed) against epoch and seconds."""
    figure, panels = _two_panels(f"{runs[0].config['problem']}: training loss (dashed: test)")
    for number, (run, name) in enumerate(zip(runs, labels(runs), strict=True)):
        _draw(panels, run, _COLOURS[number % len(_COLOURS)], name, None)
    columns = min(len(runs), 3)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False)
    return figure


def save(figure: Figure, path: str | os.PathLike) -> None:
    """Writes a figure as PNG in one stroke: a reader sees the old file or the new, whole."""
    image = io.BytesIO()
    figure.savefig(image, format="png")
    replace(Path(path), image.getvalue())


def loss_at(run: Any, seconds: float) -> float:
    """Returns the train loss at a moment, the logarithm interpolated between epochs.

    Args:
        run: a run.
        seconds: of training; beyond the end of the run the last loss is returned.
    """
    times = [record["seconds"] for record in run.metrics]
    losses = [record["train_loss"] for record in run.metrics]
    return float(np.exp(np.interp(seconds, times, np.log(losses))))


def table(runs: Sequence[Any]) -> str:
    """Returns a table of the runs' last and best numbers, as text for a terminal or a file.

    One column gives the train loss of all runs at the same moment: the end of the run that
    trained for the fewest seconds.
    """
    common = min(run.metrics[-1]["seconds"] for run in runs)
    classified = "test_accuracy" in runs[0].metrics[-1]
    measure, digits = ("accuracy", 4) if classified else ("mse", 5)
    columns = ("run", "epochs", "seconds", "train loss", "test loss", "best test")
    content = Table(title=f"{runs[0].config['problem']}: losses at the end of each run")
    for name in (*columns, f"test {measure}", f"train at {common:.1f} s"):
        content.add_column(name, justify="left" if name == "run" else "right")
    for run, name in zip(runs, labels(runs), strict=True):
        last = run.metrics[-1]
        content.add_row(
            name,
            str(last["epoch"]),
            f"{last['seconds']:.1f}",
            f"{last['train_loss']:.3f}",
            f"{last['test_loss']:.3f}",
            f"{min(record['test_loss'] for record in run.metrics):.3f}",
            f"{last[f'test_{measure}']:.{digits}f}",
            f"{loss_at(run, common):.3f}",
        )
    text = io.StringIO()
    Console(file=text, width=200, color_system=None).print(content)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def _two_panels(title: str) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(10, 4.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, axis_name in zip(panels, ("epoch", "seconds of training"), strict=True):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(axis_name)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=_GREY)
    panels[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set_ylabel("loss")
    return figure, panels


def _draw(
    panels: Sequence[Axes], run: Any, colour: str, train_name: str, test_name: str | None
) -> None:
    series = {name: [record[name] for record in run.metrics] for name in run.metrics[0]}
    few = len(run.metrics) <= 12
    for axes, key in zip(panels, ("epoch", "seconds"), strict=True):
        for loss, name, style, width in (
            ("train_loss", train_name, "-", 1.8),
            ("test_loss", test_name, "--", 1.1),
        ):
            axes.plot(
                series[key],
                series[loss],
                style,
                color=colour,
                linewidth=width,
                marker="o" if few else None,
                markersize=3,
                label=name,
            )
