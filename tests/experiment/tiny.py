"""Problems small enough to train in a test: 12 pixels which two numbers decide, and others."""

import re

import numpy as np

from kfqn_optax.experiment.config import default_config
from kfqn_optax.experiment.datasets import Dataset, Labelled, text
from kfqn_optax.experiment.problems import cnn, transformer
from kfqn_optax.experiment.problems.autoencoder import AutoencoderProblem

PROBLEM = AutoencoderProblem((12, 2, 12), binary=True)
STAGES = ((4,), (6,))
SIZES = transformer.Sizes(symbols=5, depth=1, width=8, heads=2)
CLASSIFIERS = {
    "fashion_mnist_cnn": {
        "linen": lambda config: cnn.linen_problem(STAGES, classes=3),
        "nnx": lambda config: cnn.nnx_problem(STAGES, classes=3),
    },
    "char_transformer": {
        "linen": lambda config: transformer.linen_problem(SIZES),
        "nnx": lambda config: transformer.nnx_problem(SIZES),
    },
}


def written(problem):
    """An entry of PROBLEMS: a problem in linen only, whatever the config."""
    return {"linen": lambda config: problem}


def dataset(train=70, test=25, pixels=12, name="curves"):
    rng = np.random.default_rng(0)
    codes = rng.normal(size=(train + test, 2))
    images = 1 / (1 + np.exp(-3 * codes @ rng.normal(size=(2, pixels))))
    images = images.astype(np.float32)
    return Dataset(name, (3, pixels // 3), images[:train], images[train:])


def images(train=70, test=25):
    """Three classes of images: a bright bar at the left, in the middle, at the right."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, train + test).astype(np.int32)
    pixels = rng.uniform(size=(train + test, 12, 12, 1)).astype(np.float32)
    for number in range(3):
        pixels[labels == number, :, 4 * number : 4 * number + 4] += 1
    both = Labelled(pixels, labels)
    return Dataset(
        "fashion_mnist_cnn",
        (12, 12),
        Labelled(*(array[:train] for array in both)),
        Labelled(*(array[train:] for array in both)),
    )


def characters(train=70, test=25, length=16):
    """Windows of a text that counts: the next character is the present one plus 1, modulo 5."""
    rng = np.random.default_rng(0)
    starts = rng.integers(0, 5, (train + test, 1))
    codes = ((starts + np.arange(length + 1)) % 5).astype(np.int32)
    inputs, labels = codes[:, :-1], codes[:, 1:]
    return text.Text(
        "char_transformer",
        Labelled(inputs[:train], labels[:train]),
        Labelled(inputs[train:], labels[train:]),
        characters=5,
        sha256="0" * 64,
    )


def linen_name(path):
    """The path of an NNX layer or parameter as that of linen: lists become numbered names."""
    return "params/" + re.sub(r"/(\d+)", r"_\1", path)


def config(**values):
    """A config for the data above: 4 steps an epoch, 6 images left over."""
    result = default_config()
    tiny = {"batch_size": 16, "epochs": 2, "eval_batch_size": 32}
    for key, value in (tiny | values).items():
        result[key] = value
    return result
