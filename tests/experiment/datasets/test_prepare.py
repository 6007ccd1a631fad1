"""Preparing: where raw files are looked for, and TFDS folders in a bad state."""

import gzip

import numpy as np
import pytest

pytest.importorskip("tensorflow_datasets", reason="needs the extra 'experiment'")

import tensorflow_datasets as tfds

from kfqn_optax.experiment import datasets
from kfqn_optax.experiment.datasets import curves_builder, prepare


def test_default_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert prepare.tfds_folder() == tmp_path / "tensorflow_datasets"


def test_uncompressed_files_in_the_manual_folder(tiny_mnist, tfds_folder):
    manual = tfds_folder / "downloads" / "manual"
    manual.mkdir(parents=True)
    for path in tiny_mnist["mnist"].iterdir():
        (manual / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    assert datasets.load("mnist").train.shape == (20, 784)


def test_folder_of_the_user_comes_first(tiny_mnist, tfds_folder):
    manual = tfds_folder / "downloads" / "manual"
    manual.parent.mkdir(parents=True)
    tiny_mnist["fashion_mnist"].rename(manual)
    data = datasets.load("mnist", tiny_mnist["mnist"])
    assert data.train.shape == (20, 784)


def test_missing_raw_files(tiny_mnist, tmp_path, tfds_folder):
    nowhere = tmp_path / "nowhere"
    with pytest.raises(FileNotFoundError) as error:
        datasets.load("mnist", nowhere)
    for word in ("train-images-idx3-ubyte.gz", nowhere, tfds_folder, "--config.download=true"):
        assert str(word) in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"olivettifaces\.mat.*--config\.data_dir\)\.$"):
        datasets.load("faces", nowhere, download=True)  # TFDS has no address for it
    (tiny_mnist["mnist"] / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"some raw files .* not t10k-labels-idx1-ubyte"):
        datasets.load("mnist", tiny_mnist["mnist"])
    assert not nowhere.exists()
    assert not tfds_folder.exists()


def test_download(tiny_mnist, monkeypatch):
    def download(self, urls):
        return [tiny_mnist["mnist"] / url.rsplit("/", 1)[1] for url in urls]

    monkeypatch.setattr(tfds.download.DownloadManager, "download", download)
    data = datasets.load("mnist", download=True)
    assert data.train.shape == (20, 784)


def test_download_without_network(tiny_mnist, monkeypatch):
    def download(self, urls):
        raise OSError("no route to host")

    monkeypatch.setattr(tfds.download.DownloadManager, "download", download)
    with pytest.raises(ConnectionError, match="could not be downloaded: no route to host"):
        datasets.load("mnist", download=True)


def test_unwritable_folder(tiny_curves, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "file" / "tfds"))
    with pytest.raises(PermissionError, match=r"cannot be written .*TFDS_DATA_DIR"):
        datasets.load("curves")


def test_interrupted_preparation_leaves_nothing_complete(tiny_curves, tfds_folder, monkeypatch):
    def examples(self, examples, seed):
        yield 0, {"image": np.zeros((28, 28, 1), np.uint8)}
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(curves_builder.KfqnCurves, "_generate_examples", examples)
        with pytest.raises(KeyboardInterrupt):
            datasets.load("curves")
    assert not (tfds_folder / "kfqn_curves" / "1.0.0").exists()
    # What a killed process leaves behind does no harm either.
    (tfds_folder / "kfqn_curves" / "incomplete.ABCDEF_1.0.0").mkdir(parents=True)
    assert datasets.load("curves").train.shape == (30, 784)


def test_another_process_is_faster(tiny_curves, monkeypatch):
    """Its finished set is used, not an error reported."""
    original = curves_builder.KfqnCurves.download_and_prepare

    def overtaken(self, **kwargs):
        original(self, **kwargs)
        raise OSError("Directory not empty")

    monkeypatch.setattr(curves_builder.KfqnCurves, "download_and_prepare", overtaken)
    assert datasets.load("curves").train.shape == (30, 784)


def test_a_disk_that_is_full(tiny_curves, monkeypatch):
    def download_and_prepare(self, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(curves_builder.KfqnCurves, "download_and_prepare", download_and_prepare)
    with pytest.raises(OSError, match="no space left"):
        datasets.load("curves")


def test_incomplete_folder(tiny_curves, tfds_folder):
    datasets.load("curves")
    folder = tfds_folder / "kfqn_curves" / "1.0.0"
    shard = next(folder.glob("*test*"))
    shard.rename(folder / "away")
    with pytest.raises(ValueError, match=rf"only a part .*{shard.name}.*Remove this folder"):
        datasets.load("curves")
    (folder / "away").rename(shard)
    info = folder / "dataset_info.json"
    text = info.read_text()
    info.write_text(text.replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match=r"cannot be read .*needs no TensorFlow"):
        datasets.load("curves")
    info.write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match="cannot be read"):
        datasets.load("curves")
    info.unlink()
    with pytest.raises(ValueError, match=r"only a part .*its description"):
        datasets.load("curves")
