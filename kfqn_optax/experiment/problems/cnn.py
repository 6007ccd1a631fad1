"""A small VGG network for 28 x 28 grey images, in linen and in NNX.

Convolutions of 3 x 3 with batch norm and relu, in stages with a halving of the image between them;
then the mean over the image and one dense layer. A convolution has no bias: batch norm would take
it away again. With the stages below there are 279,000 parameters.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from kfqn_optax.experiment.problems.classifier import LinenClassifier, NnxClassifier

STAGES = ((32,), (64, 64), (128, 128))  # channels of the convolutions, stage by stage
CLASSES = 10
SIDE = 28  # pixels

_AVERAGE = 0.9  # decay of the running averages of batch norm


class LinenCNN(nn.Module):
    """The network in linen.

    Attributes:
        stages: the channels of the convolutions, stage by stage.
        classes: the number of classes.
    """

    stages: tuple[tuple[int, ...], ...] = STAGES
    classes: int = CLASSES

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Maps images [batch, height, width, 1] to logits [batch, classes]."""
        x, number = images, 0
        for stage, widths in enumerate(self.stages):
            if stage > 0:
                x = nn.max_pool(x, (2, 2), (2, 2))
            for width in widths:
                x = nn.Conv(width, (3, 3), use_bias=False, name=f"convs_{number}")(x)
                x = nn.BatchNorm(not train, momentum=_AVERAGE, name=f"norms_{number}")(x)
                x = nn.relu(x)
                number += 1
        return nn.Dense(self.classes, name="head")(x.mean(axis=(1, 2)))


class NnxCNN(nnx.Module):
    """The network in NNX."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        stages: tuple[tuple[int, ...], ...] = STAGES,
        classes: int = CLASSES,
    ):
        widths = [width for stage in stages for width in stage]
        self.stages = stages
        self.convs = nnx.List(
            [
                nnx.Conv(before, width, (3, 3), use_bias=False, rngs=rngs)
                for before, width in zip([1, *widths], widths, strict=False)
            ]
        )
        self.norms = nnx.List(
            [nnx.BatchNorm(width, momentum=_AVERAGE, rngs=rngs) for width in widths]
        )
        self.head = nnx.Linear(widths[-1], classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images [batch, height, width, 1] to logits [batch, classes]."""
        x, number = images, 0
        for stage, widths in enumerate(self.stages):
            if stage > 0:
                x = nnx.max_pool(x, (2, 2), (2, 2))
            for _ in widths:
                x = nnx.relu(self.norms[number](self.convs[number](x)))
                number += 1
        return self.head(x.mean(axis=(1, 2)))


def linen_problem(stages=STAGES, classes: int = CLASSES) -> LinenClassifier:
    """Returns the problem in linen."""
    inputs = jax.ShapeDtypeStruct((SIDE, SIDE, 1), jnp.float32)
    return LinenClassifier(LinenCNN(stages, classes), inputs, f"{_name(stages)}, linen")


def nnx_problem(stages=STAGES, classes: int = CLASSES) -> NnxClassifier:
    """Returns the problem in NNX."""
    make = functools.partial(NnxCNN, stages=stages, classes=classes)
    return NnxClassifier(make, f"{_name(stages)}, NNX")


def _name(stages: tuple[tuple[int, ...], ...]) -> str:
    widths = ", ".join("-".join(str(width) for width in stage) for stage in stages)
    return f"convolutions {widths} with batch norm"
