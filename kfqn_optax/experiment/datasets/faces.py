"""FACES: small rotated and scaled patches of the Olivetti faces.

The Olivetti data are 400 photographs of 64 x 64 pixels, ten of each of 40 people, in the file
``olivettifaces.mat`` (https://cs.nyu.edu/~roweis/data.html). Hinton and Salakhutdinov (Science
313, 2006, supporting text) made 165,600 images of 25 x 25 pixels from them, 414 of each photograph,
by rotation (-90 to +90 degrees), scaling (1.4 to 1.8), cropping and subsampling: the first thirty
people are for training, the last ten for testing.

What they leave open is chosen here: angle and scale are uniform, the crop is at the centre, and
every second pixel of the enlarged photograph is taken, so a patch shows 28 to 36 pixels of it,
the middle of the face. With the normalisation of `normalise`, 30 principal components leave a
squared error of 133 per test image; they report 135 (their figure 2C). Of the training
people's 124,200 images the first 345 of each photograph are ``train``, 103,500 images, and the
other 69 ``validation``, 20,700, the sizes used since Martens (ICML 2010).
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io
import tensorflow_datasets as tfds
from scipy.ndimage import map_coordinates

FILE = "olivettifaces.mat"
DIGEST = "b119468c2f13775df12d3950e7c96644811647a6e10d30617777f245bf9b2f8b"  # of the photographs
SIDE = 25  # pixels
PATCHES = 414  # patches of a photograph
TRAIN_PATCHES = 345  # of these, for training, where the person is one for training
TRAIN_FACES = 300  # photographs of the thirty people for training

_PHOTO = 64  # pixels
# SciPy's words for what numbers may be kept as; anything else, objects say, is not read.
_NUMBERS = {"double", "single", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32))}
_STEP = 2  # pixels of the enlarged photograph from one pixel of a patch to the next


def read(path: Path) -> np.ndarray:
    """The photographs in ``olivettifaces.mat``, verified.

    Args:
        path: the file.

    Returns:
        uint8 [400, 64, 64], upright, in the order of the file: ten of the first person, and so
        on.

    Raises:
        ValueError: the file is damaged or is another one.
    """
    advice = f"Put the published {FILE} there."
    shape = (_PHOTO * _PHOTO, 400)
    try:
        # Sizes first, from the headers; nothing is allocated on the word of the file.
        sizes = {name: (size, kind) for name, size, kind in scipy.io.whosmat(path)}
        size, kind = sizes.get("faces", (None, None))
        fits = size == shape and kind in _NUMBERS
        columns = scipy.io.loadmat(path, variable_names=["faces"])["faces"] if fits else None
    except Exception as error:  # SciPy has a different error for every kind of damage
        raise ValueError(f"{path} cannot be read as a MATLAB file: {error}. {advice}") from error
    if columns is None:
        found = "no such variable" if size is None else f"shape {size} of {kind}"
        raise ValueError(
            f"{path}: expected a variable 'faces' of shape {shape}, found {found}. {advice}"
        )
    photos = np.ascontiguousarray(columns.T).astype(np.uint8)
    if (found := hashlib.sha256(photos.data).hexdigest()) != DIGEST:
        raise ValueError(
            f"{path} does not hold the 400 Olivetti faces: expected SHA-256 {DIGEST} of the "
            f"pixels, found {found}. {advice}"
        )
    return photos.reshape(-1, _PHOTO, _PHOTO).transpose(0, 2, 1)  # columns come first in the file


def patches(photo: np.ndarray, seed: tuple[int, ...], count: int) -> np.ndarray:
    """Rotated, scaled, cropped and subsampled copies of the middle of a photograph.

    One bilinear look-up per pixel of a patch does all four steps.

    Args:
        photo: uint8 [64, 64].
        seed: the same seed gives the same patches.
        count: how many.

    Returns:
        uint8 [count, 25, 25].
    """
    rng = np.random.default_rng(seed)
    angle = rng.uniform(-np.pi / 2, np.pi / 2, count)
    step = _STEP / rng.uniform(1.4, 1.8, count)
    offsets = np.arange(SIDE) - (SIDE - 1) / 2
    row, column = offsets[None, :, None], offsets[None, None, :]
    cos, sin = (step * np.cos(angle))[:, None, None], (step * np.sin(angle))[:, None, None]
    where = np.stack([row * cos + column * sin, column * cos - row * sin]) + (_PHOTO - 1) / 2
    return np.rint(map_coordinates(photo.astype(np.float32), where, order=1)).astype(np.uint8)


def normalise(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Zero mean for every pixel and unit variance on average over the pixels.

    As in the paper, one number scales all: a patch keeps its contrast relative to the others'.
    The statistics are those of the training images (in the paper, of all images), and the test
    images are shifted and scaled alike.

    Args:
        train: float32 [examples, pixels]. Changed in place.
        test: float32 [examples, pixels]. Changed in place.

    Returns:
        Both.
    """
    mean = train.mean(axis=0, dtype=np.float64).astype(np.float32)
    train -= mean
    # A sum of squares without a second array of that size.
    scale = np.float32(np.sqrt(sum(np.vdot(row, row) for row in train) / train.size))
    train /= scale
    test -= mean
    test /= scale
    return train, test


class KfqnFaces(tfds.core.GeneratorBasedBuilder):
    """TFDS builder ``kfqn_faces``: uint8 [25, 25, 1], and the person's number as label.

    The patches are kept as they come, intensities 0 to 255; `normalise` is for the reader. Each
    split goes through all its photographs before a photograph comes again, so that a part of it
    is a fair sample.
    """

    name = "kfqn_faces"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}  # noqa: RUF012  # as TFDS declares it
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"{FILE}, from https://cs.nyu.edu/~roweis/data.html"
    code_path = None

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=(
                "25 x 25 patches of the Olivetti faces, rotated, scaled, cropped and subsampled by "
                "kfqn_optax after the description of the face data in Hinton and Salakhutdinov, "
                "'Reducing the Dimensionality of Data with Neural Networks', Science 313, 2006. "
                "These are not the patches used in that paper."
            ),
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Tensor(
                        shape=(SIDE, SIDE, 1),
                        dtype=np.uint8,
                        encoding=tfds.features.Encoding.BYTES,
                    ),
                    "label": tfds.features.ClassLabel(num_classes=40),
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        photos = read(Path(dl_manager.manual_dir) / FILE)
        every = np.stack([patches(photo, (0, face), PATCHES) for face, photo in enumerate(photos)])
        return {
            "train": self._generate_examples(every[:TRAIN_FACES, :TRAIN_PATCHES], 0),
            "validation": self._generate_examples(every[:TRAIN_FACES, TRAIN_PATCHES:], 0),
            "test": self._generate_examples(every[TRAIN_FACES:], TRAIN_FACES),
        }

    def _generate_examples(
        self, images: np.ndarray, first_face: int
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        faces, count = images.shape[:2]
        for key in range(faces * count):
            patch, face = divmod(key, faces)
            yield key, {"image": images[face, patch, ..., None], "label": (first_face + face) // 10}
