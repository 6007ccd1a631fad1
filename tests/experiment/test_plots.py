"""Figures and table say what the runs' metrics say."""

from pathlib import Path

import numpy as np
import pytest

from kfqn_optax.experiment import plots
from kfqn_optax.experiment.workdir import Run


def _run(folder, losses, seconds_per_epoch=1.0, **config):
    config = {"problem": "curves", "optimizer": "adam", "learning_rate": 0.001} | config
    metrics = [
        {
            "epoch": epoch,
            "step": 20 * epoch,
            "seconds": seconds_per_epoch * epoch,
            "train_loss": loss,
            "test_loss": loss + 1,
            "train_mse": loss / 1000,
            "test_mse": loss / 900,
        }
        for epoch, loss in enumerate(losses)
    ]
    return Run(Path(folder), config, metrics)


@pytest.fixture
def runs():
    kbfgs = {"optimizer": "kbfgs", "learning_rate": 0.3, "damping": 0.1}
    return [_run("a", [500.0, 120.0, 60.0], 2.0, **kbfgs), _run("b", [500.0, 200.0, 150.0, 160.0])]


def test_labels_tell_equal_runs_apart(runs):
    assert plots.labels(runs) == ["K-BFGS, lr 0.3, damping 0.1", "Adam, lr 0.001"]
    names = plots.labels([*runs, _run("runs/c", [1.0])])
    assert names[1:] == ["Adam, lr 0.001 (b)", f"Adam, lr 0.001 ({Path('runs/c')})"]


def test_labels_name_what_matters():
    kfqn = {"optimizer": "kfqn", "learning_rate": 0.1, "damping": 0.2, "framework": "nnx"}
    muon = {"optimizer": "muon", "learning_rate": 0.02, "damping": 0.2, "framework": "linen"}
    assert plots.label(kfqn) == "KF-QN, lr 0.1, damping 0.2, NNX"
    assert plots.label(kfqn | {"optimizer": "kbfgs_l"}).startswith("K-BFGS(L), lr 0.1, damping 0.2")
    assert plots.label(muon) == "Muon, lr 0.02"


def test_compare_figure(runs):
    figure = plots.compare_figure(runs)
    by_epoch, by_seconds = figure.axes
    assert by_epoch.get_yscale() == by_seconds.get_yscale() == "log"
    assert by_epoch.get_xlabel() == "epoch"
    assert "seconds" in by_seconds.get_xlabel()
    for axes, x_of_first in ((by_epoch, [0, 1, 2]), (by_seconds, [0, 2, 4])):
        train, test, other_train, other_test = axes.get_lines()
        np.testing.assert_array_equal(train.get_xdata(), x_of_first)
        np.testing.assert_array_equal(train.get_ydata(), [500, 120, 60])
        np.testing.assert_array_equal(test.get_ydata(), [501, 121, 61])
        assert (train.get_linestyle(), test.get_linestyle()) == ("-", "--")
        assert train.get_color() == test.get_color() != other_train.get_color()
        np.testing.assert_array_equal(other_test.get_xdata(), [0, 1, 2, 3])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == plots.labels(runs)


def test_losses_figure(runs):
    figure = plots.losses_figure(runs[0])
    assert "curves" in figure.get_suptitle()
    legend = figure.axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["train", "test"]
    np.testing.assert_array_equal(figure.axes[1].get_lines()[1].get_xdata(), [0, 2, 4])


def test_loss_at(runs):
    run = runs[0]
    assert plots.loss_at(run, 2.0) == pytest.approx(120)
    assert plots.loss_at(run, 3.0) == pytest.approx(np.sqrt(120 * 60))
    assert plots.loss_at(run, 100.0) == pytest.approx(60)


def test_table(runs):
    text = plots.table(runs)
    kbfgs, adam = (line for line in text.splitlines() if ", lr" in line)
    cells = [cell.strip() for cell in kbfgs.strip("│ ").split("│")]
    # The common moment is the end of the shorter run, 3 s: sqrt(120 60) = 84.853.
    assert "train at 3.0 s" in text
    expected = [
        plots.labels(runs)[0],
        "2",
        "4.0",
        "60.000",
        "61.000",
        "61.000",
        "0.06667",
        "84.853",
    ]
    assert cells == expected
    cells = [cell.strip() for cell in adam.strip("│ ").split("│")]
    assert cells[3:6] == ["160.000", "161.000", "151.000"]


def test_table_of_classifiers(runs):
    for number, run in enumerate(runs):
        for record in run.metrics:
            del record["train_mse"], record["test_mse"]
            record |= {"train_accuracy": 0.9, "test_accuracy": 0.81234 + number / 10}
    text = plots.table(runs)
    assert "test accuracy" in text
    assert "mse" not in text
    assert "│ 0.8123 │".replace(" ", "") in text.replace(" ", "")
    assert "0.9123" in text


def test_save_replaces_the_file_in_one_stroke(tmp_path, runs, monkeypatch):
    path = tmp_path / "losses.png"
    plots.save(plots.losses_figure(runs[0]), path)
    whole = path.read_bytes()
    assert whole.startswith(b"\x89PNG")
    assert whole.endswith(b"IEND\xaeB`\x82")

    monkeypatch.setattr(plots.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        plots.save(plots.compare_figure(runs), path)
    assert path.read_bytes() == whole
