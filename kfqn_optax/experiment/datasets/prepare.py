"""From a problem's name to a prepared data set in the TFDS folder.

The TFDS folder is the environment variable ``TFDS_DATA_DIR``, or ``~/tensorflow_datasets``;
nothing is written outside it. The rules, in order:

1. A complete prepared set there is used as it is. Only files with exactly the published content
   are ever prepared, so it cannot disagree with raw files that the user names.
2. Otherwise raw files are looked for in the user's folder, then in TFDS's manual folder
   ``<TFDS folder>/downloads/manual``; in each, a sub-folder named after the problem comes first.
   The first of these folders that holds one of the files must hold all.
3. Otherwise, and only on request, TFDS downloads them.

TFDS prepares into a folder of another name, which it renames at the end: a run that is
interrupted leaves nothing that looks complete.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from kfqn_optax.experiment.datasets import curves_builder, faces, mnist

_MNIST_FILES = tuple(f"{name}.gz" for _, _, name in mnist.FILES)

# Problem: builder, raw files, whether TFDS can download them.
_SOURCES: dict[str, tuple[Any, tuple[str, ...], bool]] = {
    "curves": (curves_builder.KfqnCurves, (), False),
    "mnist": (mnist.Mnist, _MNIST_FILES, True),
    "fashion_mnist": (mnist.FashionMnist, _MNIST_FILES, True),
    "faces": (faces.KfqnFaces, (faces.FILE,), False),
}


def tfds_folder() -> Path:
    """Where TFDS keeps its data sets. Read at each call, unlike TFDS's own constant."""
    folder = os.environ.get("TFDS_DATA_DIR") or Path("~") / "tensorflow_datasets"
    return Path(folder).expanduser()


def prepared(problem: str, data_dir: str | os.PathLike | None, download: bool) -> Any:
    """A builder whose data set is on disk; prepares it if it is not there yet.

    Args:
        problem: ``curves``, ``mnist``, ``fashion_mnist`` or ``faces``.
        data_dir: a folder with raw files, or None.
        download: whether TFDS may fetch raw files that are not found.

    Returns:
        The `tfds.core.DatasetBuilder`.

    Raises:
        ValueError: a raw file is damaged or not the published one, or an earlier preparation is
            not readable.
        FileNotFoundError: raw files are needed and not there.
        PermissionError: the TFDS folder cannot be written to.
        ConnectionError: the download failed.
    """
    cls, files, can_download = _SOURCES[problem]
    builder = _open(cls)
    if _is_complete(builder):
        return builder
    folder = _raw_folder(problem, files, data_dir)
    if files and folder is None and not (download and can_download):
        raise FileNotFoundError(_missing(problem, files, data_dir, can_download))
    _check_writable(builder)
    downloads = bool(files) and folder is None
    if downloads:
        builder = _open(cls, download=True)
    try:
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(manual_dir=folder)
        )
    except OSError as error:
        # Another process may have finished the same preparation first.
        builder = _open(cls)
        if _is_complete(builder):
            return builder
        if downloads:
            raise ConnectionError(
                f"The raw files of '{problem}' could not be downloaded: {error}. Put "
                f"{', '.join(files)} into a folder and name it with data_dir (--config.data_dir)."
            ) from error
        raise
    return builder


def _open(cls: Any, **kwargs: Any) -> Any:
    root = tfds_folder()
    try:
        return cls(data_dir=root, file_format="array_record", **kwargs)
    except Exception as error:  # a damaged description can raise anything
        raise ValueError(
            f"{root / cls.name / str(cls.VERSION)} cannot be read as a data set in the format "
            f"'array_record', the one that needs no TensorFlow: {error}. Remove that folder, or "
            "let the environment variable TFDS_DATA_DIR name another one; the next run prepares "
            f"'{cls.name}' again."
        ) from error


def _is_complete(builder: Any) -> bool:
    """Whether the data set is there; an error if only a part of it is."""
    path = Path(builder.data_path)
    if not path.exists():
        return False
    splits = builder.info.splits
    missing = [f for split in splits.values() for f in split.filepaths if not Path(f).is_file()]
    if missing or not {"train", "test"} <= set(splits):
        raise ValueError(
            f"{path} holds only a part of the data set '{builder.name}' (missing: "
            f"{missing[0] if missing else 'its description'}). Remove this folder; the next run "
            "prepares it again."
        )
    return True


def _folders(problem: str, data_dir: str | os.PathLike | None) -> list[Path]:
    given = [Path(data_dir).expanduser()] if data_dir else []
    places = [*given, tfds_folder() / "downloads" / "manual"]
    return [folder for place in places for folder in (place / problem, place)]


def _raw_folder(
    problem: str, files: tuple[str, ...], data_dir: str | os.PathLike | None
) -> Path | None:
    """The first folder with raw files of the problem, or None; an error if it lacks some."""
    for folder in _folders(problem, data_dir):
        missing = [f for f in files if mnist.find(folder, f.removesuffix(".gz")) is None]
        if len(missing) == len(files):
            continue
        if missing:
            raise FileNotFoundError(
                f"{folder} holds some raw files of '{problem}', but not {', '.join(missing)}. "
                "Put all of them there."
            )
        return folder
    return None


def _missing(
    problem: str, files: tuple[str, ...], data_dir: str | os.PathLike | None, can_download: bool
) -> str:
    """The sentence for raw files that are nowhere."""
    places = " or ".join(str(folder) for folder in _folders(problem, data_dir)[1::2])
    ask = ", or pass download=True (--config.download=true)" if can_download else ""
    return (
        f"The data set '{problem}' is not prepared in {tfds_folder()} and its raw files "
        f"({', '.join(files)}) are not in {places}: put them into a folder and name it with "
        f"data_dir (--config.data_dir){ask}."
    )


def _check_writable(builder: Any) -> None:
    """Refuses early, in a sentence, where the preparation would fail late."""
    root = tfds_folder()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        raise PermissionError(
            f"The data set '{builder.name}' is to be prepared in {root}, which cannot be written "
            f"to ({error}). Let the environment variable TFDS_DATA_DIR name a folder that can."
        ) from error
