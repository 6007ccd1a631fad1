"""A run that was broken off and goes on: the same numbers, the same files; and what is refused."""

import json
import os
import shutil
import signal
import threading
import time

import event_files
import pytest
import states
import tiny

from kfqn_optax.experiment import cli, plots, train
from kfqn_optax.experiment.checkpoints import Checkpoints
from kfqn_optax.experiment.losses import NonFiniteLoss
from kfqn_optax.experiment.problems import PROBLEMS
from kfqn_optax.experiment.progress import Display
from kfqn_optax.experiment.stop import Stopped, StopRequest
from kfqn_optax.experiment.workdir import RunError

DATA = {
    "curves": tiny.dataset,
    "fashion_mnist_cnn": tiny.images,
    "char_transformer": tiny.characters,
}


@pytest.fixture(autouse=True)
def _tiny_problems(monkeypatch):
    """The figure is a file with the number of epochs in it."""
    monkeypatch.setitem(PROBLEMS, "curves", tiny.written(tiny.PROBLEM))
    for name, written in tiny.CLASSIFIERS.items():
        monkeypatch.setitem(PROBLEMS, name, written)
    monkeypatch.setattr(plots, "losses_figure", lambda run: len(run.metrics))
    monkeypatch.setattr(plots, "save", lambda count, path: path.write_text(str(count)))


def _config(**values):
    return tiny.config(**{"optimizer": "adam", "learning_rate": 0.03, "epochs": 3} | values)


def _run(workdir, config):
    return train.train(config, workdir, DATA[config.problem]())


def _signal_at(monkeypatch, step, signum=signal.SIGTERM):
    """The process gets a signal while a step runs."""
    shown = Display.step

    def show(self, number, loss):
        shown(self, number, loss)
        if number == step:
            os.kill(os.getpid(), signum)

    monkeypatch.setattr(Display, "step", show)


def _stopped(monkeypatch, workdir, config, step):
    """A run that ends at a signal; returns what it raises."""
    with monkeypatch.context() as patch:
        _signal_at(patch, step)
        try:
            _run(workdir, config)
        except Stopped as error:
            return error
    raise AssertionError


def _lines(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: x for name, x in line.items() if name != "seconds"} for line in lines]


def _assert_same(whole, broken):
    assert _lines(whole) == _lines(broken)
    expected, found = event_files.shown(whole), event_files.shown(broken)
    assert found.pop("seconds").keys() == expected.pop("seconds").keys()
    assert found == expected
    assert (broken / "losses.png").read_text() == (whole / "losses.png").read_text()
    states.assert_same(states.last(whole), states.last(broken))


@pytest.mark.parametrize(
    ("step", "values"),
    [
        (6, {"optimizer": "kbfgs_l", "memory_size": 3}),
        (4, {"optimizer": "muon"}),
        (5, {"problem": "char_transformer"}),
        pytest.param(
            7, {"problem": "char_transformer", "framework": "nnx"}, marks=pytest.mark.slow
        ),
        (3, {"problem": "fashion_mnist_cnn"}),
        pytest.param(5, {"optimizer": "kfac"}, marks=pytest.mark.slow),
    ],
    ids=["kbfgs_l", "end-of-epoch", "random-keys", "nnx", "batch-norm", "drawn-targets"],
)
def test_stopped_by_sigterm_and_continued(tmp_path, monkeypatch, step, values):
    config = _config(**{"epochs": 2} | values)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    history = _run(whole, config)
    stopped = _stopped(monkeypatch, broken, config, step)
    assert str(stopped) == (
        f"stopped by SIGTERM after step {step}; a checkpoint is written, "
        "the same command goes on from it."
    )
    assert stopped.status == 143
    assert len(_lines(broken)) == step // 4 + 1
    continued = _run(broken, config)
    assert [line["train_loss"] for line in continued] == [line["train_loss"] for line in history]
    seconds = [line["seconds"] for line in continued]
    assert seconds == sorted(seconds)
    _assert_same(whole, broken)


def test_more_epochs_are_those_of_a_longer_run(tmp_path):
    _run(tmp_path / "whole", _config(epochs=4))
    _run(tmp_path / "broken", _config(epochs=2))
    _run(tmp_path / "broken", _config(epochs=4, checkpoint_every=3, eval_batch_size=32))
    _assert_same(tmp_path / "whole", tmp_path / "broken")
    assert json.loads((tmp_path / "broken" / "config.json").read_text())["epochs"] == 4


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_finished_run_is_left_alone(tmp_path, capsys, epochs):
    history = _run(tmp_path, _config(epochs=2))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert _run(tmp_path, _config(epochs=epochs)) == history
    assert capsys.readouterr().err == (
        f"the run in {tmp_path} is finished: it has 2 epochs, and config.epochs is {epochs}. "
        "Raise config.epochs to go on.\n"
    )
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_another_config_is_refused(tmp_path):
    _run(tmp_path, _config(epochs=1))
    with pytest.raises(
        FileExistsError,
        match=r"holds a run of another config: "
        r"learning_rate \(0\.03 there, 0\.1 here\), seed \(0 there, 7 here\); give",
    ):
        _run(tmp_path, _config(learning_rate=0.1, seed=7))


def test_a_run_without_checkpoints_is_refused(tmp_path):
    config = _config(epochs=1, checkpoint_every=0)
    _run(tmp_path, config)
    assert not (tmp_path / "checkpoints").exists()
    for every in (0, 5):
        with pytest.raises(FileExistsError, match=r"already holds a run \(config\.json\); give"):
            _run(tmp_path, _config(epochs=2, checkpoint_every=every))


def test_checkpoints_without_a_config_are_refused(tmp_path):
    _run(tmp_path, _config(epochs=1))
    for name in ("config.json", "metrics.jsonl"):
        (tmp_path / name).unlink()
    with pytest.raises(FileExistsError, match=r"already holds a run \(checkpoints\); give"):
        _run(tmp_path, _config(epochs=1))


def test_checkpoints_that_are_gone(tmp_path):
    _run(tmp_path, _config(epochs=1))
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").mkdir()
    before = _lines(tmp_path)
    with pytest.raises(FileExistsError, match="holds a run whose checkpoints are gone; give"):
        _run(tmp_path, _config(epochs=1))
    assert _lines(tmp_path) == before


def test_killed_before_the_first_checkpoint(tmp_path, monkeypatch):
    """The first evaluation is written; then the process dies."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    _run(whole, _config())

    def die(*_):
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", die)
        with pytest.raises(SystemExit):
            _run(broken, _config())
    assert len(_lines(broken)) == 1
    _run(broken, _config())
    _assert_same(whole, broken)


def test_what_is_newer_than_the_checkpoint_is_dropped(tmp_path, monkeypatch):
    """A metrics file that is ahead, its last line half written, or gone, or a link."""
    whole, broken, outside = tmp_path / "whole", tmp_path / "broken", tmp_path / "outside"
    _run(whole, _config())
    _stopped(monkeypatch, broken, _config(), 6)
    outside.write_text("precious")
    for number, spoil in enumerate(
        (
            lambda path: path.write_text(path.read_text() + '{"epoch": 1}\n{"epoch": 2, "st'),
            lambda path: path.write_bytes(b"\xff\0"),
            lambda path: path.unlink(),
            lambda path: (path.unlink(), path.symlink_to(outside)),
        )
    ):
        workdir = tmp_path / str(number)
        shutil.copytree(broken, workdir)
        spoil(workdir / "metrics.jsonl")
        _run(workdir, _config())
        _assert_same(whole, workdir)
    assert outside.read_text() == "precious"


def test_the_checkpoint_before_is_used(tmp_path, monkeypatch, capsys):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    _run(whole, _config())
    _stopped(monkeypatch, broken, _config(checkpoint_every=5), 7)
    metadata = broken / "checkpoints" / "00000007" / "_CHECKPOINT_METADATA"
    metadata.write_bytes(metadata.read_bytes()[:100])
    _run(broken, _config(checkpoint_every=5))
    told = capsys.readouterr().err
    assert "checkpoints/00000007 is damaged: 00000007/_CHECKPOINT_METADATA is not as it was" in told
    assert "going on from step 5, after " in told
    _assert_same(whole, broken)


def test_other_data_are_refused(tmp_path):
    _run(tmp_path, _config(epochs=1))
    other = tiny.dataset(train=69)
    with pytest.raises(RunError, match="no checkpoint of .* the training examples are not the"):
        train.train(_config(epochs=2), tmp_path, other)


def test_a_run_that_diverges_does_so_again(tmp_path, monkeypatch):
    squared = type(tiny.PROBLEM)(tiny.PROBLEM.widths, binary=False)
    monkeypatch.setitem(PROBLEMS, "curves", tiny.written(squared))
    config = _config(optimizer="sgdm", learning_rate=0.7, epochs=20, checkpoint_every=1)
    messages = []
    for _ in range(2):
        with pytest.raises(NonFiniteLoss) as error:
            _run(tmp_path, config)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_clock_stands_still_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    save = Checkpoints.save

    def slow(*arguments):
        time.sleep(0.3)
        save(*arguments)

    monkeypatch.setattr(Checkpoints, "save", slow)
    start = time.monotonic()
    history = _run(tmp_path, _config(checkpoint_every=2, epochs=2))
    assert time.monotonic() - start > 5 * 0.3
    assert history[-1]["seconds"] < 0.3


def test_no_checkpoints_are_a_choice(tmp_path, monkeypatch):
    _signal_at(monkeypatch, 5)
    with pytest.raises(Stopped, match="after step 5; config.checkpoint_every is 0, so there is"):
        _run(tmp_path, _config(checkpoint_every=0))
    assert not (tmp_path / "checkpoints").exists()


def test_a_signal_in_the_last_step_is_no_stop(tmp_path, monkeypatch):
    _signal_at(monkeypatch, 8)
    assert len(_run(tmp_path, _config(epochs=2))) == 3


def test_a_signal_before_the_first_step(tmp_path, monkeypatch):
    def compile_step(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError

    with monkeypatch.context() as patch:
        patch.setattr(train, "compile_step", compile_step)
        with pytest.raises(Stopped, match="SIGTERM before the first step, so nothing is lost; run"):
            _run(tmp_path, _config())
    assert len(_run(tmp_path, _config())) == 4


@pytest.fixture
def heard():
    """SIGINT as Python has it by default, also where whoever started the tests ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard")
def test_signals_are_given_back_and_a_second_one_ends_at_once():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        stop.defer()
        assert stop.signum is None
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signum == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            stop.defer()
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.signum is None
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_signals_are_for_the_main_thread(tmp_path):
    thread = threading.Thread(target=lambda: _run(tmp_path, _config(epochs=1)))
    thread.start()
    thread.join()
    assert len(_lines(tmp_path)) == 2


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize(
    ("signum", "status", "name"), [(signal.SIGTERM, 143, "SIGTERM"), (signal.SIGINT, 130, "SIGINT")]
)
def test_command_stopped_and_given_again(tmp_path, monkeypatch, capsys, signum, status, name):
    monkeypatch.setattr(train, "load_dataset", lambda config: tiny.dataset())
    config = tmp_path / "config.py"
    config.write_text(
        "import tiny\n\ndef get_config():\n    return tiny.config(optimizer='adam')\n"
    )
    command = ["kfqn-train", "--config", str(config), "--workdir", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        _signal_at(patch, 3, signum)
        assert cli.train(command) == status
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"kfqn-train: stopped by {name} after step 3; a checkpoint is written")
    assert cli.train(command) == 0
    assert "going on from step 3" in capsys.readouterr().err
    assert cli.train(command) == 0
    assert "is finished: it has 2 epochs" in capsys.readouterr().err
    assert cli.train([*command, "--config.seed=4"]) == 1
    (sentence,) = capsys.readouterr().err.splitlines()
    assert "holds a run of another config: seed (0 there, 4 here); give the same" in sentence
