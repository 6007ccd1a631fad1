"""A config's optimizer does the step that its name promises, weight decay included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from optax.contrib import MuonDimensionNumbers

from kfqn_optax.experiment import optimizers
from kfqn_optax.experiment.steps import take

W, G, TAU, LR = 0.5, 2.0, 0.1, 0.01
DECAYED = G + TAU * W  # 2.05


def _two_steps(name):
    config = tiny.config(optimizer=name, learning_rate=LR, weight_decay=TAU, momentum=0.7)
    tx, *needs = optimizers.make_optimizer(config)
    assert not any(needs)
    params = jnp.full((3,), W, jnp.float32)
    grads = jnp.full((3,), G, jnp.float32)
    state = tx.init(params)
    first, state = tx.update(grads, state, params)
    second, _ = tx.update(grads, state, params)
    return first[0], second[0]


def test_sgdm_is_heavy_ball():
    first, second = _two_steps("sgdm")
    np.testing.assert_allclose(first, -LR * DECAYED, rtol=1e-6)
    np.testing.assert_allclose(second, -LR * 1.7 * DECAYED, rtol=1e-6)


def test_adam():
    # At the first steps with a constant gradient, Adam's corrected averages are g and g^2.
    first, second = _two_steps("adam")
    np.testing.assert_allclose([first, second], [-LR, -LR], rtol=1e-4)


def test_rmsprop():
    first, second = _two_steps("rmsprop")
    np.testing.assert_allclose(first, -LR / np.sqrt(0.1), rtol=1e-4)
    np.testing.assert_allclose(second, -LR / np.sqrt(0.19), rtol=1e-4)


def test_epsilon_is_added_to_the_root():
    for name, root in (("adam", 1), ("rmsprop", 0.1**0.5)):
        config = tiny.config(optimizer=name, learning_rate=LR, weight_decay=0.0, epsilon=3.0)
        tx = optimizers.make_optimizer(config).transformation
        params = jnp.full((3,), W, jnp.float32)
        updates, _ = tx.update(jnp.full_like(params, G), tx.init(params), params)
        np.testing.assert_allclose(updates, -LR * G / (root * G + 3), rtol=1e-5)


@pytest.mark.parametrize("name", ["adam", "rmsprop"])
def test_weight_decay_is_part_of_the_gradient(name):
    """Both divide by the gradient's size; with g = 0 the decay alone makes a step as large."""
    config = tiny.config(optimizer=name, learning_rate=LR, weight_decay=TAU)
    tx = optimizers.make_optimizer(config).transformation
    params = jnp.full((3,), W, jnp.float32)
    updates, _ = tx.update(jnp.zeros_like(params), tx.init(params), params)
    np.testing.assert_allclose(updates, -LR / np.sqrt(1 if name == "adam" else 0.1), rtol=1e-4)


NUMBERS = {
    "learning_rate": 0.16,
    "damping": 0.17,
    "momentum": 0.11,
    "weight_decay": 0.12,
    "pair_decay": 0.14,
    "powell": 0.15,
    "norm_constraint": 0.18,
}
OWN = {
    "kbfgs": {"factor_decay": 0.13},
    "kbfgs_l": {"factor_decay": 0.13, "memory_size": 7},
    "kfqn": {"split": "sqrt"},
    "block_kbfgs": {"factor_decay": 0.13},
    "kfac": {"factor_decay": 0.13, "inverse_every": 19},
    "tkfac": {"factor_decay": 0.13, "inverse_every": 19},
    "mbf": {"factor_decay": 0.13, "inverse_every": 19},
}
LACKING = {name: {"pair_decay", "powell"} for name in ("kfac", "tkfac")}
LACKING["block_kbfgs"] = {"pair_decay", "norm_constraint"}
LACKING["mbf"] = {"pair_decay", "powell", "norm_constraint"}


@pytest.mark.parametrize("name", OWN)
def test_kbfgs_and_its_kin_get_every_number(monkeypatch, name):
    calls = []
    monkeypatch.setattr(optimizers.kfqn, name, lambda **k: calls.append(k), raising=False)
    config = tiny.config(optimizer=name, **NUMBERS, **OWN[name])
    made = optimizers.make_optimizer(config, lambda: ("the layers",))
    assert made.takes_curvature == (name != "mbf")
    assert made.warm_starts == (name not in ("kfqn", "block_kbfgs", "mbf"))
    assert made.learns_pairs == (name in ("kbfgs", "kbfgs_l", "kfqn", "block_kbfgs"))
    assert made.draws_targets == (name in ("kfac", "tkfac"))
    config.norm_constraint = 0.0
    optimizers.make_optimizer(config)
    limited, unlimited = ({**call, "fallback": None} for call in calls)
    expected = NUMBERS | OWN[name] | {"fallback": None}
    expected = {k: v for k, v in expected.items() if k not in LACKING.get(name, set())}
    without = {"norm_constraint": None} if "norm_constraint" in expected else {}
    assert limited == expected | {"layers": ("the layers",)}
    assert unlimited == expected | {"layers": None} | without


def test_layers_left_to_the_fallback(monkeypatch):
    calls = []
    monkeypatch.setattr(optimizers.kfqn, "kbfgs", lambda **k: calls.append(k))
    problem = tiny.CLASSIFIERS["char_transformer"]["linen"](None)
    params, model_state = problem.init(0)
    batch = take(tiny.characters().train, slice(2))
    found = problem.layers(params, batch, model_state)
    config = tiny.config(fallback_kinds="embed, dense general")
    optimizers.make_optimizer(config, lambda: found)
    kept = {layer.path.removeprefix("params/") for layer in calls[0]["layers"]}
    assert kept == {"blocks_0/mlp_in", "blocks_0/mlp_out", "head"}


def test_fallback_is_adam_with_its_own_learning_rate(monkeypatch):
    """The weight decay is part of its gradient too: with g = 0 it alone makes a step."""
    calls = []
    monkeypatch.setattr(optimizers.kfqn, "kbfgs", lambda **k: calls.append(k))
    config = tiny.config(weight_decay=TAU, learning_rate=0.3, fallback_learning_rate=LR)
    optimizers.make_optimizer(config)
    tx = calls[0]["fallback"]
    params = jnp.full((3,), W, jnp.float32)
    updates, _ = tx.update(jnp.zeros_like(params), tx.init(params), params)
    np.testing.assert_allclose(updates, -LR, rtol=1e-4)


def _matrices(problem):
    """{path: axes that Muon takes as rows, as columns}, NNX paths written as linen's."""
    params, _ = problem.init(0)
    is_leaf = lambda node: node is None or isinstance(node, MuonDimensionNumbers)  # noqa: E731
    numbers = jax.tree.leaves(optimizers.kernels_as_matrices(params), is_leaf=is_leaf)
    paths = [path for path, _ in jax.tree.leaves_with_path(params)]
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]
    names = [name.removeprefix("params/").removesuffix("/value") for name in names]
    names = [tiny.linen_name(name) for name in names]
    return dict(zip(names, numbers, strict=True))


@pytest.mark.parametrize("name", tiny.CLASSIFIERS)
def test_muon_takes_kernels_as_matrices(name):
    linen, nnx = (_matrices(make(None)) for make in tiny.CLASSIFIERS[name].values())
    assert linen == nnx
    kernels = {path: numbers for path, numbers in linen.items() if numbers is not None}
    assert set(kernels) == {path for path in linen if path.endswith("/kernel")}
    expected = {"head": ((0,), (1,)), "convs_1": ((0, 1, 2), (3,))}
    if name == "char_transformer":
        projection = ((0,), (1, 2))
        expected = {"head": ((0,), (1,)), "blocks_0/mlp_in": ((0,), (1,))}
        expected |= {"blocks_0/attention/query": projection, "blocks_0/attention/key": projection}
        expected |= {"blocks_0/attention/value": projection}
        expected |= {"blocks_0/attention/out": ((0, 1), (2,))}
    assert {path: kernels[f"params/{path}/kernel"] for path in expected} == expected


def test_muon_steps():
    """A kernel's step is orthogonal up to Muon's tolerance; the others' is Adam's with Nesterov."""
    config = tiny.config(optimizer="muon", learning_rate=0.1, fallback_learning_rate=LR)
    tx = optimizers.make_optimizer(config).transformation
    rng = np.random.default_rng(0)
    params = {"out": {"kernel": jnp.asarray(rng.normal(size=(2, 3, 6))), "bias": jnp.ones(6)}}
    params["embed"] = {"embedding": jnp.ones((5, 6))}
    updates, _ = tx.update(params, tx.init(params), params)
    singular = np.linalg.svd(updates["out"]["kernel"].reshape(6, 6), compute_uv=False)
    assert 0.06 < singular.min() < singular.max() < 0.13
    # With a constant gradient g, Nesterov's look-ahead is (0.1 + 0.9 0.1 / (1 - 0.9^2)) g.
    for step in (updates["embed"]["embedding"], updates["out"]["bias"]):
        np.testing.assert_allclose(step, -LR * (1 + 0.09 / 0.19), rtol=1e-3)
