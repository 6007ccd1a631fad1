"""TFDS's own `mnist` and `fashion_mnist`, prepared without TensorFlow.

TFDS's builders open the raw files, and encode the images, with TensorFlow. The two classes here
inherit name, version, features and everything else from them and replace just those steps, so
what they prepare *is* TFDS's data set: ``tfds.data_source("mnist", split="train")`` finds it, in
any program, afterwards.

That name is a promise, so the content is checked: only files that hold exactly the published
arrays are accepted. The order of the examples is TFDS's, which shuffles them once by a hash of
their number.
"""

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import registered

from kfqn_optax.experiment.datasets import idx, png

FILES = (  # split, shape, name; images and labels of a split in turn
    ("train", (60_000, 28, 28), "train-images-idx3-ubyte"),
    ("train", (60_000,), "train-labels-idx1-ubyte"),
    ("test", (10_000, 28, 28), "t10k-images-idx3-ubyte"),
    ("test", (10_000,), "t10k-labels-idx1-ubyte"),
)

# SHA-256 of the arrays, without the idx header, in the order of FILES.
DIGESTS = {
    "mnist": (
        "741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757",
        "1feba77c54802fa5339a11837ea4b2866434b83314ec45192930f1df69120c13",
        "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161",
        "ddeff807876a9661a1110d45c266c86239a3a1b7d37da0c3716a7a683c852ff5",
    ),
    "fashion_mnist": (
        "2e487a6c89124f78f2d7521542223cafe96f7123c3ca13d447772ac6ecbb3012",
        "657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7",
        "c867c93ff95360594e8ec3287995350b824dd110b11595c0e13d5423f621867a",
        "3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9",
    ),
}


def find(folder: Path, name: str) -> Path | None:
    """The raw file of this name in the folder, with ``.gz`` or without, or None."""
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    return None


def read(problem: str, paths: list[Path]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The images and labels in the four raw files, verified.

    Args:
        problem: ``mnist`` or ``fashion_mnist``.
        paths: the files, in the order of `FILES`, compressed or not.

    Returns:
        For ``train`` and ``test``: images, uint8 [examples, 28, 28], and labels, uint8
        [examples].

    Raises:
        ValueError: a file is damaged or does not hold this problem's data.
    """
    arrays: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    for (split, shape, name), path, digest in zip(FILES, paths, DIGESTS[problem], strict=True):
        array = idx.read(path, shape)
        found = hashlib.sha256(array.data).hexdigest()
        if found != digest:
            raise ValueError(
                f"{path} is not the {name} of '{problem}': expected an array with SHA-256 "
                f"{digest}, found {found}{_owner(found)}. Put the published file there, or into a "
                f"sub-folder '{problem}'."
            )
        arrays[split].append(array)
    return {split: (images, labels) for split, (images, labels) in arrays.items()}


def _owner(digest: str) -> str:
    owners = [problem for problem, digests in DIGESTS.items() if digest in digests]
    return f", which belongs to '{owners[0]}'" if owners else ""


class _WithoutTensorFlow:
    """The steps of TFDS's builders that need TensorFlow, done without it.

    The raw files are taken from TFDS's manual folder, `tfds.download.DownloadConfig.manual_dir`,
    or, on request, downloaded by TFDS, which verifies the archives by its own checksums.
    """

    name: ClassVar[str]
    URL: ClassVar[str]
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Four idx files: " + ", ".join(f"{f[2]}.gz" for f in FILES)
    code_path = None
    pkg_dir_path = None

    def __init__(self, *, download: bool = False, **kwargs: Any):
        self._download = download
        super().__init__(**kwargs)

    @property
    def url_infos(self) -> Any:
        return tfds.builder_cls(self.name).url_infos if self._download else None

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        names = [name for _, _, name in FILES]
        if self._download:
            archives = dl_manager.download([f"{self.URL}{name}.gz" for name in names])
            paths = [Path(archive) for archive in archives]
        else:
            folder = Path(dl_manager.manual_dir)
            paths = [find(folder, name) or folder / f"{name}.gz" for name in names]
        return {
            split: self._generate_examples(images, labels)
            for split, (images, labels) in read(self.name, paths).items()
        }

    def _generate_examples(
        self, images: np.ndarray, labels: np.ndarray
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for key, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield key, {"image": io.BytesIO(png.encode(image)), "label": int(label)}


# Typed as Any: TFDS declares only that these are builders.
_TFDS_MNIST: Any = tfds.builder_cls("mnist")
_TFDS_FASHION_MNIST: Any = tfds.builder_cls("fashion_mnist")

with registered.skip_registration():  # the names stay with TFDS's own classes

    class Mnist(_WithoutTensorFlow, _TFDS_MNIST):
        """TFDS's `mnist`."""

        name = "mnist"

    class FashionMnist(_WithoutTensorFlow, _TFDS_FASHION_MNIST):
        """TFDS's `fashion_mnist`."""

        name = "fashion_mnist"
