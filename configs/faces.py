"""The FACES autoencoder with K-BFGS; damping tuned over 0.03, 0.1 and 0.3."""

from kfqn_optax.experiment.config import default_config


def get_config():
    config = default_config()
    config.problem = "faces"
    config.optimizer = "kbfgs"
    config.learning_rate = 0.3
    config.damping = 0.1
    config.norm_constraint = 3.0
    config.weight_decay = 1e-5
    config.warm_start = True
    config.batch_size = 1000
    config.epochs = 10
    return config
