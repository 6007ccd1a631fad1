"""The networks in linen and in NNX, their losses, their state, and training with them."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from kfqn_optax.experiment import plots, steps
from kfqn_optax.experiment.optimizers import make_optimizer
from kfqn_optax.experiment.problems import PROBLEMS, cnn, make_problem, transformer
from kfqn_optax.experiment.problems.classifier import cross_entropy
from kfqn_optax.experiment.train import train
from kfqn_optax.experiment.workdir import CLASSIFIER_METRICS, read_run

STILL = transformer.Sizes(symbols=5, depth=2, width=8, heads=2, dropout=0.0)
NAMES = list(tiny.CLASSIFIERS)
slow = pytest.mark.slow
BOTH = [
    pytest.param("fashion_mnist_cnn", "linen"),
    pytest.param("char_transformer", "nnx"),
    pytest.param("fashion_mnist_cnn", "nnx", marks=slow),
    pytest.param("char_transformer", "linen", marks=slow),
]


def data_of(name):
    return tiny.images() if name == "fashion_mnist_cnn" else tiny.characters()


@functools.cache
def problem_of(name, framework):
    """One for all tests, so that its functions are compiled once."""
    return tiny.CLASSIFIERS[name][framework](None)


@functools.cache
def start_of(name, framework):
    """Parameters and state at seed 0."""
    return problem_of(name, framework).init(0)


def batch_of(name, count=6):
    return jax.tree.map(jnp.asarray, steps.take(data_of(name).train, slice(count)))


def measured(problem, params, batch, state):
    """The statistics at the parameters."""
    return jax.jit(lambda *args: problem.curvature_fn(*args)(args[0]))(params, batch, state)


# --- the loss ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5,), (5, 3)])
def test_cross_entropy(shape):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(*shape, 4)).astype(np.float32)
    labels = rng.integers(0, 4, shape).astype(np.int32)
    p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    chosen = np.take_along_axis(p, labels[..., None], axis=-1)[..., 0].reshape(5, -1)
    right = (p.argmax(axis=-1) == labels).reshape(5, -1)
    losses, accuracies = cross_entropy(jnp.asarray(logits), jnp.asarray(labels))
    np.testing.assert_allclose(losses, -np.log(chosen).mean(axis=1), rtol=1e-5)
    np.testing.assert_allclose(accuracies, right.mean(axis=1), rtol=1e-6)
    assert losses.dtype == accuracies.dtype == np.float32


# --- linen and NNX are the same network ----------------------------------------------------------


def as_linen(state):
    """NNX variables as nested dictionaries with linen's names: lists become numbered names."""
    tree = nnx.to_pure_dict(state)

    def visit(node):
        found = {}
        for key, child in node.items():
            child = visit(child) if isinstance(child, dict) else child
            if isinstance(child, dict) and all(isinstance(name, int) for name in child):
                found |= {f"{key}_{number}": part for number, part in child.items()}
            else:
                found[key] = child
        return found

    return visit(tree)


def same_network(name):
    """The problem in linen and in NNX, with the same weights: linen's, params and state; NNX's."""
    if name == "fashion_mnist_cnn":
        linen, flat = cnn.linen_problem(tiny.STAGES, 3), cnn.nnx_problem(tiny.STAGES, 3)
    else:
        linen, flat = transformer.linen_problem(STILL), transformer.nnx_problem(STILL)
    params, state = linen.init(0)
    nnx_params, nnx_state = flat.init(1)
    converted = {"params": as_linen(nnx_params)}
    assert jax.tree.structure(converted) == jax.tree.structure(params)
    assert jax.tree.map(jnp.shape, converted) == jax.tree.map(jnp.shape, params)
    return linen, (converted, state), flat, (nnx_params, nnx_state)


@pytest.mark.parametrize("name", NAMES)
def test_linen_and_nnx_agree(name):
    """Loss, its gradient, the averages after it, what is measured in use, and the curvature."""
    linen, (params, state), flat, (nnx_params, nnx_state) = same_network(name)
    batch = batch_of(name)
    gradient = jax.jit(jax.value_and_grad(linen.loss, has_aux=True))
    nnx_gradient = jax.jit(jax.value_and_grad(flat.loss, has_aux=True))
    for _ in range(2):
        (loss, after), grads = gradient(params, batch, state)
        (nnx_loss, nnx_after), nnx_grads = nnx_gradient(nnx_params, batch, nnx_state)
        np.testing.assert_allclose(nnx_loss, loss, rtol=1e-5)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5)
        jax.tree.map(close, {"params": as_linen(nnx_grads)}, grads)
        averages = as_linen(nnx.filter_state(nnx_after.rest, nnx.BatchStat))
        jax.tree.map(close, averages, after.batch_stats)
        state, nnx_state = after, nnx_after
    nnx_errors = jax.jit(flat.errors)(nnx_params, batch, nnx_state)
    jax.tree.map(close, nnx_errors, jax.jit(linen.errors)(params, batch, state))

    found = linen.layers(params, batch, state)
    nnx_found = flat.layers(nnx_params, batch, nnx_state)
    assert {tiny.linen_name(layer.path) for layer in nnx_found} == {layer.path for layer in found}
    at = measured(linen, params, batch, state)
    nnx_at = measured(flat, nnx_params, batch, nnx_state)
    np.testing.assert_allclose(nnx_at.loss, at.loss, rtol=1e-5)
    nnx_layers = {tiny.linen_name(path): layer for path, layer in nnx_at.layers.items()}
    jax.tree.map(close, nnx_layers, at.layers)


@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_tied_head_is_the_embedding(framework):
    config = tiny.config(problem="char_transformer", framework=framework)
    sizes = {}
    for tied in (False, True):
        config.tied = tied
        params, _ = jax.eval_shape(make_problem(config).init, 0)
        sizes[tied] = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert sizes[False] - sizes[True] == 128 * 97 + 97


@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_sizes(framework):
    """A few hundred thousand parameters: what a CPU can train."""
    config = tiny.config(problem="fashion_mnist_cnn", framework=framework)
    params, _ = jax.eval_shape(make_problem(config).init, 0)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 278_890


def test_no_place_sees_what_comes_after_it():
    problem = transformer.linen_problem(STILL)
    params, _ = problem.init(0)
    inputs, _ = batch_of("char_transformer")
    changed = inputs.at[:, 9:].set((inputs[:, 9:] + 1) % 5)
    logits, others = (problem.module.apply(params, x) for x in (inputs, changed))
    np.testing.assert_allclose(logits[:, :9], others[:, :9], rtol=1e-5, atol=1e-6)
    assert np.abs(logits[:, 9:] - others[:, 9:]).max(axis=(0, 2)).min() > 1e-3


def test_sinusoids():
    table = transformer.sinusoids(64, 128)[0]
    np.testing.assert_allclose(table[:, 0], np.sin(np.arange(64)), atol=1e-6)
    np.testing.assert_allclose(table[:, 64 + 32], np.cos(np.arange(64) / 100), atol=1e-6)
    apart = table @ table.T
    assert (apart.argmax(axis=1) == np.arange(64)).all()


# --- what they keep beside their parameters -------------------------------------------------------


def numbers(tree):
    """The leaves as plain arrays, random keys too."""
    return [
        np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
        for x in jax.tree.leaves(tree)
    ]


@pytest.mark.parametrize(("name", "framework"), BOTH)
def test_curvature_is_measured_with_the_masks_and_averages_of_the_gradient(name, framework):
    problem, batch = problem_of(name, framework), batch_of(name)
    params, state = start_of(name, framework)
    before = numbers(state)
    gradient_pass = jax.jit(problem.loss)
    loss, after = gradient_pass(params, batch, state)
    for _ in range(2):
        at = measured(problem, params, batch, state)
        np.testing.assert_allclose(at.loss, loss, rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, before, numbers(state))
    changed = [not np.array_equal(a, b) for a, b in zip(before, numbers(after), strict=True)]
    assert any(changed)
    loss_after, _ = gradient_pass(params, batch, after)
    if name == "char_transformer":
        assert abs(loss_after - loss) > 1e-4, "the next step has other dropout masks"
    else:
        np.testing.assert_allclose(loss_after, loss, rtol=1e-6)


@pytest.mark.parametrize(("name", "framework"), BOTH)
def test_step_goes_on_with_the_state_of_the_gradient_pass(name, framework):
    """Not with that of a curvature pass."""
    problem, examples = problem_of(name, framework), batch_of(name, 20)
    params, model_state = start_of(name, framework)
    config = tiny.config(learning_rate=0.1, fallback_learning_rate=0.1)
    found = problem.layers(params, steps.take(examples, slice(2)), model_state)
    optimizer = make_optimizer(config, lambda: found[-1:])  # one is enough, and quickly compiled
    state = steps.TrainState(params, optimizer.transformation.init(params), model_state)
    step = jax.jit(steps.make_step(problem, optimizer, curvature_examples=4))
    indices = np.arange(3, 11, dtype=np.int32)
    stepped, loss = step(state, examples, indices)
    batch = steps.take(examples, indices)
    expected_loss, expected = jax.jit(problem.loss)(params, batch, model_state)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    for got, want in zip(numbers(stepped.model_state), numbers(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), stepped.params, params)
    assert (
        sum(jax.tree.leaves(moved)) >= len(jax.tree.leaves(moved)) - 4
    )  # keys' biases, dead units
    np.testing.assert_equal(step._cache_size(), 1)
    step(stepped, examples, indices)
    np.testing.assert_equal(step._cache_size(), 1)


@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_evaluation_uses_running_averages(framework):
    problem, batch = problem_of("fashion_mnist_cnn", framework), batch_of("fashion_mnist_cnn", 30)
    params, state = start_of("fashion_mnist_cnn", framework)
    loss = jax.jit(problem.loss)
    errors = jax.jit(problem.errors)
    fresh, _ = errors(params, batch, state)
    for _ in range(60):  # 0.9^60 = 0.002: the averages are those of this batch
        in_training, state = loss(params, batch, state)
    assert abs(fresh.mean() - in_training) > 0.01
    losses, accuracies = errors(params, batch, state)
    np.testing.assert_allclose(losses.mean(), in_training, rtol=1e-3)
    # An example's loss does not depend on its company.
    some, _ = errors(params, steps.take(batch, slice(2)), state)
    np.testing.assert_allclose(some, losses[:2], rtol=1e-4)
    evaluate = steps.make_evaluate(problem, batch, batch, weight_decay=0.0, batch_size=7)
    metrics = evaluate(params, state)
    np.testing.assert_allclose(metrics["test_loss"], losses.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["train_accuracy"], accuracies.mean(), rtol=1e-6)


@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_evaluation_has_no_dropout(framework):
    problem, batch = problem_of("char_transformer", framework), batch_of("char_transformer")
    params, state = start_of("char_transformer", framework)
    _, after = jax.jit(problem.loss)(params, batch, state)
    one, other = (jax.jit(problem.errors)(params, batch, s) for s in (state, after))
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_seed_decides_weights_and_masks(framework):
    problem, batch = problem_of("char_transformer", framework), batch_of("char_transformer")
    gradient_pass = jax.jit(problem.loss)
    (one, state), same, (_, other) = (problem.init(seed) for seed in (1, 1, 2))
    for got, want in zip(numbers((one, state)), numbers(same), strict=True):
        np.testing.assert_array_equal(got, want)
    loss, _ = gradient_pass(one, batch, state)
    other_masks, _ = gradient_pass(one, batch, other)
    assert abs(loss - other_masks) > 1e-4


# --- training ------------------------------------------------------------------------------------


@pytest.fixture
def tiny_problems(monkeypatch):
    """No figures either, which take longer than all the rest."""
    for name, written in tiny.CLASSIFIERS.items():
        monkeypatch.setitem(PROBLEMS, name, written)
    monkeypatch.setattr(plots, "save", lambda figure, path: None)


RUNS = [
    pytest.param("fashion_mnist_cnn", "linen", "kbfgs", 0.3, marks=slow),
    pytest.param("fashion_mnist_cnn", "nnx", "kbfgs", 0.3),
    pytest.param("fashion_mnist_cnn", "linen", "sgdm", 0.1, marks=slow),
    pytest.param("fashion_mnist_cnn", "nnx", "muon", 0.02),
    pytest.param("char_transformer", "linen", "adam", 0.01, marks=slow),
    pytest.param("char_transformer", "linen", "kfqn", 0.1, marks=slow),
    pytest.param("fashion_mnist_cnn", "linen", "kfqn", 0.3, marks=slow),
    pytest.param("fashion_mnist_cnn", "nnx", "kbfgs_l", 0.3, marks=slow),
]


@pytest.mark.parametrize(("name", "framework", "optimizer", "learning_rate"), RUNS)
def test_it_learns(tmp_path, tiny_problems, name, framework, optimizer, learning_rate):
    config = tiny.config(
        problem=name,
        framework=framework,
        optimizer=optimizer,
        learning_rate=learning_rate,
        fallback_learning_rate=0.01,
        damping=0.1,
        norm_constraint=0.1,
        epochs=15,
        batch_size=10,
    )
    history = train(config, tmp_path / "run", data_of(name))
    assert history[0]["train_accuracy"] < 0.6
    assert history[-1]["test_accuracy"] > 0.9
    assert history[-1]["test_loss"] < 0.5 * history[0]["test_loss"]


def test_files_of_a_run(tmp_path, tiny_problems, capsys):
    config = tiny.config(problem="char_transformer", optimizer="adam", learning_rate=0.01)
    history = train(config, tmp_path, tiny.characters())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == history == read_run(tmp_path).metrics
    assert [tuple(line) for line in lines] == [CLASSIFIER_METRICS] * 3
    facts = json.loads((tmp_path / "run.json").read_text())
    assert (facts["text_sha256"], facts["context"]) == ("0" * 64, 64)
    assert (facts["train_examples"], facts["steps_per_epoch"]) == (70, 4)
    shown = capsys.readouterr().err
    assert "70 train and 25 test windows of 64 characters" in shown
    assert "transformer of depth 1 and width 8, untied head, linen" in shown
    assert f"test accuracy {lines[-1]['test_accuracy']:.4f}" in shown
