"""A problem's data as arrays: images, for classification with their labels, or windows of text."""

import math
import os
from typing import Any, NamedTuple

import numpy as np

# Problem: the data set, and whether its labels are wanted.
_IMAGES = {
    "mnist": ("mnist", False),
    "curves": ("curves", False),
    "faces": ("faces", False),
    "fashion_mnist": ("fashion_mnist", False),
    "fashion_mnist_cnn": ("fashion_mnist", True),
}
PROBLEMS = (*_IMAGES, "char_transformer")

_BLOCK = 4096  # examples decoded at a time; bounds the memory beside the result


class Labelled(NamedTuple):
    """Examples with the answers to them.

    Attributes:
        inputs: [examples, ...].
        labels: whole numbers [examples, ...].
    """

    inputs: np.ndarray
    labels: np.ndarray


class Dataset(NamedTuple):
    """Images of a problem, C-contiguous.

    Attributes:
        name: the problem.
        image_shape: height and width in pixels.
        train: float32 [examples, height * width]; for classification, `Labelled` images
            [examples, height, width, 1] with int32 labels.
        test: the same.
    """

    name: str
    image_shape: tuple[int, int]
    train: Any
    test: Any

    @property
    def contents(self) -> str:
        """What the examples are, for people."""
        return f"images, {' x '.join(str(side) for side in self.image_shape)}"

    @property
    def facts(self) -> dict[str, Any]:
        """What should be known of the data later."""
        return {"image_shape": list(self.image_shape)}


def load(
    problem: str,
    data_dir: str | os.PathLike | None = None,
    *,
    train_examples: int | None = None,
    download: bool = False,
) -> Any:
    """The data of a problem, images scaled as the paper's autoencoders want them.

    The first call prepares the data in TFDS's folder (see `prepare`), later ones read them from
    there. MNIST, Fashion-MNIST and CURVES have intensities from 0 to 1; FACES have zero mean and
    unit variance over the training images that are returned (see `faces.normalise`). The text of
    ``char_transformer`` is not prepared (see `text`).

    Args:
        problem: ``mnist``, ``curves``, ``faces``, ``fashion_mnist``, ``fashion_mnist_cnn`` or
            ``char_transformer``.
        data_dir: a folder with raw files, or with a sub-folder of the problem's name that has
            them: for MNIST and Fashion-MNIST the four idx files, for FACES ``olivettifaces.mat``.
            CURVES and text need none. Nothing is written there. None: TFDS's manual folder only.
        train_examples: how many training examples to return, the first ones in the prepared order,
            in which images of all kinds are mixed. None: all.
        download: whether TFDS may download MNIST or Fashion-MNIST where nothing else is found.
            Without a network TFDS tries for some minutes before it gives up.

    Returns:
        A `Dataset`, or a `text.Text`.

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
    if problem not in _IMAGES:
        from kfqn_optax.experiment.datasets import text

        return text.load(train_examples)
    from kfqn_optax.experiment.datasets import faces, prepare

    source, labelled = _IMAGES[problem]
    builder = prepare.prepared(source, data_dir, download)
    available = builder.info.splits["train"].num_examples
    check_count(problem, train_examples, available, "training images")
    height, width, _ = builder.info.features["image"].shape
    try:
        train, labels = _read(builder, "train", train_examples or available)
        test, test_labels = _read(builder, "test", builder.info.splits["test"].num_examples)
    except (RuntimeError, IndexError) as error:  # a wrong checksum; records that are gone
        raise ValueError(
            f"{builder.data_path} is damaged: {error}. Remove this folder; the next run prepares "
            f"'{source}' again."
        ) from error
    if problem == "faces":
        train, test = faces.normalise(train, test)
    else:
        train /= 255
        test /= 255
    if labelled:
        train = Labelled(train.reshape(-1, height, width, 1), labels)
        test = Labelled(test.reshape(-1, height, width, 1), test_labels)
    return Dataset(problem, (height, width), train, test)


def check_count(problem: str, wanted: int | None, available: int, what: str) -> None:
    """Refuses to give more training examples than there are."""
    if wanted is not None and wanted > available:
        raise ValueError(
            f"train_examples is {wanted}, but '{problem}' has {available} {what}; "
            "ask for fewer, or None for all."
        )


def _read(builder: Any, split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first images of a split, and their labels.

    The stored records are opened here, which takes a third of the time of TFDS's general
    decoding. All our sets keep an image as one string of bytes: a PNG file for TFDS's feature
    `Image`, else the pixels.

    Returns:
        Images, float32 [count, pixels], intensities 0 to 255, and labels, int32 [count]: 0 where
        the set has none.
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
    labels = np.zeros(count, np.int32)
    for start in range(0, count, _BLOCK):
        rows = range(start, min(start + _BLOCK, count))
        for row, record in zip(rows, source.__getitems__(list(rows)), strict=True):
            features = protos.Example.FromString(record).features.feature
            content = features["image"].bytes_list.value[0]
            pixels = png.decode(content).ravel() if is_png else np.frombuffer(content, np.uint8)
            images[row] = pixels
            if label := features["label"].int64_list.value:
                labels[row] = label[0]
    return images, labels
