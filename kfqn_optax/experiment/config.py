"""Every key of a config file: its default, its meaning, its range.

The keys are flat and the same in every file of `configs/`; those of the optimizer carry the
argument names of `kfqn_optax.kbfgs`. One table is read three times: for the defaults, for the
checks, and for the help of `kfqn-train`.
"""

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict, config_dict

from kfqn_optax.experiment.optimizers import KINDS, OPTIMIZERS, Config, kinds_left
from kfqn_optax.experiment.problems import PROBLEMS


class ConfigError(ValueError):
    """A config that cannot be run; the message is a sentence for the person who wrote it."""


class Key(NamedTuple):
    """One key of a config.

    Attributes:
        default: the default value; a type stands for a value of that type that is not set.
        meaning: what the value does, for people.
        rule: the values allowed, in words, to follow "must be".
        allowed: the same rule as a function.
        free: whether a run may be continued with another value, because no number that it writes
            depends on it.
    """

    default: Any
    meaning: str
    rule: str
    allowed: Callable[[Any], bool]
    free: bool = False


def _one_of(default: str, names: Iterable[str], meaning: str) -> Key:
    return Key(default, meaning, "one of " + ", ".join(names), lambda value: value in names)


def _whole(default: int, meaning: str, least: int, free: bool = False) -> Key:
    rule = f"a whole number of at least {least}"
    return Key(default, meaning, rule, lambda value: value >= least, free)


def _positive(default: float, meaning: str) -> Key:
    return Key(default, meaning, "a finite number above 0", lambda value: 0 < value < math.inf)


def _decay(default: float, meaning: str) -> Key:
    return Key(default, meaning, "at least 0 and below 1", lambda value: 0 <= value < 1)


def _switch(default: bool, meaning: str, free: bool = False) -> Key:
    return Key(default, meaning, "True or False", lambda value: True, free)


KEYS = {
    "problem": _one_of("curves", PROBLEMS, "which data, network and loss"),
    "framework": _one_of("linen", ("linen", "nnx"), "the Flax interface of the network"),
    "tied": _switch(False, "char_transformer: whether the embedding is also the head"),
    "dropout": _decay(0.1, "char_transformer: share of the blocks' outputs dropped"),
    "data_dir": Key(
        str,
        "folder with the raw data files; unset: the manual folder of TFDS",
        "text",
        lambda value: True,
        free=True,
    ),
    "download": _switch(False, "whether data may be fetched from the network", free=True),
    "train_examples": _whole(0, "use only so many training examples; 0: all", 0),
    "test_examples": _whole(0, "measure the test loss on only so many examples; 0: all", 0),
    "optimizer": _one_of("kbfgs", OPTIMIZERS, "the training rule"),
    "learning_rate": _positive(
        0.3, "step size; 0.3 suits kbfgs, 1 kfac with damping 3; adam wants about 0.001"
    ),
    "fallback_learning_rate": _positive(
        0.001, "step size of Adam where muon and the methods with layers do not apply"
    ),
    "fallback_kinds": Key(
        "",
        "methods with layers: kinds of layers left to the fallback: embed,dense general",
        "kinds of layers with commas between them, of " + ", ".join(KINDS),
        lambda value: set(kinds_left(value)) <= set(KINDS),
    ),
    "damping": _positive(0.3, "methods with layers: lambda of the paper; 3 suits kfac"),
    "momentum": _decay(
        0.9, "decay of the gradient's running average (methods with layers) or sum (sgdm)"
    ),
    "epsilon": _positive(
        1e-8, "adam, rmsprop: added to the root of the second moment; the K-BFGS paper tunes it"
    ),
    "weight_decay": Key(
        1e-5,
        "tau in loss + tau/2 |w|^2",
        "a finite number of at least 0",
        lambda value: 0 <= value < math.inf,
    ),
    "factor_decay": _decay(0.9, "all with layers but kfqn: decay of the running second moments"),
    "inverse_every": _whole(20, "kfac, tkfac, mbf: steps from one inverse to the next", 1),
    "pair_decay": _decay(0.9, "kbfgs, kbfgs_l, kfqn: decay of the running averages of s and y"),
    "powell": Key(
        0.2,
        "kbfgs, kbfgs_l, kfqn, block_kbfgs: mu_1 of Powell's damping",
        "above 0 and below 1",
        lambda v: 0 < v < 1,
    ),
    "memory_size": _whole(100, "kbfgs_l: pairs kept for a layer", 1),
    "split": _one_of(
        "sqrt_t", ("sqrt_t", "sqrt"), "kfqn: how damping is shared between a layer's two factors"
    ),
    "norm_constraint": Key(
        0.0,
        "all with layers but mbf, block_kbfgs: limit of the step's squared length in the metric "
        "of the factors, in loss units; 0: none",
        "a finite number of at least 0",
        lambda value: 0 <= value < math.inf,
    ),
    "warm_start": _switch(
        True, "kbfgs, kbfgs_l, kfac, tkfac: second moments from the whole train set first"
    ),
    "curvature_examples": _whole(0, "measure curvature on so many of the batch; 0: all", 0),
    "batch_size": _whole(1000, "examples a step", 1),
    "microbatches": _whole(1, "parts of the batch that are measured one after the other", 1),
    "devices": _whole(1, "devices that share each batch evenly; 0: all there are", 0),
    "shard_state": _switch(
        False, "devices above 1: each keeps only its part of the optimizer's state"
    ),
    "epochs": _whole(20, "passes over the training examples", 1, free=True),
    "seed": Key(
        0,
        "seed of the initial weights and the data order",
        "0 to 2**32 - 1",
        lambda v: 0 <= v < 2**32,
    ),
    "eval_batch_size": _whole(
        1000, "examples at a time in evaluation; changes memory, not results", 1
    ),
    "checkpoint_every": _whole(
        500, "steps from one checkpoint to the next; 0: none, nothing to continue", 0, free=True
    ),
    "keep_checkpoints": _whole(2, "so many of the newest checkpoints are kept", 1, free=True),
}


def default_config() -> ConfigDict:
    """Returns a config with every key at its default; `check` finds what is added by mistake."""
    config = ConfigDict()
    for name, key in KEYS.items():
        unset = isinstance(key.default, type)
        config[name] = config_dict.placeholder(key.default) if unset else key.default
    return config


def unknown_key(name: str) -> ConfigError:
    """Returns the error for a key that does not exist; it names the nearest that does."""
    near = difflib.get_close_matches(name, KEYS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(KEYS)}."
    return ConfigError(f"config has no key {name!r}; {hint}")


def differences(found: Mapping[str, Any], config: Config) -> list[str]:
    """What keeps a config from continuing a run of another one.

    Args:
        found: the other run's config.
        config: a checked config.

    Returns:
        The keys that differ, both values with each; keys that are `free` are not compared.
    """
    return [
        f"{name} ({found.get(name, 'missing')!r} there, {config[name]!r} here)"
        for name, key in KEYS.items()
        if not key.free and (name not in found or found[name] != config[name])
    ]


def check(config: Config) -> None:
    """Refuses a config that cannot be run.

    Raises:
        ConfigError: a key is unknown or missing, or a value has the wrong type or is out of range;
            the message gives the key, the value and what is allowed.
    """
    for name in config:
        if name not in KEYS:
            raise unknown_key(name)
    for name, key in KEYS.items():
        if name not in config:
            raise ConfigError(f"config lacks the key {name!r}; start from default_config().")
        value = config[name]
        unset = isinstance(key.default, type) and value is None
        if not unset and not (_has_type(key, value) and key.allowed(value)):
            raise ConfigError(f"config.{name} is {value!r}; it must be {key.rule}.")
    if config.framework not in PROBLEMS[config.problem]:
        both = [name for name, written in PROBLEMS.items() if config.framework in written]
        raise ConfigError(
            f"config.framework is {config.framework!r}, but problem {config.problem!r} is written "
            f"in {' and '.join(PROBLEMS[config.problem])} only; in {config.framework} there are "
            f"{', '.join(both)}."
        )
    if config.curvature_examples > config.batch_size:
        raise ConfigError(
            f"config.curvature_examples is {config.curvature_examples}, more than the batch of "
            f"{config.batch_size}; give at most config.batch_size, or 0 for the whole batch."
        )


def _has_type(key: Key, value: Any) -> bool:
    """Whether a value is of its key's type; a whole number may stand for a float."""
    wanted = key.default if isinstance(key.default, type) else type(key.default)
    if isinstance(value, bool):
        return wanted is bool
    return isinstance(value, (int, float) if wanted is float else wanted)
