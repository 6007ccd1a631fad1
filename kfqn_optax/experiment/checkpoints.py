"""Checkpoints: where a run goes on after a kill. Written through Orbax, read with suspicion.

    checkpoints/00000120/         one checkpoint, a folder of Orbax: the arrays of the training
                                  state, and as custom metadata what run it is of (`fingerprint`)
                                  and how far that run was (`Position`)
    checkpoints/00000120.sha256   the sums of its files (`sums`)

The sums are written last, so a checkpoint exists once they do; a kill before leaves something that
is passed over. They are looked at before Orbax is given anything, because a checkpoint may be cut
short, and anyone may have put it there. Such sums do not make it ours, so it is believed in
nothing: its files must be plain files of no more bytes than this run's state needs, and the arrays
that Orbax finds in it must have the shapes and dtypes of this run before one of them is read. JSON
and plain numbers are all that is ever read; nothing is unpickled.

Saving waits until everything is on disk. It costs a few tenths of a second; writing in the
background would take its time from the steps, where the clock runs.
"""

import contextlib
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kfqn_optax.experiment import sums
from kfqn_optax.experiment.fingerprint import mismatch
from kfqn_optax.experiment.leaves import from_arrays, outlines, to_arrays
from kfqn_optax.experiment.optimizers import Config
from kfqn_optax.experiment.steps import TrainState
from kfqn_optax.experiment.sums import Refused
from kfqn_optax.experiment.workdir import CHECKPOINTS, RunError, metric_names

_STATE = "state"
_LONGEST = 1 << 28  # bytes of everything in a checkpoint that is not an array
_NAME = re.compile(r"(\d{8,})(\.sha256|\.orbax-checkpoint-tmp.*)?")


class Position(NamedTuple):
    """How far a run is.

    Attributes:
        epoch: the number of epochs that are over, evaluation included.
        batch: the number of steps taken in the epoch after.
        seconds: on the clock of the metrics.
        losses: the losses of those steps.
        history: the metrics of the epochs that are over, epoch 0 first.
    """

    epoch: int
    batch: int
    seconds: float
    losses: list[float]
    history: list[dict[str, Any]]


class Checkpoints:
    """The checkpoints of one run; a context manager that keeps other processes out.

    Args:
        workdir: the run's folder.
        facts: the run's `fingerprint`.
        config: the run's config.
    """

    def __init__(self, workdir: str | os.PathLike, facts: Mapping[str, Any], config: Config):
        self._workdir = Path(workdir)
        self._folder = self._workdir.absolute() / CHECKPOINTS
        self._facts = facts
        self._config = config
        self._steps: list[int] = []  # those that pruning may count on, oldest first
        self._lock: int | None = None

    def __enter__(self) -> "Checkpoints":
        self._folder.parent.mkdir(parents=True, exist_ok=True)
        if self._folder.is_symlink():
            raise RunError(
                f"{self._folder} is a link; checkpoints are written into the workdir only. "
                "Put a folder there, or give another workdir."
            )
        self._folder.mkdir(exist_ok=True)
        self._lock = _lock(self._folder)
        if self._lock is None:
            raise RunError(
                f"a run is going on in workdir {self._workdir}; wait until it ends, or give "
                "another folder."
            )
        return self

    def __exit__(self, *_) -> None:
        if self._lock is not None:
            os.close(self._lock)

    def save(self, state: TrainState, position: Position, steps_per_epoch: int) -> None:
        """Writes a checkpoint, then removes those that are not to be kept, and what kills left.

        Raises:
            RunError: it could not be written.
        """
        from orbax.checkpoint import v1 as ocp

        step = position.epoch * steps_per_epoch + position.batch
        path = self._folder / f"{step:08d}"
        self._remove(path.name)
        about = {**self._facts, "position": position._asdict()}
        context = ocp.Context()
        context.array.saving.use_compression = False  # the numbers of a state do not compress
        try:
            with context, _no_tracebacks():
                ocp.save(
                    str(path), to_arrays(state), checkpointable_name=_STATE, custom_metadata=about
                )
            sums.write(path)
        except Exception as error:  # whatever went wrong below Orbax
            raise RunError(
                f"the checkpoint {path} could not be written: {_first_line(error)}; training "
                "stopped. When that is mended, the same command goes on from the checkpoint before."
            ) from error
        self._steps = [*(other for other in self._steps if other < step), step]
        keep = {f"{kept:08d}" for kept in self._steps[-self._config.keep_checkpoints :]}
        for name in {match[1] for match in self._entries()} - keep:
            self._remove(name)

    def newest(
        self, template: TrainState, steps_per_epoch: int, say: Callable[[str], None]
    ) -> tuple[TrainState, Position] | None:
        """Returns state and position of the newest checkpoint that is sound and of this run.

        Args:
            template: any state of this run.
            steps_per_epoch: of this run.
            say: is told of every newer one that is passed over.

        Returns:
            None if there is no finished checkpoint at all.

        Raises:
            RunError: there are some, and none can be used; the message says why, one by one.
        """
        steps = sorted({int(match[1]) for match in self._entries() if match[2] is None})
        refused = []
        for step in reversed(steps):
            path = self._folder / f"{step:08d}"
            if not os.path.lexists(sums.path_of(path)):
                say(f"checkpoint {path} was not finished, so it is passed over.")
                continue
            try:
                found = self._read(path, template, steps_per_epoch)
            except Refused as error:
                refused.append(f"checkpoint {path} {error}.")
                say(refused[-1])
                continue
            self._steps = [other for other in steps if other <= step]
            return found
        if refused:
            raise RunError(
                f"no checkpoint of workdir {self._workdir} can be used: {' '.join(refused)} Put "
                "right what they name, or give another folder to begin anew."
            )
        return None

    def _read(
        self, path: Path, template: TrainState, steps_per_epoch: int
    ) -> tuple[TrainState, Position]:
        from orbax.checkpoint import v1 as ocp

        expected = outlines(template)
        needed = sum(array.nbytes for array in expected.values())
        sums.verify(path, most_bytes=2 * needed + _LONGEST)
        with _reading():
            metadata = ocp.metadata(str(path), checkpointable_name=_STATE)
        about: Any = metadata.custom_metadata
        if why := mismatch(about, self._facts, self._config):
            raise Refused(why)
        position = _position(about.get("position"), int(path.name), steps_per_epoch)
        with _reading():
            shapes = _shapes(metadata.metadata)
        if shapes != _shapes(expected):
            raise Refused("says one thing of its arrays and holds another")
        with _reading():
            arrays = ocp.load(str(path), expected, checkpointable_name=_STATE)
        return from_arrays(template, arrays), position

    def _entries(self) -> list[re.Match[str]]:
        """What here has a name of ours: checkpoints, sums, what a kill left unfinished."""
        found = [match for match in map(_NAME.fullmatch, os.listdir(self._folder)) if match]
        return [match for match in found if match[1] == f"{int(match[1]):08d}"]

    def _remove(self, name: str) -> None:
        """Removes a checkpoint, its sums first, so that no half of it can be taken for one."""
        sums.path_of(self._folder / name).unlink(missing_ok=True)
        for match in self._entries():
            path = self._folder / match[0]
            if match[1] != name:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _shapes(arrays: Any) -> dict[str, tuple[Any, ...]]:
    """Shape, dtype, and the shape of the parts that Orbax decodes at a time, by name."""

    def shapes(array: Any) -> tuple[Any, ...]:
        stored = getattr(array, "storage_metadata", None)
        chunk = array.shape if stored is None else stored.chunk_shape
        return tuple(array.shape), np.dtype(array.dtype).name, tuple(chunk)

    return {name: shapes(array) for name, array in arrays.items()}


def _position(found: Any, step: int, steps_per_epoch: int) -> Position:
    """The position in a checkpoint's metadata, every value of it checked."""
    try:
        position = Position(**found)
        epochs = [record["epoch"] for record in position.history]
        numbers = [position.seconds, *position.losses]
        for record in position.history:
            numbers += [record[name] for name in metric_names(record)]
        if (
            type(position.epoch) is type(position.batch) is int
            and 0 <= position.batch < steps_per_epoch
            and position.epoch * steps_per_epoch + position.batch == step
            and epochs == list(range(position.epoch + 1))
            and len(position.losses) == position.batch
            and all(type(number) in (int, float) and math.isfinite(number) for number in numbers)
        ):
            return position
    except (KeyError, TypeError, AttributeError, OverflowError):
        pass  # a value of another kind
    raise Refused("does not say how far its run was")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


@contextlib.contextmanager
def _no_tracebacks() -> Iterator[None]:
    """What fails in Orbax's threads is raised in ours too, where it becomes a sentence."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """What Orbax raises over a checkpoint, of which there is no list, refuses it."""
    try:
        with _no_tracebacks():
            yield
    except Exception as error:
        raise Refused(f"cannot be read by Orbax: {_first_line(error)}") from error


def _lock(folder: Path) -> int | None:
    """Locks a folder until the process ends or what is returned is closed; None: it is taken."""
    import fcntl  # not on Windows, where config.checkpoint_every must be 0

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor
