"""The problems of the K-BFGS paper with each of its methods: what `configs/paper_*.py` share.

All methods minimise the same function from the same weights, in batches of 1000. K-BFGS and
K-BFGS(L) have our limit on the step, without which most seeds diverge (docs/differences.md); K-FAC
has none, as in the paper, unless its tuned settings say so.
"""

from collections.abc import Mapping

from ml_collections import ConfigDict

from kfqn_optax.experiment.config import ConfigError, default_config

# Method: its name, and the settings that the paper tunes.
METHODS = {
    "kbfgs": ("K-BFGS", ("learning_rate", "damping")),
    "kbfgs_l": ("K-BFGS(L)", ("learning_rate", "damping")),
    "kfac": ("K-FAC", ("learning_rate", "damping")),
    "adam": ("Adam", ("learning_rate", "epsilon")),
    "rmsprop": ("RMSprop", ("learning_rate", "epsilon")),
    "sgdm": ("SGD-m", ("learning_rate",)),
}


def paper_config(
    problem: str, method: str, tuned: Mapping[str, Mapping[str, float]], epochs: int
) -> ConfigDict:
    """Returns the config of a method on a problem of the paper.

    Args:
        problem: ``mnist``, ``faces`` or ``curves``.
        method: one of `METHODS`.
        tuned: by method, the settings that gave the smallest train loss.
        epochs: how long the run is.

    Raises:
        ConfigError: the paper has no such method.
    """
    if method not in METHODS:
        raise ConfigError(
            f"the paper has no method {method!r}; after the colon of --config comes one of "
            f"{', '.join(METHODS)}."
        )
    config = default_config()
    config.problem = problem
    config.optimizer = method
    config.norm_constraint = 3.0 if method in ("kbfgs", "kbfgs_l") else 0.0
    config.weight_decay = 1e-5
    config.warm_start = True
    config.batch_size = 1000
    config.epochs = epochs
    config.update(dict(tuned[method]))
    return config
