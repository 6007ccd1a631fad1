"""SIGTERM and Ctrl-C: the running step is finished, and a checkpoint written, before a run ends."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """A signal ended the run; the message is a sentence.

    Attributes:
        status: the exit status that shells know such an end by: 128 and the signal's number.
    """

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.status = 128 + signum


class StopRequest:
    """Takes the two signals while it is open; use it as a context manager.

    Until `defer` is called a signal raises `Stopped` where it arrives, later ones are remembered,
    to be asked for between two steps. The same signal a second time does what it did before, which
    ends the process at once. A signal that whoever started the process had it ignore stays ignored,
    as Ctrl-C is in a background job. Signals reach the main thread; in another one none is taken.

    Attributes:
        signum: the signal that came, if any.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._deferred = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for signum in _SIGNALS:
                if signal.getsignal(signum) != signal.SIG_IGN:
                    self._before[signum] = signal.signal(signum, self._take)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def defer(self) -> None:
        """From here on, signals are remembered."""
        self._deferred = True

    def stopped(self, message: str) -> Stopped:
        """Returns the exception for the signal that came, with what became of the run."""
        assert self.signum is not None
        return Stopped(self.signum, f"stopped by {signal.Signals(self.signum).name} {message}")

    def _take(self, signum: int, frame: FrameType | None) -> None:
        del frame
        self.signum = signum
        signal.signal(signum, self._before[signum])
        if not self._deferred:
            raise self.stopped("before the first step, so nothing is lost; run it again.")
