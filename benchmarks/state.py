"""Bytes of optimizer state for each method and model, as a Markdown table.

    python benchmarks/state.py

From shapes alone: nothing is trained. The settings are those of the config files.
"""

import importlib.util
import math
from pathlib import Path

import jax
import numpy as np

from kfqn_optax.experiment.optimizers import make_optimizer
from kfqn_optax.experiment.problems import make_problem

ROOT = Path(__file__).parents[1]
METHODS = ("kbfgs", "kbfgs_l", "kfqn", "adam", "muon")
# By config: one example, as the problem's loss takes it.
EXAMPLES = {
    "mnist": np.zeros((1, 784), np.float32),
    "faces": np.zeros((1, 625), np.float32),
    "fashion_mnist_cnn": (np.zeros((1, 28, 28, 1), np.float32), np.zeros((1,), np.int32)),
    "char_transformer": (np.zeros((1, 64), np.int32), np.zeros((1, 64), np.int32)),
}


def config_of(name):
    """The config of a file in configs/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def state_bytes(config, example):
    """Bytes of the parameters, and of each method's state."""
    problem = make_problem(config)
    params, model_state = problem.init(0)
    layers = problem.layers(params, example, model_state)
    sizes = {"parameters": bytes_of(params)}
    for method in METHODS:
        config.optimizer = method
        optimizer = make_optimizer(config, lambda: layers)
        sizes[method] = bytes_of(jax.eval_shape(optimizer.transformation.init, params))
    return sizes


def bytes_of(tree):
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def main():
    table = {name: state_bytes(config_of(name), example) for name, example in EXAMPLES.items()}
    columns = ["parameters", *METHODS]
    print("| config | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for name, sizes in table.items():
        cells = [f"{sizes[column] / 1e6:.1f} MB" for column in columns]
        print(f"| `{name}` | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
