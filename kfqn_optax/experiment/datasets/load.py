"""A problem's images as two arrays."""

import math
import os
from typing import Any, NamedTuple

import numpy as np

PROBLEMS = ("mnist", "curves", "faces", "fashion_mnist")

_BLOCK = 4096  # examples decoded at a time; bounds the memory beside the result


class Dataset(NamedTuple):
    """Images of a problem, one a row, C-contiguous.

    Attributes:
        name: the problem.
        image_shape: height and width in pixels.
        train: float32 [examples, height * width].
        test: float32 [examples, height * width].
    """

    name: str
    image_shape: tuple[int, int]
    train: np.ndarray
    test: np.ndarray


def load(
    problem: str,
    data_dir: str | os.PathLike | None = None,
    *,
    train_examples: int | None = None,
    download: bool = False,
) -> Dataset:
    """Images of a problem, scaled as the paper's autoencoders want them.

    The first call prepares the data in TFDS's folder (see `prepare`), later ones read them from
    there. MNIST, Fashion-MNIST and CURVES have intensities from 0 to 1; FACES have zero mean and
    unit variance over the training images that are returned (see `faces.normalise`).

    Args:
        problem: ``mnist``, ``curves``, ``faces`` or ``fashion_mnist``.
        data_dir: a folder with raw files, or with a sub-folder of the problem's name that has
            them: for MNIST and Fashion-MNIST the four idx files, for FACES ``olivettifaces.mat``.
            CURVES needs none. Nothing is written there. None: TFDS's manual folder only.
        train_examples: how many training images to return, the first ones in the prepared order,
            in which images of all kinds are mixed. None: all.
        download: whether TFDS may download MNIST or Fashion-MNIST where nothing else is found.
            Without a network TFDS tries for some minutes before it gives up.

    Returns:
        The images.

    Raises:
        ValueError: no such problem, a wrong number of examples, or data that are damaged.
        FileNotFoundError: raw files are needed and not there; the message says which, and where
            to put them.
        PermissionError: the TFDS folder cannot be written to.
        ConnectionError: the download failed.
    """
    if problem not in PROBLEMS:
        raise ValueError(f"There is no problem '{problem}'; choose one of {', '.join(PROBLEMS)}.")
    if train_examples is not None and train_examples < 1:
        raise ValueError(
            f"train_examples is {train_examples}; ask for at least 1, or None for all."
        )
    from kfqn_optax.experiment.datasets import faces, prepare

    builder = prepare.prepared(problem, data_dir, download)
    available = builder.info.splits["train"].num_examples
    if train_examples is not None and train_examples > available:
        raise ValueError(
            f"train_examples is {train_examples}, but '{problem}' has {available} training images; "
            "ask for fewer, or None for all."
        )
    height, width, _ = builder.info.features["image"].shape
    try:
        train = _read(builder, "train", train_examples or available)
        test = _read(builder, "test", builder.info.splits["test"].num_examples)
    except (RuntimeError, IndexError) as error:  # a wrong checksum; records that are gone
        raise ValueError(
            f"{builder.data_path} is damaged: {error}. Remove this folder; the next run prepares "
            f"'{problem}' again."
        ) from error
    if problem == "faces":
        train, test = faces.normalise(train, test)
    else:
        train /= 255
        test /= 255
    return Dataset(problem, (height, width), train, test)


def _read(builder: Any, split: str, count: int) -> np.ndarray:
    """The first images of a split, float32 [count, pixels], intensities 0 to 255.

    The stored records are opened here, which takes a third of the time of TFDS's general
    decoding. All our sets keep an image as one string of bytes: a PNG file for TFDS's feature
    `Image`, else the pixels.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.proto import tf_example_pb2

    from kfqn_optax.experiment.datasets import png

    protos: Any = tf_example_pb2  # generated code, its names unknown to type checkers
    feature = builder.info.features["image"]
    is_png = isinstance(feature, tfds.features.Image)
    source = builder.as_data_source(
        split=split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
    )
    images = np.empty((count, math.prod(feature.shape)), np.float32)
    for start in range(0, count, _BLOCK):
        rows = range(start, min(start + _BLOCK, count))
        for row, record in zip(rows, source.__getitems__(list(rows)), strict=True):
            example = protos.Example.FromString(record)
            content = example.features.feature["image"].bytes_list.value[0]
            pixels = png.decode(content).ravel() if is_png else np.frombuffer(content, np.uint8)
            images[row] = pixels
    return images
