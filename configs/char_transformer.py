"""A small transformer on Python's own documentation.

Embedding and attention are left to Adam: see "Transformers" in docs/models.md. With Adam alone:
--config.optimizer=adam --config.learning_rate=0.003.
"""

from kfqn_optax.experiment.config import default_config


def get_config():
    config = default_config()
    config.problem = "char_transformer"
    config.framework = "linen"
    config.tied = False
    config.dropout = 0.1
    config.optimizer = "kbfgs"
    config.learning_rate = 300.0
    config.damping = 3.0
    config.norm_constraint = 10.0
    config.fallback_kinds = "embed,dense general"
    config.fallback_learning_rate = 0.003
    config.weight_decay = 1e-5
    config.warm_start = False
    config.batch_size = 32
    config.epochs = 10
    return config
