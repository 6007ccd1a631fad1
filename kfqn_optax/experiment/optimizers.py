"""From a config to the Optax transformation that it names.

K-BFGS takes one extra argument in `update`, the curvature function; the baselines take none.
Weight decay is part of the gradient for all of them, so all minimise the same function.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax

import kfqn_optax as kfqn

# A checked ml_collections.ConfigDict. The types of its values are known to `config.check`, not to
# type checkers.
Config = Any


class Optimizer(NamedTuple):
    """A transformation and what its `update` needs.

    Attributes:
        transformation: the whole optimizer, learning rate included.
        takes_curvature: whether `update` wants the extra argument `curvature_fn`, and whether
            `kfqn.warm_start` applies to the state.
    """

    transformation: optax.GradientTransformation
    takes_curvature: bool


def _kbfgs(config: Config) -> Optimizer:
    transformation = kfqn.kbfgs(
        config.learning_rate,
        config.damping,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        factor_decay=config.factor_decay,
        pair_decay=config.pair_decay,
        powell=config.powell,
        norm_constraint=config.norm_constraint or None,
    )
    return Optimizer(transformation, takes_curvature=True)


def _baseline(config: Config, rule: optax.GradientTransformation) -> Optimizer:
    decay = optax.add_decayed_weights(config.weight_decay)
    return Optimizer(optax.chain(decay, rule), takes_curvature=False)


def _adam(config: Config) -> Optimizer:
    return _baseline(config, optax.adam(config.learning_rate))


def _sgdm(config: Config) -> Optimizer:
    return _baseline(config, optax.sgd(config.learning_rate, momentum=config.momentum))


def _rmsprop(config: Config) -> Optimizer:
    return _baseline(config, optax.rmsprop(config.learning_rate))


OPTIMIZERS: dict[str, Callable[[Config], Optimizer]] = {
    "kbfgs": _kbfgs,
    "adam": _adam,
    "sgdm": _sgdm,
    "rmsprop": _rmsprop,
}


def make_optimizer(config: Config) -> Optimizer:
    """Returns the optimizer that a checked config names."""
    return OPTIMIZERS[config.optimizer](config)
