"""A problem small enough to train in a test: 12 pixels which two numbers decide."""

import numpy as np

from kfqn_optax.experiment.config import default_config
from kfqn_optax.experiment.datasets import Dataset
from kfqn_optax.experiment.problems import Problem

PROBLEM = Problem((12, 2, 12), binary=True)


def dataset(train=70, test=25, pixels=12, name="curves"):
    rng = np.random.default_rng(0)
    codes = rng.normal(size=(train + test, 2))
    images = 1 / (1 + np.exp(-3 * codes @ rng.normal(size=(2, pixels))))
    images = images.astype(np.float32)
    return Dataset(name, (3, pixels // 3), images[:train], images[train:])


def config(**values):
    """A config for the data above: 4 steps an epoch, 6 images left over."""
    result = default_config()
    tiny = {"batch_size": 16, "epochs": 2, "eval_batch_size": 32}
    for key, value in (tiny | values).items():
        result[key] = value
    return result
