"""MNIST and Fashion-MNIST: prepared as TFDS's own from the published files, images as PNG."""

import io

import numpy as np
import pytest
from raw_files import published

pytest.importorskip("tensorflow_datasets", reason="needs the extra 'experiment'")

import tensorflow_datasets as tfds

from kfqn_optax.experiment import datasets
from kfqn_optax.experiment.datasets import mnist, png


def contents(folder):
    return mnist.read(folder.name, [mnist.find(folder, name) for _, _, name in mnist.FILES])


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


def test_wrong_mnist(tiny_mnist, tfds_folder):
    with pytest.raises(ValueError, match=r"train-images.*not the .* of 'mnist'.*'fashion_mnist'"):
        datasets.load("mnist", tiny_mnist["fashion_mnist"])
    assert not (tfds_folder / "mnist" / "3.0.1").exists()


def test_real_mnist_files():
    arrays = contents(published("mnist"))
    assert arrays["train"][0].shape == (60_000, 28, 28)
    assert arrays["train"][1][:5].tolist() == [5, 0, 4, 1, 9]
    assert arrays["test"][1][:5].tolist() == [7, 2, 1, 0, 4]


@pytest.mark.slow
def test_mnist_in_full():
    data = datasets.load("mnist", published("mnist").parent)
    assert data.train.shape == (60_000, 784)
    assert data.test.shape == (10_000, 784)
    assert data.train.mean() == pytest.approx(0.1307, abs=1e-4)
