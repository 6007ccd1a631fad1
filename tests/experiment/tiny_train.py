"""`kfqn-train` on the tiny problem, as a process of its own.

    python tiny_train.py WORKDIR [KEY=VALUE ...]
    python tiny_train.py --serve

The second forks a process for each line of standard input, a list in JSON: a log file, then the
arguments of the first. It writes the number of the process, and its exit status once it is over,
so a process begins where the imports are done.

The figure, which takes longer than all the rest, is a file with the number of epochs drawn.
"""

import json
import os
import sys
from pathlib import Path

import jax
import tiny
from orbax.checkpoint import v1 as orbax  # otherwise imported by each process

from kfqn_optax.experiment import cli, plots, train
from kfqn_optax.experiment.problems import PROBLEMS

CONFIG = Path(__file__).with_name("tiny_config.py")


def main(workdir, *overrides):
    assert orbax
    jax.config.update("jax_disable_most_optimizations", True)
    PROBLEMS["curves"] = tiny.written(tiny.PROBLEM)
    train.load_dataset = lambda config: tiny.dataset()
    plots.losses_figure = lambda run: len(run.metrics)
    plots.save = lambda count, path: path.write_text(str(count))
    settings = [f"--config.{override}" for override in overrides]
    return cli.train(["kfqn-train", "--config", str(CONFIG), "--workdir", workdir, *settings])


def serve():
    """No thread of JAX exists yet, so forking is safe."""
    for line in sys.stdin:
        log, *arguments = json.loads(line)
        process = os.fork()
        if process == 0:
            descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            status = main(*arguments)
            sys.stdout.flush()
            os._exit(status)
        print(process, flush=True)
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    serve() if sys.argv[1:] == ["--serve"] else sys.exit(main(*sys.argv[1:]))
