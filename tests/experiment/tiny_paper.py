"""`kfqn-train` on the tiny problem in the place of CURVES, with the command line of the others."""

import sys

import jax
import tiny

from kfqn_optax.experiment import cli, plots, train
from kfqn_optax.experiment.problems import PROBLEMS


def main():
    jax.config.update("jax_disable_most_optimizations", True)
    PROBLEMS["curves"] = tiny.written(tiny.PROBLEM)
    train.load_dataset = lambda config: tiny.dataset()
    plots.save = lambda figure, path: None
    sys.exit(cli.train())
