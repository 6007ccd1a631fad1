"""One run of kfqn-train, as a process of its own, that is never repeated once it has ended."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kfqn_optax.experiment import cli
from kfqn_optax.experiment.config import check, differences
from kfqn_optax.experiment.paper import METHODS
from kfqn_optax.experiment.workdir import CHECKPOINTS, RunError, read_run

CONFIGS = Path(__file__).parents[2] / "configs"
PROGRAM = "import sys; from kfqn_optax.experiment import cli; sys.exit(cli.train())"
COLUMNS = ("epoch", "seconds", "train_loss", "test_loss", "test_mse")
_DIVERGED = re.compile(r"the (training|train_|test_) ?loss (at|after) step \d+ is -?(nan|inf)")


class Failed(RuntimeError):
    """A run that ended for a reason that is not a result; the message is its last sentence."""


def train(folder: Path, problem: str, method: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Runs what a config and its overrides say, or reads what such a run left.

    Beside the folder there is a file of the same name with ``.log`` behind it, with what the run
    said. The checkpoints of a run that has ended are deleted.

    Args:
        folder: the run's workdir.
        problem: of ``configs/paper_PROBLEM.py``.
        method: of the paper.
        overrides: keys of the config and their values.

    Returns:
        The run as it is kept in JSON: method, tuned settings, seed, device, and the curve with the
        columns `COLUMNS`; the curve of a run that diverged is null.

    Raises:
        Failed: it could not be run, or was stopped.
    """
    command = ["--config", f"{CONFIGS / f'paper_{problem}.py'}:{method}", "--workdir", str(folder)]
    command += [f"--config.{key}={value}" for key, value in overrides.items()]
    config, _ = cli.read_command_line(["kfqn-train", *command])
    check(config)
    diverged, log = folder / "diverged.txt", Path(f"{folder}.log")
    if not diverged.exists() and not _ended(folder, config):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as file:
            status = launch(command, file)
        if status:
            said = (log.read_text().strip().splitlines() or ["it said nothing"])[-1]
            if not _DIVERGED.search(said):
                raise Failed(f"{folder} ended with status {status}: {said} (see {log})")
            diverged.write_text(said + "\n")
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    settings = {name: config[name] for name in (*METHODS[method][1], "norm_constraint")}
    if method not in ("kbfgs", "kbfgs_l", "kfac"):
        del settings["norm_constraint"]
    result = {"method": method, "settings": settings, "seed": config.seed, "epochs": config.epochs}
    if diverged.exists():
        return result | {"curve": None}
    facts = json.loads((folder / "run.json").read_text())
    metrics = read_run(folder).metrics[: config.epochs + 1]
    curve = [[record[name] for name in COLUMNS] for record in metrics]
    return result | {"device": facts["device"], "jax": facts["jax"], "curve": curve}


def launch(command: list[str], log: Any) -> int:
    """Runs kfqn-train; its exit status. Where this process is told to end, the run ends first."""
    arguments = [sys.executable, "-c", PROGRAM, *command]
    process = subprocess.Popen(arguments, stdout=log, stderr=log)
    try:
        return process.wait()
    except BaseException:
        process.terminate()  # it writes a checkpoint
        process.wait()
        raise


def _ended(folder: Path, config: Any) -> bool:
    """Whether a folder holds the whole run of a config; another config's is refused."""
    try:
        run = read_run(folder)
    except RunError:
        return False
    differing = differences(run.config, config)
    if differing:
        raise Failed(
            f"{folder} holds a run of another config: {', '.join(differing)}; move it away."
        )
    return run.metrics[-1]["epoch"] >= config.epochs
