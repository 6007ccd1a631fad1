"""Training on a tiny problem: results, files, clock, refusals."""

import json
import re
import time

import event_files
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

import kfqn_optax as kfqn
from kfqn_optax.experiment import plots, steps
from kfqn_optax.experiment.config import ConfigError
from kfqn_optax.experiment.losses import NonFiniteLoss
from kfqn_optax.experiment.optimizers import make_optimizer
from kfqn_optax.experiment.problems import PROBLEMS, make_problem, squared_norm
from kfqn_optax.experiment.train import load_dataset, train
from kfqn_optax.experiment.workdir import METRICS, PAIRS, read_run

SAVE = plots.save


@pytest.fixture(autouse=True)
def _tiny_problem(monkeypatch):
    """No figures either, which take longer than all the rest."""
    monkeypatch.setitem(PROBLEMS, "curves", tiny.written(tiny.PROBLEM))
    monkeypatch.setattr(plots, "save", lambda figure, path: None)


def _lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("optimizer", "learning_rate"),
    [("kbfgs", 0.3), ("block_kbfgs", 0.5), ("adam", 0.03), ("sgdm", 0.1), ("rmsprop", 0.02)],
)
def test_each_optimizer_learns(tmp_path, optimizer, learning_rate):
    config = tiny.config(optimizer=optimizer, learning_rate=learning_rate, epochs=15)
    history = train(config, tmp_path / "run", tiny.dataset())
    assert history[0]["train_loss"] > 8.3
    assert history[-1]["train_loss"] < 4.4
    assert history[-1]["test_mse"] < 0.05 * history[0]["test_mse"]
    if optimizer == "block_kbfgs":  # eight pairs a step, two layers with two sides, sixty steps
        assert 0.9 * 8 * 4 * 60 < history[-1]["pairs_updated"] <= 8 * 4 * 60


def test_files_of_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "save", SAVE)
    config = tiny.config(curvature_examples=8)
    history = train(config, tmp_path, tiny.dataset())
    assert json.loads((tmp_path / "config.json").read_text()) == config.to_dict()

    lines = _lines(tmp_path)
    assert lines == history
    assert [tuple(line) for line in lines] == [(*METRICS, *PAIRS)] * 3
    assert [(line["epoch"], line["step"]) for line in lines] == [(0, 0), (1, 4), (2, 8)]
    assert lines[0]["seconds"] == 0 < lines[1]["seconds"] < lines[2]["seconds"]

    events = event_files.shown(tmp_path)
    assert set(events) == {*METRICS[2:], *PAIRS, "batch_loss"}
    for line in lines:
        np.testing.assert_allclose(events["test_loss"][line["step"]], line["test_loss"], rtol=1e-6)
    assert sorted(events["batch_loss"]) == [1, 2, 3, 4, 5, 6, 7, 8]
    # Two layers with two sides, four steps an epoch, counted from the first step.
    assert [line["pairs_updated"] for line in lines] == [0, 16, 32]
    assert {line["pairs_not_finite"] for line in lines} == {0}
    assert events["pairs_updated"] == {0: 0, 4: 16, 8: 32}

    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert "Dense_1" in (tmp_path / "summary.txt").read_text()
    facts = json.loads((tmp_path / "run.json").read_text())
    assert facts["compile_seconds"] > 0
    assert facts["parameters"] == 12 * 2 + 2 + 2 * 12 + 12
    assert not list(tmp_path.glob(".*"))


def test_metrics_include_the_weight_decay(tmp_path):
    """Epoch 0 against the measures taken directly, at a decay that shows."""
    data = tiny.dataset()
    line = train(tiny.config(weight_decay=0.01, epochs=1), tmp_path, data)[0]
    params, _ = tiny.PROBLEM.init(0)
    penalty = 0.005 * float(squared_norm(params))
    assert penalty > 0.02
    for name, images in (("train", data.train), ("test", data.test)):
        losses, squares = tiny.PROBLEM.errors(params, images)
        np.testing.assert_allclose(line[f"{name}_loss"], losses.mean() + penalty, rtol=1e-6)
        np.testing.assert_allclose(line[f"{name}_mse"], squares.mean(), rtol=1e-5)


@pytest.mark.parametrize("optimizer", ["kbfgs", "adam"])
def test_same_seed_same_numbers(tmp_path, optimizer):
    def run(name, seed):
        config = tiny.config(optimizer=optimizer, learning_rate=0.01, seed=seed)
        history = train(config, tmp_path / name, tiny.dataset())
        return [{key: line[key] for key in METRICS if key != "seconds"} for line in history]

    assert run("first", 5) == run("second", 5)


def test_other_seed_other_numbers(tmp_path):
    one, other = (
        train(tiny.config(optimizer="adam", seed=seed), tmp_path / str(seed), tiny.dataset())
        for seed in (1, 2)
    )
    assert all(a["train_loss"] != b["train_loss"] for a, b in zip(one, other, strict=True))


def test_warm_start_is_a_choice(tmp_path):
    warm = train(tiny.config(epochs=1), tmp_path / "warm", tiny.dataset())
    cold = train(tiny.config(epochs=1, warm_start=False), tmp_path / "cold", tiny.dataset())
    assert warm[0]["train_loss"] == cold[0]["train_loss"]
    assert warm[1]["train_loss"] != cold[1]["train_loss"]


def test_warm_start_leaves_out_the_incomplete_batch():
    data, (params, _) = tiny.dataset(), tiny.PROBLEM.init(0)
    state = make_optimizer(tiny.config()).transformation.init(params)
    warm, seconds, compile_seconds = steps.warm_start(
        state, tiny.PROBLEM, params, jnp.asarray(data.train), batch_size=16
    )
    assert seconds > 0
    assert compile_seconds > 0
    expected = kfqn.warm_start(state, tiny.PROBLEM.loss, params, [(data.train[:64],)])
    for got, want in zip(jax.tree.leaves(warm), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("curvature_examples", [0, 8])
def test_step_measures_curvature_on_the_first_examples(curvature_examples):
    images = jnp.asarray(tiny.dataset().train)
    indices = np.arange(3, 19, dtype=np.int32)
    optimizer = make_optimizer(tiny.config())
    params, _ = tiny.PROBLEM.init(0)
    state = steps.TrainState(params, optimizer.transformation.init(params))
    step = jax.jit(steps.make_step(tiny.PROBLEM, optimizer, curvature_examples))
    for _ in range(2):
        state, loss = step(state, images, indices)

    batch = images[3:19]
    measured = batch[:8] if curvature_examples else batch

    @jax.jit
    def by_hand(params, opt_state):
        (loss, _), grads = jax.value_and_grad(tiny.PROBLEM.loss, has_aux=True)(params, batch)
        curvature = kfqn.curvature_fn(tiny.PROBLEM.loss, params, measured)
        updates, opt_state = optimizer.transformation.update(
            grads, opt_state, params, curvature_fn=curvature
        )
        return optax.apply_updates(params, updates), opt_state, loss

    expected, opt_state = params, optimizer.transformation.init(params)
    for _ in range(2):
        expected, opt_state, expected_loss = by_hand(expected, opt_state)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    for got, want in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected), strict=True):
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 7, 25, 70, 1000])
def test_evaluation_does_not_depend_on_its_batches(batch_size):
    data, (params, _) = tiny.dataset(), tiny.PROBLEM.init(0)
    evaluate = steps.make_evaluate(
        tiny.PROBLEM,
        jnp.asarray(data.train),
        jnp.asarray(data.test),
        weight_decay=0.0,
        batch_size=batch_size,
    )
    measured = evaluate(params)
    for name, images in (("train", data.train), ("test", data.test)):
        losses, squares = tiny.PROBLEM.errors(params, images)
        np.testing.assert_allclose(measured[f"{name}_loss"], losses.mean(), rtol=1e-6)
        np.testing.assert_allclose(measured[f"{name}_mse"], squares.mean(), rtol=1e-6)


def test_epoch_batches():
    first = list(steps.epoch_batches(seed=1, epoch=1, examples=70, batch_size=16))
    assert [batch.shape for batch in first] == [(16,)] * 4
    assert len(set(np.concatenate(first).tolist())) == 64
    assert np.concatenate(first).max() < 70
    again = list(steps.epoch_batches(seed=1, epoch=1, examples=70, batch_size=16))
    np.testing.assert_array_equal(first, again)
    for seed, epoch in ((1, 2), (2, 1)):
        other = list(steps.epoch_batches(seed=seed, epoch=epoch, examples=70, batch_size=16))
        assert not np.array_equal(first, other)


def test_clock_stands_still_outside_training(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "save", lambda figure, path: time.sleep(0.5))
    history = train(tiny.config(optimizer="adam", epochs=3), tmp_path, tiny.dataset())
    facts = json.loads((tmp_path / "run.json").read_text())
    assert history[-1]["seconds"] < 0.5
    assert facts["compile_seconds"] > 0.05


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_folder_with_a_run_is_refused(tmp_path, name):
    (tmp_path / name).write_text("{}\n")
    with pytest.raises(FileExistsError, match=rf"already holds a run \({name}\)"):
        train(tiny.config(), tmp_path, tiny.dataset())
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "{}\n"


def test_workdir_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(FileExistsError, match="is a file; give the name of a folder"):
        train(tiny.config(), tmp_path / "run", tiny.dataset())


def _first_non_finite_step(config, data):
    """Follows the same run step by step, without jit."""
    problem = make_problem(config)
    params, _ = problem.init(config.seed)
    optimizer = make_optimizer(config).transformation
    state = optimizer.init(params)
    number = 0
    for epoch in range(1, config.epochs + 1):
        for batch in steps.epoch_batches(config.seed, epoch, len(data.train), config.batch_size):
            number += 1
            gradient = jax.value_and_grad(problem.loss, has_aux=True)
            (loss, _), grads = gradient(params, data.train[batch])
            if not np.isfinite(loss):
                return number
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
    return None


def test_non_finite_loss_names_the_step(tmp_path, monkeypatch):
    """Squared errors blow up over a few steps; the loss of every step is looked at, late."""
    squared = type(tiny.PROBLEM)(tiny.PROBLEM.widths, binary=False)
    monkeypatch.setitem(PROBLEMS, "curves", tiny.written(squared))
    data = tiny.dataset()
    config = tiny.config(optimizer="sgdm", learning_rate=0.7, epochs=20)
    step = _first_non_finite_step(config, data)
    assert step > 4, "the run must pass one epoch"
    with pytest.raises(NonFiniteLoss) as error:
        train(config, tmp_path, data)
    last = rf"[\d.e+]+ at step {step - 1}, " if step % 4 != 1 else ""
    expected = rf"the training loss at step {step} is (nan|inf); it was {last}[\d.e+]+ after epoch "
    assert re.match(expected + rf"{(step - 1) // 4}\. Training stopped; ", str(error.value))
    for word in ("learning_rate", "norm_constraint", "damping"):
        assert word in str(error.value)
    # The epochs before are kept, each with finite losses.
    lines = _lines(tmp_path)
    assert [line["epoch"] for line in lines] == list(range((step - 1) // 4 + 1))
    assert all(np.isfinite(line["train_loss"]) for line in lines)
    assert sorted(event_files.shown(tmp_path)["train_loss"]) == [line["step"] for line in lines]


def test_non_finite_after_the_last_step(tmp_path):
    """No batch has seen what the last step did; the evaluation does."""
    config = tiny.config(optimizer="sgdm", learning_rate=1e30, epochs=1, batch_size=70)
    expected = (
        r"train_loss after step 1 is (nan|inf); it was \d.\d+ before epoch 1\. Training stopped"
    )
    with pytest.raises(NonFiniteLoss, match=expected):
        train(config, tmp_path, tiny.dataset())
    assert [line["epoch"] for line in _lines(tmp_path)] == [0]


def test_divergence_with_a_huge_learning_rate(tmp_path):
    """The run can be read, and the same command says the same."""
    config = tiny.config(optimizer="kbfgs", learning_rate=1e8, weight_decay=0.1)
    messages = []
    for _ in range(2):
        with pytest.raises(NonFiniteLoss, match="the same command stops here again") as error:
            train(config, tmp_path, tiny.dataset())
        messages.append(str(error.value))
        run = read_run(tmp_path)
        assert not run.cut_off
        assert [record["epoch"] for record in run.metrics] == list(range(len(run.metrics)))
        assert all(np.isfinite(record["train_loss"]) for record in run.metrics)
    assert messages[0] == messages[1]


def test_examples_that_are_not_numbers(tmp_path):
    data = tiny.dataset()
    data.test[0, 0] = np.nan
    message = (
        "the test_loss after step 0 is nan; no step has been taken, so look for numbers in the"
    )
    with pytest.raises(NonFiniteLoss, match=message):
        train(tiny.config(), tmp_path, data)


def test_images_that_do_not_fit(tmp_path):
    with pytest.raises(ConfigError, match=r"15 pixels, but the network of .* takes 12"):
        train(tiny.config(), tmp_path / "run", tiny.dataset(pixels=15))
    with pytest.raises(ConfigError, match="batch_size is 16, but there are only 9 train"):
        train(tiny.config(), tmp_path / "run", tiny.dataset(train=9))
    assert not (tmp_path / "run").exists()


def test_bad_config_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ConfigError, match="damping"):
        train(tiny.config(damping=-1.0), tmp_path / "run", tiny.dataset())
    assert not (tmp_path / "run").exists()


def test_only_so_many_test_examples():
    config = tiny.config(problem="char_transformer", train_examples=20)
    whole, config.test_examples = load_dataset(config).test, 7
    some = load_dataset(config)
    np.testing.assert_array_equal(some.test.inputs, whole.inputs[:7])
    np.testing.assert_array_equal(some.test.labels, whole.labels[:7])
    assert len(some.train.inputs) == 20
    config.test_examples = len(whole.inputs) + 1
    with pytest.raises(
        ValueError, match=r"test_examples is \d+, but 'char_transformer' has \d+ test"
    ):
        load_dataset(config)
