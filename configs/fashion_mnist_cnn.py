"""A small VGG network that classifies Fashion-MNIST, by KF-QN, which is made for convolutions.

With Adam: --config.optimizer=adam --config.learning_rate=0.003. With all 60,000 images an epoch
takes minutes on two CPU cores; --config.train_examples=10000 is a sixth of that.
"""

from kfqn_optax.experiment.config import default_config


def get_config():
    config = default_config()
    config.problem = "fashion_mnist_cnn"
    config.framework = "linen"
    config.optimizer = "kfqn"
    config.learning_rate = 10.0
    config.damping = 0.3
    config.norm_constraint = 0.1
    config.fallback_learning_rate = 0.003
    config.weight_decay = 1e-5
    config.warm_start = False
    config.batch_size = 100
    config.epochs = 10
    return config
