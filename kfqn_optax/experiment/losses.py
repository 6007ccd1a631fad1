"""The losses of steps, looked at one by one, and refused when they are no numbers any more."""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import jax

_ADVICE = (
    "Training stopped; the epochs before are kept, and the same command stops here again. In "
    "another workdir, try a smaller learning_rate or, with kbfgs and its kin, a norm_constraint "
    "(3, say) or a larger damping."
)


class NonFiniteLoss(ArithmeticError):
    """Training went to infinity or NaN; the message names the step."""


class LaggedLosses:
    """The losses of consecutive steps, fetched a few steps late so that the device never waits.

    Args:
        first_step: the number of the first step.
        values: the losses of the first steps, if they are known already.
        before: what the loss was before them, in words, for the message.

    Attributes:
        values: the losses fetched so far.
        last_step: the number of the last step added.
    """

    LAG = 4

    def __init__(self, first_step: int, values: Sequence[float] = (), before: str = "unknown"):
        self._before = before
        self.values = list(values)
        self.last_step = first_step - 1 + len(self.values)
        self._pending: deque[jax.Array] = deque()

    @property
    def latest(self) -> float | None:
        """The last loss known."""
        return self.values[-1] if self.values else None

    def add(self, loss: jax.Array) -> None:
        """Takes the loss of the next step and looks at the one `LAG` steps before."""
        self.last_step += 1
        self._pending.append(loss)
        if len(self._pending) > self.LAG:
            self._fetch()

    def fetch_all(self) -> None:
        """Looks at all losses not yet looked at."""
        while self._pending:
            self._fetch()

    def _fetch(self) -> None:
        step = self.last_step - len(self._pending) + 1
        loss = float(self._pending.popleft())
        if not math.isfinite(loss):
            last = f"{self.latest:.6g} at step {step - 1}, " if self.values else ""
            raise NonFiniteLoss(
                f"the training loss at step {step} is {loss}; it was {last}{self._before}. "
                f"{_ADVICE}"
            )
        self.values.append(loss)


def before(history: Sequence[Mapping[str, Any]], name: str = "train_loss") -> str:
    """What a loss was after the last epoch of a run, in words."""
    last = history[-1]
    when = f"after epoch {last['epoch']}" if last["epoch"] else "before epoch 1"
    return f"{last[name]:.6g} {when}"


def refuse_non_finite(metrics: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> None:
    """Catches what the last step of an epoch did, which no later batch has seen.

    Args:
        metrics: of the epoch.
        history: of those before.
    """
    for name in ("train_loss", "test_loss"):
        if math.isfinite(metrics[name]):
            continue
        found = f"the {name} after step {metrics['step']} is {metrics[name]}; "
        if not history:
            raise NonFiniteLoss(
                f"{found}no step has been taken, so look for numbers in the examples that are not "
                "finite, or too large."
            )
        raise NonFiniteLoss(f"{found}it was {before(history, name)}. {_ADVICE}")
