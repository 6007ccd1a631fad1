"""A small transformer on Python's own documentation; settings of K-BFGS not yet tuned.

With Adam: --config.optimizer=adam --config.learning_rate=0.001.
"""

from kfqn_optax.experiment.config import default_config


def get_config():
    config = default_config()
    config.problem = "char_transformer"
    config.framework = "linen"
    config.tied = False
    config.dropout = 0.1
    config.optimizer = "kbfgs"
    config.learning_rate = 0.3
    config.damping = 0.1
    config.norm_constraint = 0.1
    config.weight_decay = 1e-5
    config.warm_start = True
    config.batch_size = 64
    config.epochs = 10
    return config
