"""Every test has a TFDS folder of its own, and small data sets to prepare in it.

Nothing is downloaded and nothing is written outside pytest's temporary folders. The modules that
import TFDS are imported in the fixtures, so that tests which need no TFDS run without it.
"""

import gzip
import hashlib

import numpy as np
import pytest
from raw_files import idx_bytes


@pytest.fixture(autouse=True)
def tfds_folder(tmp_path, monkeypatch):
    """An empty TFDS folder for every test."""
    folder = tmp_path / "tfds"
    monkeypatch.setenv("TFDS_DATA_DIR", str(folder))
    return folder


@pytest.fixture
def tiny_mnist(tmp_path, monkeypatch):
    """Raw files of a small `mnist` and `fashion_mnist`, accepted in place of the published ones."""
    from kfqn_optax.experiment.datasets import mnist

    rng = np.random.default_rng(0)
    files = tuple((split, (len(split) * 4, *rest), name) for split, (_, *rest), name in mnist.FILES)
    monkeypatch.setattr(mnist, "FILES", files)
    digests, folders = {}, {}
    for problem in ("mnist", "fashion_mnist"):
        folders[problem] = folder = tmp_path / "raw" / problem
        folder.mkdir(parents=True)
        arrays = [rng.integers(0, 10, shape, np.uint8) for _, shape, _ in files]
        for array, (_, _, name) in zip(arrays, files, strict=True):
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx_bytes(array)))
        digests[problem] = tuple(hashlib.sha256(array.data).hexdigest() for array in arrays)
    monkeypatch.setattr(mnist, "DIGESTS", digests)
    return folders


@pytest.fixture
def tiny_curves(monkeypatch):
    """CURVES of 30 images for training and 20 for testing."""
    from kfqn_optax.experiment.datasets import curves

    monkeypatch.setattr(curves, "TRAIN_EXAMPLES", 30)
    monkeypatch.setattr(curves, "TEST_EXAMPLES", 20)
