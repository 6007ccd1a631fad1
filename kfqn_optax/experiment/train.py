"""Training as a config says, with an honest clock; a kill may break it off anywhere (see `run`).

Everything is compiled before the clock starts, and the clock runs only while steps (or the warm
start) do: not during compilation, evaluation, plotting or the writing of checkpoints.

What a step does depends on its training state, on the seed and on the numbers of its epoch and
batch, on nothing else. So a run that goes on from a checkpoint ends with the same bits as one that
was never broken off.
"""

import contextlib
import json
import os
import platform
import time
from typing import Any

import jax
import numpy as np

import kfqn_optax as kfqn
from kfqn_optax.experiment import datasets
from kfqn_optax.experiment.checkpoints import Checkpoints
from kfqn_optax.experiment.config import ConfigError, check
from kfqn_optax.experiment.devices import Devices, make_devices
from kfqn_optax.experiment.fingerprint import fingerprint
from kfqn_optax.experiment.optimizers import Config, make_optimizer
from kfqn_optax.experiment.plots import label
from kfqn_optax.experiment.problems import Batch, Params, Problem, make_problem
from kfqn_optax.experiment.progress import Display
from kfqn_optax.experiment.run import Run
from kfqn_optax.experiment.steps import (
    compile_step,
    count,
    initial_state,
    make_evaluate,
    place,
    take,
)
from kfqn_optax.experiment.stop import StopRequest
from kfqn_optax.experiment.workdir import Recorder, continues, refuse_lost


def train(config: Config, workdir: str | os.PathLike, dataset: Any = None) -> list[dict]:
    """Trains as a config says and writes the run's files (see `workdir`).

    Losses in the metrics are means over the whole train or test set, the loss of an image summed
    over its pixels, of a text averaged over its places, plus weight_decay/2 |w|^2: the number that
    the authors of K-BFGS print. The optimizer itself is given the data loss and the weight decay
    apart. Mean squared errors are averages over images and pixels. `seconds` counts the warm start
    and the steps; in a run that was continued it goes on from the checkpoint. With kbfgs and its
    kin the `kfqn.health` of all layers is in them too, counted from the first step
    (`workdir.PAIRS`).

    Args:
        config: see `config.KEYS`.
        workdir: a folder that holds no run yet, made if it is missing; or one with a run of the
            same config, which is continued from its newest sound checkpoint.
        dataset: the examples, with the attributes of `datasets.load`'s result; loaded if left out.

    Returns:
        The metrics, one dict an epoch, epoch 0 (before training) first.

    Raises:
        ConfigError: the config cannot be run, alone or with these examples.
        FileExistsError: `workdir` holds a run of another config, or one without checkpoints.
        RunError: none of the checkpoints can be used, or one cannot be written.
        NonFiniteLoss: a loss was not finite. The files of the epochs before are kept.
        Stopped: a signal came; a checkpoint was written, unless `config.checkpoint_every` is 0.
    """
    check(config)
    continuing = continues(workdir, config)
    problem = make_problem(config)
    if dataset is None:
        dataset = load_dataset(config)
    _check_fit(config, problem, dataset)
    devices = make_devices(config)

    examples, test_examples = (
        devices.everywhere(_on_device(part)) for part in (dataset.train, dataset.test)
    )
    params, model_state = devices.everywhere(problem.init(config.seed))
    optimizer = make_optimizer(
        config, lambda: problem.layers(params, take(examples, slice(2)), model_state)
    )
    state = initial_state(optimizer, params, model_state, config.seed)
    table = kfqn.summary(state.opt_state, params) if optimizer.takes_curvature else ""
    state = place(state, devices)
    measure = make_evaluate(
        problem,
        examples,
        test_examples,
        weight_decay=config.weight_decay,
        batch_size=config.eval_batch_size,
        devices=devices,
    )
    facts = _facts(dataset, params, config.batch_size, devices)
    steps = facts["steps_per_epoch"]

    with (
        StopRequest() as stop,
        Display(config.epochs * steps, config.epochs) as display,
        contextlib.ExitStack() as stack,
    ):
        checkpoints, found = None, None
        if continuing or config.checkpoint_every:
            of_this_run = fingerprint(config, dataset, state, devices)
            checkpoints = stack.enter_context(Checkpoints(workdir, of_this_run, config))
            if continuing:
                found = checkpoints.newest(state, steps, display.say)
        if found and found[1].epoch >= config.epochs:
            display.say(
                f"the run in {workdir} is finished: it has {found[1].epoch} epochs, and "
                f"config.epochs is {config.epochs}. Raise config.epochs to go on."
            )
            return found[1].history
        if continuing and not found:
            refuse_lost(workdir)
        history = found[1].history if found else []
        recorder = stack.enter_context(Recorder(workdir, config, history if continuing else None))
        run = Run(
            config,
            devices,
            examples,
            steps,
            optimizer.learns_pairs,
            measure,
            recorder,
            display,
            checkpoints,
            stop,
        )

        display.say(_opening(config, problem, dataset, facts))
        if optimizer.takes_curvature:
            recorder.text("summary.txt", table.rstrip() + "\n")
        compile_seconds = 0.0
        if found:
            state, position = found
            step = position.epoch * steps + position.batch
            display.say(f"going on from step {step}, after {position.seconds:.1f} s of training")
        else:
            state, position, compile_seconds = run.begin(problem, optimizer, state)
        state = place(state, devices)
        start = time.perf_counter()
        compiled = compile_step(problem, optimizer, config, state, examples, devices)
        compile_seconds += time.perf_counter() - start
        display.say(f"compiled in {compile_seconds:.1f} s")
        facts["compile_seconds"] = compile_seconds
        recorder.text("run.json", json.dumps(facts, indent=2) + "\n")
        stop.defer()
        if not found:
            # A disk that is full or cannot be written to shows now, not after hours.
            run.save(state, position)
        return run.train(compiled, state, position)


def load_dataset(config: Config) -> Any:
    """Returns the data that a config asks for."""
    dataset = datasets.load(
        config.problem,
        config.data_dir,
        train_examples=config.train_examples or None,
        download=config.download,
    )
    wanted, available = config.test_examples, count(dataset.test)
    if wanted > available:
        raise ValueError(
            f"test_examples is {wanted}, but '{config.problem}' has {available} test examples; "
            "ask for fewer, or 0 for all."
        )
    return dataset._replace(test=take(dataset.test, slice(wanted))) if wanted else dataset


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


def _facts(dataset: Any, params: Params, batch_size: int, devices: Devices) -> dict[str, Any]:
    return {
        "train_examples": count(dataset.train),
        "test_examples": count(dataset.test),
        **dataset.facts,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "steps_per_epoch": count(dataset.train) // batch_size,
        "device": str(devices),
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
