"""Event files for TensorBoard, on disk when a call returns.

The usual writer of tensorboardX hands events to a thread through a queue, and its `flush` does not
wait for that: what a kill finds there is lost. Here each event is written where it arises.
"""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2
from tensorboardX.summary import scalar

_PROTOS: Any = event_pb2  # generated code, its names unknown to type checkers


class Events:
    """One new event file in a folder.

    Args:
        folder: may hold event files, of the same run before a kill.
        restart: TensorBoard hides what those hold from this step on. None: they hold nothing.
    """

    def __init__(self, folder: Path, restart: int | None = None):
        older = len(list(folder.glob("events.out.tfevents.*")))
        # The name has the second in it, and two starts may fall into one.
        self._writer = EventsWriter(str(folder / "events"), f".{older:04d}" if older else "")
        if restart is not None:
            log = _PROTOS.SessionLog(status=_PROTOS.SessionLog.START)
            self._write(restart, session_log=log)
        self._writer.flush()

    def add(self, scalars: Iterable[tuple[str, float, int]]) -> None:
        """Writes numbers, each with its name and its step."""
        for name, value, step in scalars:
            self._write(step, summary=scalar(name, value))
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()

    def _write(self, step: int, **content: Any) -> None:
        self._writer.write_event(_PROTOS.Event(wall_time=time.time(), step=step, **content))
