"""FACES: patches of photographs, their normalisation, and the file of the photographs."""

import hashlib

import numpy as np
import pytest
from raw_files import published

pytest.importorskip("tensorflow_datasets", reason="needs the extra 'experiment'")

import scipy.io

from kfqn_optax.experiment import datasets
from kfqn_optax.experiment.datasets import faces


@pytest.fixture
def tiny_faces(tmp_path, monkeypatch):
    """A folder with an `olivettifaces.mat` of noise, and three patches a photograph."""
    photos = np.random.default_rng(0).integers(0, 256, (400, 64, 64), np.uint8)
    columns = photos.transpose(0, 2, 1).reshape(400, -1)
    scipy.io.savemat(tmp_path / faces.FILE, {"faces": columns.T})
    monkeypatch.setattr(faces, "DIGEST", hashlib.sha256(columns.tobytes()).hexdigest())
    monkeypatch.setattr(faces, "PATCHES", 3)
    monkeypatch.setattr(faces, "TRAIN_PATCHES", 2)
    return tmp_path, photos


def test_patches_repeat_and_differ():
    photo = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    first = faces.patches(photo, (0, 1), 50)
    assert first.shape == (50, 25, 25)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, faces.patches(photo, (0, 1), 50))
    assert (first != faces.patches(photo, (0, 2), 50)).any(axis=(1, 2)).all()
    # The centre of a patch is the centre of the photograph, whatever the angle and the scale.
    np.testing.assert_array_equal(first[:, 12, 12], np.rint(photo[31:33, 31:33].mean()))


def test_patches_are_turned_and_scaled():
    """On a slope, a patch is a slope; its gradient's direction and length give angle and scale."""
    row, column = np.mgrid[:64, :64]
    photo = (2 * row + 1 * column).astype(np.uint8)
    images = faces.patches(photo, (0, 0), 400).astype(float)
    down = (images[:, -1] - images[:, 0]).mean(axis=1) / 24
    right = (images[:, :, -1] - images[:, :, 0]).mean(axis=1) / 24
    step = np.hypot(down, right) / np.sqrt(5)
    angle = np.arctan2(1, 2) - np.arctan2(right, down)
    angle = np.degrees((angle + np.pi) % (2 * np.pi) - np.pi)
    assert 2 / 1.8 - 0.02 < step.min() < 1.15
    assert 1.4 < step.max() < 2 / 1.4 + 0.02
    assert -91 < angle.min() < -80
    assert 80 < angle.max() < 91


def test_normalise():
    rng = np.random.default_rng(0)
    train = rng.normal(100, 30, (50, 4)).astype(np.float32)
    test = train[:10].copy()
    scaled, scaled_test = faces.normalise(train.copy(), test.copy())
    np.testing.assert_allclose(scaled.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose((scaled**2).mean(), 1, rtol=1e-6)
    np.testing.assert_allclose(scaled_test, scaled[:10], rtol=1e-6)


def test_faces_keep_people_apart(tiny_faces):
    folder, photos = tiny_faces
    data = datasets.load("faces", folder)
    assert data.image_shape == (25, 25)
    assert data.train.shape == (600, 625)
    assert data.test.shape == (300, 625)
    assert data.train.dtype == data.test.dtype == np.float32
    np.testing.assert_allclose(data.train.mean(axis=0), 0, atol=1e-5)
    assert (data.train**2).mean() == pytest.approx(1, rel=1e-5)
    # Training: photographs 0 to 299, their first patch, then their second one. Testing: the others.
    expected = np.stack([faces.patches(photos[i], (0, i), 3) for i in range(400)]).astype(
        np.float32
    )
    train = expected[:300, :2].transpose(1, 0, 2, 3).reshape(600, 625)
    test = expected[300:].transpose(1, 0, 2, 3).reshape(300, 625)
    for images, wanted in zip(data[2:], faces.normalise(train, test), strict=True):
        np.testing.assert_allclose(images, wanted, atol=1e-5)
    some = datasets.load("faces", train_examples=300)
    assert some.train.shape == (300, 625)
    assert (some.train**2).mean() == pytest.approx(1, rel=1e-5)


def test_real_faces_are_upright():
    photos = faces.read(published("faces") / faces.FILE)
    assert photos.shape == (400, 64, 64)
    face = photos.mean(axis=0)
    mirrored = np.corrcoef(face.ravel(), face[:, ::-1].ravel())[0, 1]
    transposed = np.corrcoef(face.ravel(), face.T.ravel())[0, 1]
    assert mirrored > 0.9 > transposed


@pytest.mark.slow
def test_faces_in_full():
    data = datasets.load("faces", published("faces").parent)
    assert data.train.shape == (103_500, 625)
    assert data.test.shape == (41_400, 625)
    # 30 principal components: 135 in the paper.
    _, basis = np.linalg.eigh(np.cov(data.train, rowvar=False))
    rest = data.test @ basis[:, :-30]
    assert (rest**2).sum(axis=1).mean() == pytest.approx(133, abs=2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_bytes(b"no MATLAB file" * 50), "cannot be read as a MATLAB file"),
        (lambda path: scipy.io.savemat(path, {"face": [1]}), "found no such variable"),
        (lambda path: scipy.io.savemat(path, {"faces": [[1]]}), r"found shape \(1, 1\)"),
        (
            lambda path: scipy.io.savemat(path, {"faces": np.zeros((4096, 400), np.uint8)}),
            "does not hold the 400 Olivetti faces",
        ),
    ],
)
def test_wrong_faces_file(tmp_path, make, message):
    make(tmp_path / faces.FILE)
    with pytest.raises(ValueError, match=message) as error:
        datasets.load("faces", tmp_path)
    assert str(tmp_path / faces.FILE) in str(error.value)


def test_sizes_are_looked_at_before_anything_is_read(tmp_path, monkeypatch):
    def loadmat(*_, **__):
        raise AssertionError("it was read")

    scipy.io.savemat(tmp_path / faces.FILE, {"faces": np.zeros((4096, 401), np.uint8)})
    monkeypatch.setattr(scipy.io, "loadmat", loadmat)
    with pytest.raises(ValueError, match=r"found shape \(4096, 401\) of uint8"):
        faces.read(tmp_path / faces.FILE)
