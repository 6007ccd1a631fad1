"""The files of one run, in a folder of its own.

    config.json     the config, as run
    run.json        sizes, versions, compile seconds
    metrics.jsonl   one line an epoch, epoch 0 (before training) included
    events.out.*    the same for TensorBoard, and the loss of every batch
    losses.png      the loss so far
    summary.txt     who updates which parameter (kbfgs and its kin)
    checkpoints/    where to go on after a kill (see `checkpoints`)

A folder holds one run or none: writing never mixes two. A run that was broken off is continued by
writing these files anew, as they were at its checkpoint; what is there is not read for it, except
the config, and a file that turns out to be a link is replaced, not followed.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from kfqn_optax.experiment import plots
from kfqn_optax.experiment.atomic import replace
from kfqn_optax.experiment.config import differences
from kfqn_optax.experiment.events import Events

_COMMON = ("epoch", "step", "seconds", "train_loss", "test_loss")
METRICS = (*_COMMON, "train_mse", "test_mse")
CLASSIFIER_METRICS = (*_COMMON, "train_accuracy", "test_accuracy")
# What kbfgs and its kin add: curvature pairs by what became of them, see `kfqn.health`.
PAIRS = ("pairs_updated", "pairs_skipped", "pairs_not_finite", "pairs_reset", "pairs_powell_damped")
CHECKPOINTS = "checkpoints"
# What figures and tables show of a config.
_SHOWN = {
    "problem": str,
    "optimizer": str,
    "learning_rate": int | float,
    "damping": int | float,
}
_LONGEST_CONFIG = 1 << 20  # bytes; ours have 2000
_LONGEST_METRICS = 1 << 28  # a million epochs


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
    names = CLASSIFIER_METRICS if "train_accuracy" in record else METRICS
    return (*names, *PAIRS) if PAIRS[0] in record else names


def refuse_taken(folder: str | os.PathLike) -> None:
    """Raises `FileExistsError` if the folder holds a run, finished or not, or is a file."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"workdir {folder} is a file; give the name of a folder.")
    taken = [name for name in ("config.json", "metrics.jsonl") if os.path.lexists(folder / name)]
    checkpoints = folder / CHECKPOINTS
    if checkpoints.is_dir() and any(checkpoints.iterdir()):
        taken.append(CHECKPOINTS)
    if taken:
        raise FileExistsError(
            f"workdir {folder} already holds a run ({taken[0]}); "
            "give another folder, or move this one away."
        )


def continues(folder: str | os.PathLike, config: ConfigDict) -> bool:
    """Whether a run with this config goes on with what the folder holds.

    Returns:
        True if it holds a run of the same config that keeps checkpoints; False if it holds none.

    Raises:
        FileExistsError: the folder holds a run that this config does not continue; the message
            names the keys that differ.
        RunError: its config cannot be read.
    """
    folder = Path(folder)
    if not ((folder / "config.json").is_file() and os.path.lexists(folder / CHECKPOINTS)):
        refuse_taken(folder)
        return False
    differing = differences(_read_config(folder), config)
    if differing:
        raise FileExistsError(
            f"workdir {folder} holds a run of another config: {', '.join(differing)}; give the "
            "same values to continue it, or another folder to begin anew."
        )
    return True


def refuse_lost(folder: str | os.PathLike) -> None:
    """Raises `FileExistsError` if a run without a checkpoint was past its first evaluation.

    A run that was killed before its first checkpoint has one line of metrics at most and loses
    nothing by beginning again; one with more had checkpoints, which someone removed.
    """
    path = Path(folder) / "metrics.jsonl"
    if path.is_file():
        with open(path, "rb") as file:
            begun = file.read(1 << 16).count(b"\n") > 1
        if begun:
            raise FileExistsError(
                f"workdir {folder} holds a run whose checkpoints are gone; give another folder, "
                "or move this one away."
            )


class Recorder:
    """Writes the files of one run as it goes; use it as a context manager.

    Every epoch is on disk when `epoch` returns, so a run that breaks off keeps what it had.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        config: ConfigDict,
        history: Sequence[Mapping[str, Any]] | None = None,
    ):
        """Claims the folder for a run, or takes up the run that it holds.

        Args:
            folder: made if it is missing.
            config: the config, to be written down.
            history: None for a new run. For one that is continued, the metrics up to its
                checkpoint; what the files know beyond them is dropped, a half-written line too.

        Raises:
            FileExistsError: a run is there, and this is to be a new one.
        """
        if history is None:
            refuse_taken(folder)
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.text("config.json", json.dumps(config.to_dict(), indent=2) + "\n")
        self._run = Run(self.folder, config.to_dict(), [])
        if history is not None:
            lines = [{name: record[name] for name in metric_names(record)} for record in history]
            self._run.metrics.extend(lines)
            self.text("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        restart = history[-1]["step"] + 1 if history else 0
        self._events = Events(self.folder, None if history is None else restart)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_) -> None:
        self._events.close()

    def text(self, name: str, content: str) -> None:
        """Writes a text file of the run, whole or not at all."""
        replace(self.folder / name, content.encode())

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
        self._events.add((name, line[name], step) for name in list(line)[2:])
        first = step - len(batch_losses) + 1
        self._events.add(("batch_loss", x, first + i) for i, x in enumerate(batch_losses))
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
    config = _read_config(folder)
    lines = _read(folder, "metrics.jsonl", _LONGEST_METRICS).splitlines()
    metrics, cut_off = [], False
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            metrics.append({name: _number(record[name]) for name in metric_names(record)})
        except json.JSONDecodeError:
            if number < len(lines):
                raise RunError(
                    f"line {number} of {folder / 'metrics.jsonl'} is not valid JSON; "
                    "mend it or delete it."
                ) from None
            cut_off = True
        except (KeyError, TypeError, RecursionError):
            raise RunError(
                f"line {number} of {folder / 'metrics.jsonl'} is not a record with the keys "
                f"{', '.join(METRICS)}; was it written by kfqn-train?"
            ) from None
    if not metrics:
        raise RunError(f"{folder / 'metrics.jsonl'} holds no complete line, so nothing to compare.")
    return Run(folder, config, metrics, cut_off)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError
    return value


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads(_read(folder, "config.json", _LONGEST_CONFIG))
    except (json.JSONDecodeError, RecursionError) as error:
        raise RunError(f"{folder / 'config.json'} is not valid JSON ({error}).") from None
    for name, kind in _SHOWN.items():
        if not isinstance(config, dict) or not isinstance(config.get(name), kind):
            raise RunError(
                f"{folder / 'config.json'} is not a config: it has no {name} of the right type; "
                "was it written by kfqn-train?"
            )
    return config


def _read(folder: Path, name: str, longest: int) -> str:
    """A text file of a run that may be anyone's, its size looked at before it is read."""
    try:
        size = (folder / name).stat().st_size
        if size > longest:
            raise RunError(
                f"{folder / name} has {size} bytes, more than kfqn-train ever writes ({longest}); "
                "it is not read."
            )
        return (folder / name).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise RunError(
            f"{folder} has no {name}; give the workdir of a run of kfqn-train "
            "that has passed its first evaluation."
        ) from error
    except UnicodeDecodeError as error:
        raise RunError(f"{folder / name} is not a text file ({error}).") from None
