"""Data sets: the generators, the raw files' parsers, and `load` on a TFDS folder of its own.

Nothing is downloaded and nothing is written outside pytest's temporary folders.
"""

import gzip
import hashlib
import importlib
import io
import pathlib
import struct
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("tensorflow_datasets", reason="needs the extra 'experiment'")

import scipy.io
import tensorflow_datasets as tfds

from kfqn_optax.experiment import datasets
from kfqn_optax.experiment.datasets import curves, faces, idx, mnist, png, prepare, text

RAW = pathlib.Path(__file__).parents[2].parent / "shared" / "data"
needs_mnist = pytest.mark.skipif(
    not (RAW / "mnist").is_dir(), reason=f"the MNIST files are not in {RAW / 'mnist'}"
)
needs_faces = pytest.mark.skipif(
    not (RAW / "faces").is_dir(), reason=f"{faces.FILE} is not in {RAW / 'faces'}"
)


@pytest.fixture(autouse=True)
def tfds_folder(tmp_path, monkeypatch):
    """An empty TFDS folder for every test."""
    folder = tmp_path / "tfds"
    monkeypatch.setenv("TFDS_DATA_DIR", str(folder))
    return folder


def idx_bytes(array):
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.tobytes()


@pytest.fixture
def tiny_mnist(tmp_path, monkeypatch):
    """Raw files of a small `mnist` and `fashion_mnist`, accepted in place of the published ones."""
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
    monkeypatch.setattr(curves, "TRAIN_EXAMPLES", 30)
    monkeypatch.setattr(curves, "TEST_EXAMPLES", 20)


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


# --- importing -----------------------------------------------------------------------------------


def test_import_is_light():
    program = (
        "import sys, kfqn_optax.experiment.datasets as d; d.load;"
        "assert not {'tensorflow', 'tensorflow_datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# --- CURVES --------------------------------------------------------------------------------------


def test_parabolas_meet_their_points():
    points = np.random.default_rng(0).uniform(5, 22, (50, 3, 2))
    sampled = curves.parabolas(points)
    assert sampled.shape == (50, 96, 2)
    np.testing.assert_allclose(sampled[:, 0], points[:, 0])
    np.testing.assert_allclose(sampled[:, -1], points[:, 2])
    nearest = np.linalg.norm(sampled - points[:, 1:2], axis=-1).min(axis=1)
    assert nearest.max() < 0.7  # half of the largest distance between samples


def test_stroke_has_intensity_one_on_a_straight_line_and_none_away_from_it():
    line = np.stack([np.full(96, 14.0), np.linspace(4, 23, 96)], axis=-1)
    image = curves.stroke(line[None])[0]
    assert image.dtype == np.float32
    np.testing.assert_allclose(image[14, 8:20], 1, atol=1e-3)
    np.testing.assert_allclose(image[15, 8:20], np.exp(-0.5 / 1.1**2), atol=1e-3)
    assert image[:8].max() < 1e-4


def test_curves_repeat_and_differ():
    images = curves.generate(50, seed=3)
    assert images.shape == (50, 28, 28)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images, curves.generate(50, seed=3))
    np.testing.assert_array_equal(images[:20], curves.generate(20, seed=3))
    assert len(np.unique(images.reshape(50, -1), axis=0)) == 50
    assert (images != curves.generate(50, seed=4)).any(axis=(1, 2)).all()
    assert (images.max(axis=(1, 2)) > 200).all()


def test_curves_in_full(tfds_folder):
    data = datasets.load("curves")
    assert data.name == "curves"
    assert data.image_shape == (28, 28)
    assert data.train.shape == (20_000, 784)
    assert data.test.shape == (10_000, 784)
    for images in data.train, data.test:
        assert images.dtype == np.float32
        assert images.flags.c_contiguous
        assert images.min() == 0
        assert images.max() == 1
        assert images.mean() == pytest.approx(0.066, abs=0.001)
    np.testing.assert_array_equal(
        data.test[:5], curves.generate(5, seed=1).reshape(5, -1) / np.float32(255)
    )
    # 18 principal components: 5.90 in the paper.
    centre = data.train.mean(axis=0)
    _, basis = np.linalg.eigh(np.cov(data.train, rowvar=False))
    rest = (data.test - centre) @ basis[:, :-18]
    assert (rest**2).sum(axis=1).mean() == pytest.approx(5.9, abs=0.1)
    source = tfds.data_source(
        "kfqn_curves", split="train", data_dir=tfds_folder, download=False,
        builder_kwargs={"file_format": "array_record"},
    )  # fmt: skip
    assert len(source) == 20_000
    assert source[0]["image"].shape == (28, 28, 1)


# --- FACES ---------------------------------------------------------------------------------------


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


@needs_faces
def test_real_faces_are_upright():
    photos = faces.read(RAW / "faces" / faces.FILE)
    assert photos.shape == (400, 64, 64)
    face = photos.mean(axis=0)
    mirrored = np.corrcoef(face.ravel(), face[:, ::-1].ravel())[0, 1]
    transposed = np.corrcoef(face.ravel(), face.T.ravel())[0, 1]
    assert mirrored > 0.9 > transposed


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


# --- idx and PNG files ---------------------------------------------------------------------------

IMAGES = np.arange(24, dtype=np.uint8).reshape(4, 3, 2)


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_idx(tmp_path, pack):
    path = tmp_path / "file"
    path.write_bytes(pack(idx_bytes(IMAGES)))
    np.testing.assert_array_equal(idx.read(path, (4, 3, 2)), IMAGES)


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected the bytes 00 00 08 03, found none"),
        (b"\x00\x00\x0d\x03" + idx_bytes(IMAGES)[4:], "found 00 00 0d 03"),  # float32
        (idx_bytes(IMAGES[0]), "found 00 00 08 02"),
        (idx_bytes(IMAGES)[:10], "ends within its header: expected 16 bytes, found 10"),
        (idx_bytes(IMAGES[:3]), r"holds an array of shape \(3, 3, 2\), expected \(4, 3, 2\)"),
        (b"\x00\x00\x08\x03" + b"\xff" * 12, r"shape \(4294967295, .*expected \(4, 3, 2\)"),
        (idx_bytes(IMAGES)[:-5], "cut short: expected 24 bytes .* found 19"),
        (idx_bytes(IMAGES) + b"\x00", "too long: expected it to end after 24 bytes"),
    ],
    ids=["empty", "type", "axes", "header", "shape", "huge", "short", "trailing"],
)
def test_wrong_idx(tmp_path, pack, content, message):
    path = tmp_path / "file-idx3-ubyte"
    path.write_bytes(pack(content))
    with pytest.raises(ValueError, match=message) as error:
        idx.read(path, (4, 3, 2))
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda packed: packed[:-9], "no end"),
        (lambda packed: packed[:-8] + bytes(8), "not a sound gzip file"),
        (lambda packed: packed[:12] + b"\xff" * 8 + packed[20:], "not a sound gzip file"),
        (lambda packed: packed + b"more", "not a sound gzip file"),
    ],
    ids=["truncated", "checksum", "stream", "trailing"],
)
def test_damaged_gzip(tmp_path, damage, message):
    path = tmp_path / "file-idx3-ubyte.gz"
    path.write_bytes(damage(gzip.compress(idx_bytes(IMAGES))))
    with pytest.raises(ValueError, match=message) as error:
        idx.read(path, (4, 3, 2))
    assert str(path) in str(error.value)


def test_png_with_and_without_row_filters():
    image_module = pytest.importorskip("PIL.Image")
    image = np.add.outer(np.arange(28), np.arange(20)).astype(np.uint8)
    ours = png.encode(image)
    np.testing.assert_array_equal(png.decode(ours), image)
    np.testing.assert_array_equal(np.asarray(image_module.open(io.BytesIO(ours))), image)
    theirs = io.BytesIO()
    image_module.fromarray(image).save(theirs, "png")
    assert theirs.getvalue() != ours
    np.testing.assert_array_equal(png.decode(theirs.getvalue()), image)


# --- MNIST and Fashion-MNIST ---------------------------------------------------------------------


def contents(folder):
    return mnist.read(folder.name, [mnist.find(folder, name) for _, _, name in mnist.FILES])


@pytest.mark.parametrize("problem", ["mnist", "fashion_mnist"])
def test_mnist_is_prepared_once_as_tfds_own(tiny_mnist, tfds_folder, problem):
    folder = tiny_mnist[problem]
    before = sorted(folder.parent.rglob("*"))
    data = datasets.load(problem, folder.parent)  # finds the sub-folder
    assert sorted(folder.parent.rglob("*")) == before
    assert data.name == problem
    assert data.image_shape == (28, 28)
    for images, (wanted, _) in zip(data[2:], contents(folder).values(), strict=True):
        assert images.dtype == np.float32
        assert images.flags.c_contiguous
        rows = np.rint(images * 255).astype(np.uint8)
        assert images.max() == np.float32(9) / np.float32(255)
        assert sorted(map(bytes, rows)) == sorted(map(bytes, wanted))

    # Without raw files, from the prepared set; a part of it.
    again = datasets.load(problem, train_examples=7)
    np.testing.assert_array_equal(again.train, data.train[:7])
    np.testing.assert_array_equal(again.test, data.test)

    # By TFDS's own call.
    pytest.importorskip("PIL")
    source = tfds.data_source(problem, split="test", data_dir=tfds_folder, download=False)
    np.testing.assert_array_equal(source[0]["image"].ravel(), np.rint(data.test[0] * 255))
    images, labels = contents(folder)["test"]
    labels = dict(zip(map(bytes, images), labels, strict=True))
    for example in source:
        assert example["label"] == labels[bytes(example["image"])]


def test_labels_stay_with_their_images(tiny_mnist):
    data = datasets.load("fashion_mnist_cnn", tiny_mnist["fashion_mnist"], train_examples=15)
    assert (data.name, data.image_shape) == ("fashion_mnist_cnn", (28, 28))
    alone = datasets.load("fashion_mnist")
    for split, wanted, count in (("train", alone.train, 15), ("test", alone.test, 16)):
        images, labels = getattr(data, split)
        assert images.shape == (count, 28, 28, 1)
        assert (images.dtype, labels.dtype) == (np.float32, np.int32)
        np.testing.assert_array_equal(images.reshape(count, -1), wanted[:count])
        raw, answers = contents(tiny_mnist["fashion_mnist"])[split]
        answers = dict(zip(map(bytes, raw), answers, strict=True))
        pixels = np.rint(images * 255).astype(np.uint8)
        assert [answers[bytes(image)] for image in pixels] == labels.tolist()


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


def test_wrong_mnist(tiny_mnist, tfds_folder):
    with pytest.raises(ValueError, match=r"train-images.*not the .* of 'mnist'.*'fashion_mnist'"):
        datasets.load("mnist", tiny_mnist["fashion_mnist"])
    assert not (tfds_folder / "mnist" / "3.0.1").exists()


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


@needs_mnist
def test_real_mnist_files():
    arrays = contents(RAW / "mnist")
    assert arrays["train"][0].shape == (60_000, 28, 28)
    assert arrays["train"][1][:5].tolist() == [5, 0, 4, 1, 9]
    assert arrays["test"][1][:5].tolist() == [7, 2, 1, 0, 4]


@pytest.mark.slow
@needs_mnist
def test_mnist_in_full():
    data = datasets.load("mnist", RAW)
    assert data.train.shape == (60_000, 784)
    assert data.test.shape == (10_000, 784)
    assert data.train.mean() == pytest.approx(0.1307, abs=1e-4)


@pytest.mark.slow
@needs_faces
def test_faces_in_full():
    data = datasets.load("faces", RAW)
    assert data.train.shape == (103_500, 625)
    assert data.test.shape == (41_400, 625)
    # 30 principal components: 135 in the paper.
    _, basis = np.linalg.eigh(np.cov(data.train, rowvar=False))
    rest = data.test @ basis[:, :-30]
    assert (rest**2).sum(axis=1).mean() == pytest.approx(133, abs=2)


# --- text ----------------------------------------------------------------------------------------


def test_text_of_this_python():
    data = datasets.load("char_transformer")
    whole = text.read()
    assert (data.name, data.characters) == ("char_transformer", len(whole))
    assert data.sha256 == hashlib.sha256(whole.encode()).hexdigest()
    assert data.contents == "windows of 64 characters"
    cut = int(0.9 * len(whole))
    assert len(data.train.inputs) == (cut - 1) // 64
    assert len(data.test.inputs) == (len(whole) - cut - 1) // 64
    for (inputs, labels), start in ((data.train, 0), (data.test, cut)):
        assert inputs.shape == labels.shape
        assert inputs.dtype == labels.dtype == np.int32
        decoded = "".join(text.ALPHABET[code] for code in inputs.ravel())
        following = "".join(text.ALPHABET[code] for code in labels.ravel())
        original = "".join(c if c in text.ALPHABET else text.ALPHABET[-1] for c in whole)
        assert original[start:].startswith(decoded)
        assert original[start + 1 :].startswith(following)
    some = datasets.load("char_transformer", train_examples=7)
    np.testing.assert_array_equal(some.train.inputs, data.train.inputs[:7])
    np.testing.assert_array_equal(some.test.labels, data.test.labels)
    with pytest.raises(ValueError, match=r"but 'char_transformer' has \d+ training windows"):
        datasets.load("char_transformer", train_examples=10**6)


def test_python_without_its_text(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(FileNotFoundError, match=r"no pydoc_data\.topics"):
        datasets.load("char_transformer")


# --- asking wrongly, and folders in a bad state --------------------------------------------------


def test_wrong_requests(tiny_curves):
    with pytest.raises(ValueError, match="no problem 'cifar'; choose one of mnist, curves"):
        datasets.load("cifar")
    with pytest.raises(ValueError, match="train_examples is 0"):
        datasets.load("curves", train_examples=0)
    with pytest.raises(ValueError, match="train_examples is 31, but 'curves' has 30"):
        datasets.load("curves", train_examples=31)
    assert datasets.load("curves", train_examples=30).train.shape == (30, 784)


def test_unwritable_folder(tiny_curves, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "file" / "tfds"))
    with pytest.raises(PermissionError, match=r"cannot be written .*TFDS_DATA_DIR"):
        datasets.load("curves")


def test_default_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert prepare.tfds_folder() == tmp_path / "tensorflow_datasets"


def test_interrupted_preparation_leaves_nothing_complete(tiny_curves, tfds_folder, monkeypatch):
    def examples(self, examples, seed):
        yield 0, {"image": np.zeros((28, 28, 1), np.uint8)}
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(curves.KfqnCurves, "_generate_examples", examples)
        with pytest.raises(KeyboardInterrupt):
            datasets.load("curves")
    assert not (tfds_folder / "kfqn_curves" / "1.0.0").exists()
    # What a killed process leaves behind does no harm either.
    (tfds_folder / "kfqn_curves" / "incomplete.ABCDEF_1.0.0").mkdir(parents=True)
    assert datasets.load("curves").train.shape == (30, 784)


def test_another_process_is_faster(tiny_curves, monkeypatch):
    """Its finished set is used, not an error reported."""
    original = curves.KfqnCurves.download_and_prepare

    def overtaken(self, **kwargs):
        original(self, **kwargs)
        raise OSError("Directory not empty")

    monkeypatch.setattr(curves.KfqnCurves, "download_and_prepare", overtaken)
    assert datasets.load("curves").train.shape == (30, 784)


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


def test_damaged_shard(tiny_curves, tfds_folder):
    datasets.load("curves")
    shard = next((tfds_folder / "kfqn_curves" / "1.0.0").glob("*test*"))
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"1\.0\.0 is damaged: .*Remove this folder"):
        datasets.load("curves")


def test_module_and_function_share_a_name():
    module = importlib.import_module("kfqn_optax.experiment.datasets.load")
    assert datasets.load is module.load
