"""`python -m benchmarks.reproduce`: what it runs, what it does not run again, what it reports."""

import contextlib
import json
import re
from pathlib import Path

import pytest
import tiny

from benchmarks.reproduce import __main__ as reproduce
from benchmarks.reproduce import plans, report, runs
from kfqn_optax.experiment import cli, plots, train
from kfqn_optax.experiment.config import ConfigError, check
from kfqn_optax.experiment.paper import METHODS, paper_config
from kfqn_optax.experiment.problems import PROBLEMS

ROOT = Path(__file__).parents[2]
PAGE = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"


def _no_launch(command, log):
    raise AssertionError(f"nothing was to be run, but this was: {command}")


@pytest.fixture
def in_process(monkeypatch):
    """Runs are those of the tiny problem, in this process."""
    monkeypatch.setitem(PROBLEMS, "curves", tiny.written(tiny.PROBLEM))
    monkeypatch.setattr(train, "load_dataset", lambda config: tiny.dataset())
    monkeypatch.setattr(plots, "save", lambda figure, path: None)

    def launch(command, log):
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            return cli.train(["kfqn-train", *command])

    monkeypatch.setattr(runs, "launch", launch)


def _cells(table, method):
    (row,) = (line for line in table.splitlines() if f"| {METHODS[method][0]} |" in line)
    return [cell.strip().replace("*", "") for cell in row.split("|")[1:-1]]


def test_quick(tmp_path, in_process, monkeypatch, capsys):
    """Two methods: JSON, figure, table; the second time nothing runs."""
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    command = ["quick", "--problems", "curves", "--methods", "kbfgs", "adam", "--scale", "0.03"]
    command += ["--set", "batch_size=16", "--runs", str(tmp_path / "runs"), "--readme", str(page)]
    command += ["--output", str(tmp_path / "results" / "quick.json")]
    assert reproduce.main(command) == 0
    table = re.search(r"\| problem .*", capsys.readouterr().out, re.DOTALL)[0].strip()
    assert page.read_text() == f"before\n{report.BEGIN}\n{table}\n{report.END}\nafter\n"

    results = json.loads((tmp_path / "results" / "quick.json").read_text())
    assert (tmp_path / "results" / "quick.png").read_bytes().startswith(b"\x89PNG")
    ends = {}
    for method in ("kbfgs", "adam"):
        (folder,) = (tmp_path / "runs" / "curves").glob(f"{method}-seed=0")
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        (run,) = results["problems"]["curves"][method]["runs"]
        assert run["curve"] == [[line[name] for name in results["columns"]] for line in lines]
        last, cells = lines[-1], _cells(table, method)
        expected = [f"{last['train_loss']:.2f}", f"{last['test_loss']:.2f}", str(last["epoch"])]
        assert cells[3:7] == [*expected, f"{last['seconds']:.0f}"]
        assert not (folder / "checkpoints").exists()
        ends[method] = last["train_loss"]
    assert ends["kbfgs"] != ends["adam"]
    assert re.search(r"\d+ cores$", results["machine"])

    written = (tmp_path / "results" / "quick.json").read_text()
    monkeypatch.setattr(runs, "launch", _no_launch)
    assert reproduce.main(command) == 0
    assert (tmp_path / "results" / "quick.json").read_text() == written


def test_launch(tmp_path):
    """The real program in a process of its own, what it says in the log, its exit status."""
    with (tmp_path / "log").open("w") as log:
        assert runs.launch(["--config", "no.py", "--workdir", str(tmp_path / "run")], log) == 1
    assert "there is no config file 'no.py'" in (tmp_path / "log").read_text()


def test_run_that_diverges_is_a_result_and_is_not_repeated(tmp_path, in_process, monkeypatch):
    overrides = {"learning_rate": 1e30, "batch_size": 16, "epochs": 1}
    found = runs.train(tmp_path / "run", "curves", "sgdm", overrides)
    assert found["curve"] is None
    assert reproduce.final_loss(found) == float("inf")
    assert "the training loss at step" in (tmp_path / "run" / "diverged.txt").read_text()
    monkeypatch.setattr(runs, "launch", _no_launch)
    assert runs.train(tmp_path / "run", "curves", "sgdm", overrides) == found


def test_run_that_fails_is_no_result(tmp_path, in_process):
    with pytest.raises(runs.Failed, match=r"ended with status 1: .* there are only 70 training"):
        runs.train(tmp_path / "run", "curves", "sgdm", {"epochs": 1})
    assert not (tmp_path / "run" / "diverged.txt").exists()


def test_run_of_another_config_is_refused(tmp_path, in_process):
    overrides = {"batch_size": 16, "epochs": 1}
    runs.train(tmp_path / "run", "curves", "sgdm", overrides)
    with pytest.raises(runs.Failed, match=r"another config: momentum \(0.9 there, 0.5 here\)"):
        runs.train(tmp_path / "run", "curves", "sgdm", overrides | {"momentum": 0.5})


def _invented(folder, problem, method, overrides):
    """A run whose loss is least at the learning rate 0.3, and which diverges above 1."""
    rate, seed = overrides["learning_rate"], overrides["seed"]
    loss = 10 + abs(rate - 0.3) + seed
    curve = [[0, 0, 20, 20, 0.2], [1, 1 + seed, loss, loss, 0.1]]
    return {
        "method": method,
        "settings": {name: overrides.get(name, 0.1) for name in METHODS[method][1]},
        "seed": seed,
        "epochs": overrides["epochs"],
        "curve": None if rate > 1 else curve,
    }


def test_the_best_of_the_grid_is_run_with_all_seeds(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "train", _invented)
    plan = plans.PLANS["full"]
    found = reproduce.run_method(plan, "curves", "kbfgs", tmp_path, {"train_examples": 500})
    assert [tried["train_loss"] for tried in found["tuning"]] == 3 * [10.2] + 3 * [10] + 3 * [
        10.5
    ] + 3 * [None]
    assert [run["seed"] for run in found["runs"]] == [0, 1, 2]
    assert {run["settings"]["learning_rate"] for run in found["runs"]} == {0.3}
    assert {run["epochs"] for run in found["runs"]} == {round(300 / 2.56)}
    assert found["overrides"] == {"train_examples": 500}


def _results(**methods):
    """Results on CURVES, by method the curves of its seeds as pairs of seconds and train loss."""
    return {
        "columns": ["epoch", "seconds", "train_loss", "test_loss", "test_mse"],
        "problems": {
            "curves": {
                method: {
                    "runs": [
                        {
                            "settings": {"learning_rate": 0.1},
                            "epochs": 2,
                            "curve": curve
                            and [
                                [i, s, loss, loss + 1, loss / 100]
                                for i, (s, loss) in enumerate(curve)
                            ],
                        }
                        for curve in curves
                    ]
                }
                for method, curves in methods.items()
            }
        },
    }


def test_table():
    """The goal is RMSprop's 30: K-BFGS is there after 3 and 5 seconds, Adam never."""
    results = _results(
        sgdm=[None],
        kbfgs=[[(0, 90), (3, 30), (6, 20)], [(0, 90), (5, 28), (7, 21)], None],
        adam=[[(0, 90), (1, 50), (4, 40)]],
        rmsprop=[[(0, 90), (2, 35), (6, 30)]],
    )
    table = report.table(results)
    names = [line.split("|")[2].strip() for line in table.splitlines()[2:]]
    assert names == [
        "K-BFGS, 1 of 3 seeds diverged", "Adam", "RMSprop", "SGD-m, 1 of 1 seeds diverged"
    ]  # fmt: skip
    assert (
        "| **20.50** (20.00 to 21.00) | 21.50 (21.00 to 22.00) | 2 | 6 (6 to 7) | **4** (3 to 5) |"
        in table
    )
    assert _cells(table, "adam")[3:] == ["40.00", "41.00", "2", "4", "not reached"]
    assert _cells(table, "rmsprop")[3:] == ["30.00", "31.00", "2", "6", "6"]
    assert table.count("**") == 4


def test_figure():
    """A line and a band for each method in each panel; the band is from least to largest."""
    results = _results(
        kbfgs=[[(0, 90), (3, 30), (6, 20)], [(0, 90), (2, 40), (8, 24)]],
        adam=[[(0, 90), (1, 50), (4, 40)]],
    )
    drawing = report.figure(results)
    assert len(drawing.axes) == 4
    by_seconds = drawing.axes[1]
    line, other = by_seconds.get_lines()
    assert line.get_color() == report.COLOURS["kbfgs"] != other.get_color()
    assert line.get_xydata().tolist() == [[0, 90], [2.5, 35], [7, 22]]
    corners = by_seconds.collections[0].get_paths()[0].vertices.tolist()
    assert [7, 20] in corners
    assert [7, 24] in corners
    (legend,) = drawing.legends
    assert [text.get_text() for text in legend.get_texts()] == ["K-BFGS", "Adam"]


def test_a_page_without_its_markers():
    with pytest.raises(ValueError, match="the page lacks <!-- reproduce-quick: begin -->"):
        report.with_table("nothing", "table")


def test_readme_has_the_table_of_the_results():
    path = ROOT / "benchmarks" / "results" / "reproduce_quick.json"
    if not path.exists():
        pytest.skip("make reproduce-quick was not run yet")
    page = (ROOT / "README.md").read_text()
    assert report.with_table(page, report.table(json.loads(path.read_text()))) == page


@pytest.mark.parametrize("problem", plans.PROBLEMS)
def test_config_file_of_each_method(problem):
    path = f"{runs.CONFIGS / f'paper_{problem}.py'}"
    for method in METHODS:
        arguments = ["kfqn-train", f"--config={path}:{method}", "--workdir=x"]
        config, _ = cli.read_command_line(arguments)
        check(config)
        assert (config.problem, config.optimizer, config.batch_size) == (problem, method, 1000)
        limit = 3.0 if method in ("kbfgs", "kbfgs_l") else 0.0
        assert config.norm_constraint == limit
    without, _ = cli.read_command_line(["kfqn-train", f"--config={path}", "--workdir=x"])
    assert without.optimizer == "kbfgs"


def test_method_that_the_paper_does_not_have(tmp_path, capsys):
    with pytest.raises(ConfigError, match="no method 'muon'"):
        paper_config("mnist", "muon", {}, 1)
    config = f"--config={runs.CONFIGS / 'paper_mnist.py'}:muon"
    assert cli.train(["kfqn-train", config, f"--workdir={tmp_path / 'run'}"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "kfqn-train: the paper has no method 'muon'; after the colon of --config"
    )
    with pytest.raises(SystemExit):
        reproduce.main(["quick", "--methods", "muon"])
    assert "invalid choice: 'muon'" in capsys.readouterr().err


def test_epochs_and_hours():
    assert plans.epochs_of(plans.PLANS["quick"], "mnist", "kbfgs") == round(7.2 / 2.82)
    assert plans.epochs_of(plans.PLANS["quick"], "faces", "adam") == round(12.5 / 1.03)
    inverses = 21 * 4 / 20  # in epochs of 20 plain steps
    assert plans.epochs_of(plans.PLANS["quick"], "faces", "kfac") == round((12.5 - inverses) / 2.5)
    little = plans.PLANS["quick"]._replace(budgets={"mnist": 0.1})
    assert plans.epochs_of(little, "mnist", "kbfgs") == 1
    hours = plans.expected_hours(plans.PLANS["quick"], plans.PROBLEMS, list(METHODS))
    assert 0.3 < hours < 0.5
    one, two = (
        plans.expected_hours(plans.PLANS["quick"]._replace(seeds=seeds), ["curves"], ["adam"])
        for seeds in ((0,), (0, 1))
    )
    assert two == pytest.approx(2 * one)
