"""What a person sees while a run goes on, on standard error.

In a terminal: a bar over all steps with the running loss and the time left, and above it one line
an epoch. Elsewhere (a file, a log): the lines alone.
"""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Display:
    """The progress of one run; use it as a context manager.

    Args:
        steps: the number of steps of the whole run.
        epochs: the number of epochs of the whole run.
        console: where to write; standard error if left out.
    """

    def __init__(self, steps: int, epochs: int, console: Console | None = None):
        self._console = console or Console(stderr=True, highlight=False)
        self._epochs = epochs
        self._loss = "-"
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            refresh_per_second=4,
            speed_estimate_period=300.0,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=steps, loss=self._loss, start=False)

    def __enter__(self) -> "Display":
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def say(self, line: str) -> None:
        """Writes one line."""
        self._console.print(line, soft_wrap=True, markup=False)

    def step(self, number: int, loss: float | None) -> None:
        """Shows that a step was started, with the last loss known, if any."""
        if not self._bar.tasks[0].started:
            self._bar.start_task(self._task)
        self._loss = self._loss if loss is None else f"{loss:.4g}"
        self._bar.update(self._task, completed=number, loss=self._loss)

    def epoch(self, metrics: Mapping[str, Any]) -> None:
        """Writes the line of an epoch that is over."""
        running = min(metrics["epoch"] + 1, self._epochs)
        self._bar.update(self._task, description=f"epoch {running}/{self._epochs}")
        line = (
            f"epoch {metrics['epoch']:>3}/{self._epochs}  step {metrics['step']:>5}  "
            f"{metrics['seconds']:8.1f} s  train loss {metrics['train_loss']:10.4f}  "
            f"test loss {metrics['test_loss']:10.4f}"
        )
        if "test_accuracy" in metrics:
            line += f"  test accuracy {metrics['test_accuracy']:.4f}"
        self.say(line)
