"""Training: a loop over epochs, with an honest clock.

Everything is compiled before the clock starts, and the clock runs only while steps (or the warm
start) do: not during compilation, evaluation or plotting.
"""

import json
import math
import os
import platform
import time
from collections import deque
from typing import Any

import jax
import numpy as np

import kfqn_optax as kfqn
from kfqn_optax.experiment import datasets
from kfqn_optax.experiment.config import ConfigError, check
from kfqn_optax.experiment.optimizers import Config, make_optimizer
from kfqn_optax.experiment.plots import label
from kfqn_optax.experiment.problems import Batch, Params, Problem, make_problem
from kfqn_optax.experiment.progress import Display
from kfqn_optax.experiment.steps import (
    TrainState,
    compile_step,
    count,
    epoch_batches,
    make_evaluate,
    take,
    warm_start,
)
from kfqn_optax.experiment.workdir import Recorder, refuse_taken

_ADVICE = (
    "training stopped, the epochs before are kept. "
    "Try a smaller learning_rate or, with kbfgs, a larger damping."
)


class NonFiniteLoss(ArithmeticError):
    """Training went to infinity or NaN; the message names the step."""


def train(config: Config, workdir: str | os.PathLike, dataset: Any = None) -> list[dict]:
    """Trains as a config says and writes the run's files (see `workdir`).

    Losses in the metrics are means over the whole train or test set, the loss of an image summed
    over its pixels, of a text averaged over its places, plus weight_decay/2 |w|^2: the number that
    the authors of K-BFGS print. The optimizer itself is given the data loss and the weight decay
    apart. Mean squared errors are averages over images and pixels. `seconds` counts the warm start
    and the steps.

    Args:
        config: see `config.KEYS`.
        workdir: a folder that holds no run yet; made if it is missing.
        dataset: the examples, with the attributes of `datasets.load`'s result; loaded if left out.

    Returns:
        The metrics, one dict an epoch, epoch 0 (before training) first.

    Raises:
        ConfigError: the config cannot be run, alone or with these examples.
        FileExistsError: `workdir` holds a run.
        NonFiniteLoss: a loss was not finite. The files of the epochs before are kept.
    """
    check(config)
    refuse_taken(workdir)
    problem = make_problem(config)
    if dataset is None:
        dataset = load_dataset(config)
    _check_fit(config, problem, dataset)

    examples, test_examples = _on_device(dataset.train), _on_device(dataset.test)
    params, model_state = problem.init(config.seed)
    optimizer = make_optimizer(
        config, lambda: problem.layers(params, take(examples, slice(2)), model_state)
    )
    opt_state = optimizer.transformation.init(params)
    measure = make_evaluate(
        problem,
        examples,
        test_examples,
        weight_decay=config.weight_decay,
        batch_size=config.eval_batch_size,
    )
    facts = _facts(dataset, params, config.batch_size)
    steps = facts["steps_per_epoch"]
    history = []

    with (
        Recorder(workdir, config) as recorder,
        Display(config.epochs * steps, config.epochs) as display,
    ):

        def finish(epoch: int, seconds: float, state: TrainState, losses: list[float]) -> None:
            metrics = {"epoch": epoch, "step": epoch * steps, "seconds": seconds}
            metrics |= measure(state.params, state.model_state)
            _refuse_non_finite(metrics)
            recorder.epoch(metrics, losses)
            display.epoch(metrics)
            history.append(metrics)

        display.say(_opening(config, problem, dataset, facts))
        if optimizer.takes_curvature:
            recorder.text("summary.txt", str(kfqn.summary(opt_state, params)).rstrip() + "\n")
        state = TrainState(params, opt_state, model_state)
        finish(0, 0.0, state, [])

        seconds, compile_seconds = 0.0, 0.0
        if optimizer.warm_starts and config.warm_start:
            opt_state, seconds, compile_seconds = warm_start(
                opt_state, problem, params, examples, config.batch_size, model_state
            )
            state = TrainState(params, opt_state, model_state)
        start = time.perf_counter()
        step = compile_step(problem, optimizer, config, state, examples)
        compile_seconds += time.perf_counter() - start
        display.say(f"compiled in {compile_seconds:.1f} s")
        facts["compile_seconds"] = compile_seconds
        recorder.text("run.json", json.dumps(facts, indent=2) + "\n")

        for epoch in range(1, config.epochs + 1):
            losses = LaggedLosses(first_step=(epoch - 1) * steps + 1)
            start = time.perf_counter()
            for batch in epoch_batches(config.seed, epoch, count(examples), config.batch_size):
                state, loss = step(state, examples, batch)
                losses.add(loss)
                display.step(losses.last_step, losses.latest)
            losses.fetch_all()
            jax.block_until_ready(state)
            seconds += time.perf_counter() - start
            finish(epoch, seconds, state, losses.values)
    return history


def load_dataset(config: Config) -> Any:
    """Returns the data that a config asks for."""
    return datasets.load(
        config.problem,
        config.data_dir,
        train_examples=config.train_examples or None,
        download=config.download,
    )


class LaggedLosses:
    """The losses of consecutive steps, fetched a few steps late so that the device never waits.

    Attributes:
        values: the losses fetched so far.
        last_step: the number of the last step added.
    """

    LAG = 4

    def __init__(self, first_step: int):
        self.values: list[float] = []
        self.last_step = first_step - 1
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
            raise NonFiniteLoss(f"the training loss at step {step} is {loss}; {_ADVICE}")
        self.values.append(loss)


def _on_device(examples: Batch) -> Batch:
    """Puts examples on the device, inputs as float32 and whole numbers as they are."""

    def put(array: Any) -> jax.Array:
        array = np.asarray(array)
        whole = np.issubdtype(array.dtype, np.integer)
        return jax.device_put(array if whole else np.asarray(array, np.float32))

    return jax.tree.map(put, examples)


def _check_fit(config: Config, problem: Problem, dataset: Any) -> None:
    """Refuses examples that the network cannot take, and fewer of them than a batch."""
    misfit = problem.misfit(dataset.train)
    if misfit:
        raise ConfigError(f"problem {config.problem!r}: {misfit}")
    if count(dataset.train) < config.batch_size:
        raise ConfigError(
            f"config.batch_size is {config.batch_size}, but there are only {count(dataset.train)} "
            "training examples; give a smaller batch_size."
        )


def _refuse_non_finite(metrics: dict[str, Any]) -> None:
    """Catches what the last step of an epoch did, which no later batch has seen."""
    for name in ("train_loss", "test_loss"):
        if not math.isfinite(metrics[name]):
            raise NonFiniteLoss(
                f"the {name} after step {metrics['step']} is {metrics[name]}; {_ADVICE}"
            )


def _facts(dataset: Any, params: Params, batch_size: int) -> dict[str, Any]:
    device = jax.devices()[0]
    return {
        "train_examples": count(dataset.train),
        "test_examples": count(dataset.test),
        **dataset.facts,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "steps_per_epoch": count(dataset.train) // batch_size,
        "device": f"{device.platform}: {device.device_kind}",
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def _opening(config: Config, problem: Problem, dataset: Any, facts: dict[str, Any]) -> str:
    return (
        f"problem    {config.problem}: {facts['train_examples']} train and "
        f"{facts['test_examples']} test {dataset.contents}\n"
        f"network    {problem.network}, {facts['parameters']:,} parameters\n"
        f"optimizer  {label(config.to_dict())}; weight decay {config.weight_decay:g}; "
        f"{config.epochs} epochs of {facts['steps_per_epoch']} steps of {config.batch_size}\n"
        f"device     {facts['device']}"
    )
