"""A small VGG network that classifies Fashion-MNIST; settings of K-BFGS not yet tuned.

With Adam: --config.optimizer=adam --config.learning_rate=0.001. With all 60,000 images an epoch
takes minutes on two CPU cores; --config.train_examples=10000 is a sixth of that.
"""

from kfqn_optax.experiment.config import default_config


def get_config():
    config = default_config()
    config.problem = "fashion_mnist_cnn"
    config.framework = "linen"
    config.optimizer = "kbfgs"
    config.learning_rate = 0.3
    config.damping = 0.1
    config.norm_constraint = 0.3
    config.weight_decay = 1e-5
    config.warm_start = True
    config.batch_size = 200
    config.epochs = 10
    return config
