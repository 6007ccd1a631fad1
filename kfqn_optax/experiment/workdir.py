"""The files of one run, in a folder of its own.

    config.json     the config, as run
    run.json        sizes, versions, compile seconds
    metrics.jsonl   one line an epoch, epoch 0 (before training) included
    events.out.*    the same for TensorBoard, and the loss of every batch
    losses.png      the loss so far
    summary.txt     who updates which parameter (kbfgs and its kin)

A folder holds one run or none: writing never mixes two.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict
from tensorboardX import SummaryWriter

from kfqn_optax.experiment import plots

_COMMON = ("epoch", "step", "seconds", "train_loss", "test_loss")
METRICS = (*_COMMON, "train_mse", "test_mse")
CLASSIFIER_METRICS = (*_COMMON, "train_accuracy", "test_accuracy")


class RunError(ValueError):
    """A folder that does not hold what is asked of it; the message is a sentence."""


class Run(NamedTuple):
    """What a finished or broken-off run left.

    Attributes:
        folder: where it was read from.
        config: its config as a plain dict.
        metrics: one dict an epoch, in order, with the keys `METRICS` or `CLASSIFIER_METRICS`.
        cut_off: whether the last line of its metrics was incomplete and left out.
    """

    folder: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    cut_off: bool = False


def metric_names(record: Mapping[str, Any]) -> tuple[str, ...]:
    """The keys that an epoch's record has, or ought to have, in order."""
    return CLASSIFIER_METRICS if "train_accuracy" in record else METRICS


def refuse_taken(folder: str | os.PathLike) -> None:
    """Raises `FileExistsError` if the folder holds a run, finished or not, or is a file."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"workdir {folder} is a file; give the name of a folder.")
    for name in ("config.json", "metrics.jsonl"):
        if (folder / name).exists():
            raise FileExistsError(
                f"workdir {folder} already holds a run ({name}); "
                "give another folder, or move this one away."
            )


class Recorder:
    """Writes the files of one run as it goes; use it as a context manager.

    Every epoch is on disk when `epoch` returns, so a run that breaks off keeps what it had.
    """

    def __init__(self, folder: str | os.PathLike, config: ConfigDict):
        """Claims the folder for a run.

        Raises:
            FileExistsError: the folder already holds a run.
        """
        refuse_taken(folder)
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.text("config.json", json.dumps(config.to_dict(), indent=2) + "\n")
        self._run = Run(self.folder, config.to_dict(), [])
        self._events = SummaryWriter(logdir=str(self.folder), write_to_disk=True)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_) -> None:
        self._events.close()

    def text(self, name: str, content: str) -> None:
        """Writes a text file of the run."""
        (self.folder / name).write_text(content, encoding="utf-8")

    def epoch(self, metrics: Mapping[str, Any], batch_losses: list[float]) -> None:
        """Writes one epoch everywhere: metrics, events, figure.

        Args:
            metrics: a value for each of `METRICS` or of `CLASSIFIER_METRICS`.
            batch_losses: the losses of the epoch's batches, the last of step `metrics["step"]`.
        """
        line = {name: metrics[name] for name in metric_names(metrics)}
        self._run.metrics.append(line)
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

        step = metrics["step"]
        for name in list(line)[2:]:
            self._events.add_scalar(name, line[name], step)
        for back, loss in enumerate(reversed(batch_losses)):
            self._events.add_scalar("batch_loss", loss, step - back)
        self._events.flush()

        plots.save(plots.losses_figure(self._run), self.folder / "losses.png")


def read_run(folder: str | os.PathLike) -> Run:
    """Reads a run back.

    Raises:
        RunError: the folder is missing, holds no run, or holds one that cannot be read; the message
            names the file and the line.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RunError(f"{folder} is not a folder; give the workdir of a run of kfqn-train.")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise RunError(
            f"{folder} has no {Path(error.filename).name}; give the workdir of a run of kfqn-train "
            "that has passed its first evaluation."
        ) from None
    except json.JSONDecodeError as error:
        raise RunError(f"{folder / 'config.json'} is not valid JSON ({error}).") from None
    metrics, cut_off = [], False
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            metrics.append({name: record[name] for name in metric_names(record)})
        except json.JSONDecodeError:
            if number < len(lines):
                raise RunError(
                    f"line {number} of {folder / 'metrics.jsonl'} is not valid JSON; "
                    "mend it or delete it."
                ) from None
            cut_off = True
        except (KeyError, TypeError):
            raise RunError(
                f"line {number} of {folder / 'metrics.jsonl'} is not a record with the keys "
                f"{', '.join(METRICS)}; was it written by kfqn-train?"
            ) from None
    if not metrics:
        raise RunError(f"{folder / 'metrics.jsonl'} holds no complete line, so nothing to compare.")
    return Run(folder, config, metrics, cut_off)
