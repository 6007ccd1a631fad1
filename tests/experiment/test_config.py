"""Every key is checked, and what is wrong is said in a sentence."""

import importlib.util
from pathlib import Path

import pytest

from kfqn_optax.experiment.config import KEYS, ConfigError, check, default_config
from kfqn_optax.experiment.problems import PROBLEMS

CONFIGS = Path(__file__).parents[2] / "configs"


def _get_config(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


DAMPING = {"curves": 0.1, "mnist": 0.3, "faces": 0.1, "fashion_mnist": 0.3}


@pytest.mark.parametrize("name", PROBLEMS)
def test_config_file_of_each_problem(name):
    config = _get_config(CONFIGS / f"{name}.py")
    check(config)
    assert set(config) == set(KEYS)
    assert config.problem == name


@pytest.mark.parametrize("name", DAMPING)
def test_config_file_of_each_autoencoder(name):
    config = _get_config(CONFIGS / f"{name}.py")
    assert (config.optimizer, config.learning_rate, config.damping) == (
        "kbfgs",
        0.3,
        DAMPING[name],
    )
    assert config.norm_constraint == 3.0
    assert (config.batch_size, config.weight_decay, config.warm_start) == (1000, 1e-5, True)


def test_no_config_file_without_a_problem():
    """Those of the paper's comparison are in test_reproduce.py."""
    names = {path.stem for path in CONFIGS.glob("*.py")}
    assert {name for name in names if not name.startswith("paper_")} == set(PROBLEMS)


def test_unknown_key_names_the_nearest():
    config = default_config()
    config.learning_rat = 0.1
    with pytest.raises(ConfigError, match=r"no key 'learning_rat'; did you mean 'learning_rate'\?"):
        check(config)


def test_unknown_key_unlike_any_other_lists_the_keys():
    config = default_config()
    config.xyzzy = 0.1
    with pytest.raises(ConfigError, match=r"no key 'xyzzy'; the keys are problem, .*seed"):
        check(config)


def test_missing_key():
    config = default_config()
    del config.damping
    with pytest.raises(ConfigError, match="config lacks the key 'damping'"):
        check(config)


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("problem", "mnits", "one of curves, mnist"),
        (
            "optimizer",
            "lars",
            "one of kbfgs, kbfgs_l, kfqn, block_kbfgs, kfac, tkfac, mbf, adam, sgdm, rmsprop, muon",
        ),
        ("framework", "torch", "one of linen, nnx"),
        ("split", "even", "one of sqrt_t, sqrt"),
        ("fallback_learning_rate", 0.0, "above 0"),
        ("fallback_kinds", "embed, attention", "of attend, conv, dense, dense general"),
        ("memory_size", 0, "at least 1"),
        ("dropout", 1.0, "below 1"),
        ("learning_rate", 0.0, "above 0"),
        ("learning_rate", float("nan"), "above 0"),
        ("damping", -0.3, "above 0"),
        ("damping", float("inf"), "finite"),
        ("momentum", 1.0, "below 1"),
        ("weight_decay", -1e-5, "at least 0"),
        ("factor_decay", 1.5, "below 1"),
        ("pair_decay", -0.1, "at least 0"),
        ("powell", 0.0, "above 0 and below 1"),
        ("powell", 1.0, "above 0 and below 1"),
        ("curvature_examples", -1, "at least 0"),
        ("train_examples", -1, "at least 0"),
        ("test_examples", -1, "at least 0"),
        ("epsilon", 0.0, "above 0"),
        ("batch_size", 0, "at least 1"),
        ("eval_batch_size", 0, "at least 1"),
        ("epochs", 0, "at least 1"),
        ("seed", -1, r"0 to 2\*\*32 - 1"),
        ("seed", 2**32, r"0 to 2\*\*32 - 1"),
    ],
)
def test_value_out_of_range(key, value, rule):
    config = default_config()
    config[key] = value
    with pytest.raises(ConfigError, match=rf"config\.{key} is .*; it must be .*{rule}"):
        check(config)


@pytest.mark.parametrize(
    ("key", "value"),
    [("epochs", 1.5), ("epochs", True), ("warm_start", 1), ("data_dir", 3), ("tied", 1)],
)
def test_value_of_the_wrong_type(key, value):
    values = default_config().to_dict() | {key: value}
    with pytest.raises(ConfigError, match=rf"config\.{key} is {value}"):
        check(type(default_config())(values))


def test_whole_number_stands_for_a_float():
    config = default_config()
    config.learning_rate = 1
    check(config)
    assert isinstance(config.learning_rate, float)


def test_framework_that_a_problem_is_not_written_in():
    config = default_config()
    config.framework = "nnx"
    with pytest.raises(ConfigError, match="'curves' is written in linen only; .* char_transformer"):
        check(config)
    config.problem = "char_transformer"
    check(config)


def test_curvature_examples_beyond_the_batch():
    config = default_config()
    config.batch_size, config.curvature_examples = 100, 100
    check(config)
    config.curvature_examples = 101
    with pytest.raises(ConfigError, match=r"curvature_examples is 101, more than the batch of 100"):
        check(config)
