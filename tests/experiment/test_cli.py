"""The two commands: what works, and the sentence and exit status of what does not."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
import tiny

from kfqn_optax.experiment import cli, datasets, train
from kfqn_optax.experiment.datasets import curves
from kfqn_optax.experiment.problems import PROBLEMS
from kfqn_optax.experiment.workdir import METRICS

ROOT = Path(__file__).parents[2]
CURVES = str(ROOT / "configs" / "curves.py")


@pytest.fixture
def tiny_curves(monkeypatch):
    monkeypatch.setitem(PROBLEMS, "curves", tiny.written(tiny.PROBLEM))
    monkeypatch.setattr(train, "load_dataset", lambda config: tiny.dataset())


def _train(*arguments):
    return cli.train(["kfqn-train", *arguments])


def _small(workdir, *overrides):
    sizes = ["--config.batch_size=16", "--config.epochs=2", "--config.optimizer=adam"]
    return ["--config", CURVES, "--workdir", str(workdir), *sizes, *overrides]


def _sentence(capsys):
    """Returns the one line on standard error."""
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


def test_overrides_reach_the_run(tmp_path, tiny_curves, capsys):
    status = _train(*_small(tmp_path / "run", "--config.learning_rate=1", "--config.seed", "3"))
    assert status == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["learning_rate"], config["seed"], config["epochs"]) == (1.0, 3, 2)
    captured = capsys.readouterr()
    assert str(tmp_path / "run" / "losses.png") in captured.out
    assert "epoch   2/2  step     8" in captured.err


@pytest.mark.parametrize(
    ("overrides", "status", "message"),
    [
        (["--config.learning_rat=1"], 1, "no key 'learning_rat'; did you mean 'learning_rate'?"),
        (["--config.damping=-1"], 1, "config.damping is -1.0; it must be a finite number above 0."),
        (["--config.problem=mnits"], 1, "config.problem is 'mnits'; it must be one of curves,"),
        (["--config.epochs=some"], 2, "invalid literal for int"),
        (["--wordir=x"], 2, "'wordir'"),
        (["more"], 2, "'more' is not an option"),
    ],
)
def test_bad_command_line(tmp_path, tiny_curves, capsys, overrides, status, message):
    assert _train(*_small(tmp_path / "run", *overrides)) == status
    assert message in _sentence(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--workdir", "x"], 2, "--config is missing"),
        (["--config", CURVES], 2, "--workdir is missing"),
        (["--config", "no.py", "--workdir", "x"], 1, "there is no config file 'no.py'"),
        (["--config=no.py", "--config.epochs=1"], 1, "there is no config file 'no.py'"),
        (["--config.epochs=1", "--config", CURVES], 2, "before a value for --config"),
    ],
)
def test_missing_arguments(capsys, arguments, status, message):
    assert _train(*arguments) == status
    assert message in _sentence(capsys)


def test_config_file_with_a_mistake(tmp_path, capsys):
    path = tmp_path / "mine.py"
    start = "from kfqn_optax.experiment.config import default_config\n"
    start += "def get_config():\n    config = default_config()\n"
    path.write_text(f"{start}    config.dampng = 1.0\n    return config\n")
    assert _train("--config", str(path), "--workdir", str(tmp_path / "run")) == 1
    assert "no key 'dampng'; did you mean 'damping'?" in _sentence(capsys)

    path.write_text(f"{start}    config.damping = 'small'\n    return config\n")
    assert _train("--config", str(path), "--workdir", str(tmp_path / "run")) == 2
    assert "TypeError" in _sentence(capsys)


def test_help_lists_every_key(capsys):
    assert _train("--help") == 0
    text = capsys.readouterr().out
    assert all(f"\n  {key}" in text for key in ("problem", "pair_decay", "eval_batch_size"))


def test_taken_workdir(tmp_path, tiny_curves, capsys):
    without = _small(tmp_path, "--config.checkpoint_every=0")
    assert _train(*without) == 0
    before = (tmp_path / "metrics.jsonl").read_text()
    capsys.readouterr()
    assert _train(*without) == 1
    assert "already holds a run (config.json)" in _sentence(capsys)
    assert (tmp_path / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("kind", [FileNotFoundError, ValueError, ConnectionError])
def test_data_that_cannot_be_had(tmp_path, monkeypatch, capsys, kind):
    def load_dataset(config):
        raise kind("put the file there")

    monkeypatch.setattr(train, "load_dataset", load_dataset)
    assert _train(*_small(tmp_path / "run")) == 1
    assert _sentence(capsys) == "kfqn-train: put the file there"
    assert not (tmp_path / "run").exists()


def test_an_interrupt_before_training(tmp_path, monkeypatch, capsys):
    def load_dataset(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "load_dataset", load_dataset)
    assert _train(*_small(tmp_path / "run")) == 130
    assert _sentence(capsys) == "kfqn-train: interrupted; what is written is kept."


def test_fault_of_the_program_keeps_its_traceback(tmp_path, tiny_curves, monkeypatch):
    def fail(*_):
        raise ValueError("shapes do not match")

    monkeypatch.setattr(train, "train", fail)
    with pytest.raises(ValueError, match="shapes do not match"):
        _train(*_small(tmp_path / "run"))


def test_non_finite_run_exits_with_a_sentence(tmp_path, tiny_curves, capsys, monkeypatch):
    squared = type(tiny.PROBLEM)(tiny.PROBLEM.widths, binary=False)
    monkeypatch.setitem(PROBLEMS, "curves", tiny.written(squared))
    overrides = ["--config.optimizer=sgdm", "--config.learning_rate=0.7", "--config.epochs=9"]
    lines = []
    for _ in range(2):
        assert _train(*_small(tmp_path, *overrides)) == 1
        lines.append(capsys.readouterr().err.splitlines()[-1])
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
        assert (tmp_path / "losses.png").exists()
    assert lines[0] == lines[1]
    assert lines[0].startswith("kfqn-train: the training loss at step 6 is ")
    assert _compare(str(tmp_path), "--output", str(tmp_path / "compare.png")) == 0


# kfqn-compare


def _write_run(folder, problem="curves", optimizer="adam", lines=3, tail=""):
    folder.mkdir()
    config = tiny.config(problem=problem, optimizer=optimizer)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    records = [dict.fromkeys(METRICS, 100.0) | {"epoch": n, "seconds": n} for n in range(lines)]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(text + tail)
    return str(folder)


def _compare(*arguments):
    return cli.compare(["kfqn-compare", *arguments])


def test_compare(tmp_path, capsys):
    first = _write_run(tmp_path / "first")
    second = _write_run(tmp_path / "second", optimizer="kbfgs")
    figure = tmp_path / "new" / "figure.png"
    assert _compare(first, second, "--output", str(figure)) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "Adam, lr 0.3" in captured.out
    assert "K-BFGS, lr 0.3, damping 0.3" in captured.out
    assert captured.out.endswith(f"figure: {figure}\n")
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_compare_leaves_out_a_truncated_last_line(tmp_path, capsys):
    folder = _write_run(tmp_path / "run", lines=2, tail='{"epoch": 2, "st')
    assert _compare(folder, "--output", str(tmp_path / "figure.png")) == 0
    captured = capsys.readouterr()
    assert f"the last line of {tmp_path / 'run' / 'metrics.jsonl'} is incomplete" in captured.err
    (row,) = (line for line in captured.out.splitlines() if "Adam" in line)
    assert row.split("│")[2].strip() == "1"


def _different_problem(folder):
    return [_write_run(folder / "a"), _write_run(folder / "b", problem="mnist")]


def _without_metrics(folder):
    run = _write_run(folder / "a")
    (folder / "a" / "metrics.jsonl").unlink()
    return [run]


def _without_config(folder):
    run = _write_run(folder / "a")
    (folder / "a" / "config.json").unlink()
    return [run]


def _with_config(text):
    def make(folder):
        run = _write_run(folder / "a")
        (folder / "a" / "config.json").write_bytes(text)
        return [run]

    return make


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_with_config(b"[]"), r"config\.json is not a config: it has no problem of the right type"),
        (_with_config(b'{"problem": 3}'), "it has no problem of the right type; was it written by"),
        (
            _with_config(b'{"problem": "curves", "optimizer": "adam", "learning_rate": "x"}'),
            "it has no learning_rate of the right type",
        ),
        (_with_config(b"{"), r"config\.json is not valid JSON"),
        (_with_config(b"[" * 100_000), r"config\.json is not valid JSON"),
        (_with_config(b"\xff\xff"), r"config\.json is not a text file"),
        (_with_config(b" " * (2 << 20)), "has 2097152 bytes, more than kfqn-train ever writes"),
        (
            lambda folder: [_write_run(folder / "a", tail=json.dumps(dict.fromkeys(METRICS, "x")))],
            "line 4 of .* is not a record with the keys epoch, step, seconds",
        ),
        (_different_problem, r"'curves' and .* 'mnist'; losses of different problems"),
        (_without_metrics, r"has no metrics\.jsonl; give the workdir of a run"),
        (_without_config, r"has no config\.json; give the workdir of a run"),
        (lambda folder: [str(folder / "nowhere")], "nowhere is not a folder"),
        (lambda folder: [_write_run(folder / "a", lines=0)], "holds no complete line"),
        (
            lambda folder: [_write_run(folder / "a", tail="{oops\n" + '{"epoch": 1}\n')],
            r"line 4 of .*metrics\.jsonl is not valid JSON",
        ),
        (
            lambda folder: [_write_run(folder / "a", tail='{"epoch": 4}\n')],
            "line 4 of .* is not a record with the keys epoch, step, seconds",
        ),
        (lambda folder: [_write_run(folder / "a"), "--output=f.pdf"], r"ends in \.png"),
    ],
)
def test_compare_refuses(tmp_path, capsys, make, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert _compare(*make(tmp_path)) in (1, 2)
    assert re.search(message, _sentence(capsys))
    assert not list(tmp_path.glob("*.png"))


# The commands as they are installed


def _run(command, *arguments, env):
    code = f"import sys; from kfqn_optax.experiment.cli import {command}; sys.exit({command}())"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def trained_on_curves(tmp_path_factory):
    """A folder with the images of CURVES in ``tfds`` and a run in ``kbfgs``; what the run said."""
    folder = tmp_path_factory.mktemp("curves")
    arguments = ["--config", "configs/curves.py", "--config.train_examples=300"]
    arguments += ["--config.batch_size=100", "--config.epochs=1", "--config.curvature_examples=20"]
    done = _run("train", *arguments, "--workdir", str(folder / "kbfgs"), env=_env(folder))
    assert done.returncode == 0, done.stderr
    (folder / "said").write_text(done.stderr)
    return folder


def _env(folder):
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return os.environ | quick | {"TFDS_DATA_DIR": str(folder / "tfds")}


def test_end_to_end(trained_on_curves, tmp_path):
    """CURVES from nothing: generated, trained with K-BFGS, drawn; then what a wrong call gives."""
    workdir = str(trained_on_curves / "kbfgs")
    assert "300 train and 10000 test images, 28 x 28" in (trained_on_curves / "said").read_text()
    text = Path(workdir, "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["step"] for line in lines] == [0, 3]
    # Even grey images cost 784 ln 2 = 543; three steps must have left that behind.
    assert 540 < lines[0]["train_loss"] < 547
    assert lines[1]["train_loss"] < 530

    env = _env(tmp_path)
    done = _run("compare", workdir, "--output", str(tmp_path / "figure.png"), env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert "K-BFGS, lr 0.3, damping 0.1" in done.stdout

    arguments = ["--config", "configs/mnist.py", "--config.data_dir", str(tmp_path)]
    done = _run("train", *arguments, "--workdir", str(tmp_path / "mnist"), env=env)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "train-images-idx3-ubyte" in done.stderr


def test_curves_in_full(trained_on_curves, monkeypatch):
    """All of the images, as the command above has written them."""
    tfds_folder = trained_on_curves / "tfds"
    monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_folder))
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
