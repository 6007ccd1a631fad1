"""A run from its first evaluation to its last: the loop over epochs, its clock, its checkpoints."""

import dataclasses
import itertools
import time
from collections.abc import Callable
from typing import Any

import jax

import kfqn_optax as kfqn
from kfqn_optax.experiment.checkpoints import Checkpoints, Position
from kfqn_optax.experiment.devices import Devices
from kfqn_optax.experiment.losses import LaggedLosses, before, refuse_non_finite
from kfqn_optax.experiment.optimizers import Config, Optimizer
from kfqn_optax.experiment.problems import Batch, Problem
from kfqn_optax.experiment.progress import Display
from kfqn_optax.experiment.steps import TrainState, count, epoch_batches, warm_start
from kfqn_optax.experiment.stop import Stopped, StopRequest
from kfqn_optax.experiment.workdir import PAIRS, Recorder


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run works with from its first evaluation to its last."""

    config: Config
    devices: Devices
    examples: Batch
    steps: int
    learns_pairs: bool
    measure: Callable[..., dict[str, float]]
    recorder: Recorder
    display: Display
    checkpoints: Checkpoints | None
    stop: StopRequest

    def begin(
        self, problem: Problem, optimizer: Optimizer, state: TrainState
    ) -> tuple[TrainState, Position, float]:
        """Measures before training and takes the warm start, if there is one.

        Returns:
            State and position before the first step, and the seconds of compilation.
        """
        config = self.config
        position = self.measured(0, state, Position(0, 0, seconds=0.0, losses=[], history=[]))
        if not (optimizer.warm_starts and config.warm_start):
            return state, position, 0.0
        params, opt_state, model_state, key = state
        opt_state, seconds, compile_seconds = warm_start(
            opt_state,
            problem,
            params,
            self.examples,
            config.batch_size,
            model_state,
            config.microbatches,
            self.devices,
            key,
        )
        position = Position(0, 0, seconds, losses=[], history=position.history)
        return TrainState(params, opt_state, model_state, key), position, compile_seconds

    def train(
        self, step: Callable[..., Any], state: TrainState, position: Position
    ) -> list[dict[str, Any]]:
        """Takes all steps that are left and returns the metrics of the whole run."""
        config = self.config
        while position.epoch < config.epochs:
            order = epoch_batches(
                config.seed, position.epoch + 1, count(self.examples), config.batch_size
            )
            losses = LaggedLosses(
                position.epoch * self.steps + 1, position.losses, before(position.history)
            )
            start = time.perf_counter()
            for batch in itertools.islice(order, position.batch, None):
                state, loss = step(state, self.examples, batch)
                losses.add(loss)
                self.display.step(losses.last_step, losses.latest)
                if self._is_due(losses.last_step) or self.stop.signum is not None:
                    break
            losses.fetch_all()
            jax.block_until_ready(state)
            position = Position(
                epoch=position.epoch,
                batch=len(losses.values),
                seconds=position.seconds + time.perf_counter() - start,
                losses=losses.values,
                history=position.history,
            )
            if position.batch == self.steps:
                position = self.measured(position.epoch + 1, state, position)
            # Asked once: a signal from here on waits for the next step and its checkpoint.
            stopping, ended = self.stop.signum is not None, position.epoch == config.epochs
            if stopping or ended or self._is_due(losses.last_step):
                self.save(state, position)
            if stopping and not ended:
                raise self._stopped(losses.last_step)
        return position.history

    def measured(self, epoch: int, state: TrainState, position: Position) -> Position:
        """Measures at the end of an epoch, writes that down, and returns where the run is then."""
        metrics = {"epoch": epoch, "step": epoch * self.steps, "seconds": position.seconds}
        metrics |= self.measure(state.params, state.model_state)
        refuse_non_finite(metrics, position.history)
        if self.learns_pairs:
            totals = kfqn.health(state.opt_state).totals()
            metrics |= {name: totals[name.removeprefix("pairs_")] for name in PAIRS}
        self.recorder.epoch(metrics, position.losses)
        self.display.epoch(metrics)
        return Position(epoch, 0, position.seconds, [], [*position.history, metrics])

    def save(self, state: TrainState, position: Position) -> None:
        """Writes a checkpoint, if the config wants any."""
        if self.checkpoints and self.config.checkpoint_every:
            self.checkpoints.save(state, position, self.steps)

    def _is_due(self, step: int) -> bool:
        every = self.config.checkpoint_every
        return every > 0 and step % every == 0

    def _stopped(self, step: int) -> Stopped:
        if self.config.checkpoint_every:
            return self.stop.stopped(
                f"after step {step}; a checkpoint is written, the same command goes on from it."
            )
        return self.stop.stopped(
            f"after step {step}; config.checkpoint_every is 0, so there is nothing to go on from."
        )
