"""`load`: light to import, strict about what is asked, and the text, which nothing prepares."""

import hashlib
import importlib
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("tensorflow_datasets", reason="needs the extra 'experiment'")

from kfqn_optax.experiment import datasets
from kfqn_optax.experiment.datasets import text


def test_import_is_light():
    program = (
        "import sys, kfqn_optax.experiment.datasets as d; d.load;"
        "assert not {'tensorflow', 'tensorflow_datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_module_and_function_share_a_name():
    module = importlib.import_module("kfqn_optax.experiment.datasets.load")
    assert datasets.load is module.load


def test_wrong_requests(tiny_curves):
    with pytest.raises(ValueError, match="no problem 'cifar'; choose one of mnist, curves"):
        datasets.load("cifar")
    with pytest.raises(ValueError, match="train_examples is 0"):
        datasets.load("curves", train_examples=0)
    with pytest.raises(ValueError, match="train_examples is 31, but 'curves' has 30"):
        datasets.load("curves", train_examples=31)
    assert datasets.load("curves", train_examples=30).train.shape == (30, 784)


def test_damaged_shard(tiny_curves, tfds_folder):
    datasets.load("curves")
    shard = next((tfds_folder / "kfqn_curves" / "1.0.0").glob("*test*"))
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"1\.0\.0 is damaged: .*Remove this folder"):
        datasets.load("curves")


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
