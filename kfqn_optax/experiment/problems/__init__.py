"""The problems: a network and a loss each, by name.

* `problem`: what every problem offers.
* `autoencoder`: dense layers; the problems of the K-BFGS paper, and Fashion-MNIST.
* `cnn`, `transformer`: a network each, in linen and in NNX.
* `classifier`: what makes a problem of such a network.
"""

from collections.abc import Callable

from kfqn_optax.experiment.optimizers import Config
from kfqn_optax.experiment.problems import cnn, transformer
from kfqn_optax.experiment.problems.autoencoder import AUTOENCODERS
from kfqn_optax.experiment.problems.problem import (
    Batch,
    ModelState,
    Params,
    Problem,
    squared_norm,
)

__all__ = [
    "PROBLEMS",
    "Batch",
    "ModelState",
    "Params",
    "Problem",
    "make_problem",
    "squared_norm",
]


def _autoencoder(name: str) -> dict[str, Callable[[Config], Problem]]:
    return {"linen": lambda config: AUTOENCODERS[name]}


def _sizes(config: Config) -> transformer.Sizes:
    return transformer.Sizes(tied=config.tied, dropout=config.dropout)


# A function from a checked config to the problem, by name and framework.
PROBLEMS: dict[str, dict[str, Callable[[Config], Problem]]] = {
    **{name: _autoencoder(name) for name in AUTOENCODERS},
    "fashion_mnist_cnn": {
        "linen": lambda config: cnn.linen_problem(),
        "nnx": lambda config: cnn.nnx_problem(),
    },
    "char_transformer": {
        "linen": lambda config: transformer.linen_problem(_sizes(config)),
        "nnx": lambda config: transformer.nnx_problem(_sizes(config)),
    },
}


def make_problem(config: Config) -> Problem:
    """Returns the problem that a checked config names."""
    return PROBLEMS[config.problem][config.framework](config)
