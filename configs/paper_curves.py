"""The CURVES autoencoder with a method of the K-BFGS paper: configs/paper_curves.py:adam, say.

The settings are those of the smallest train loss among those tried, most of them in short runs:
benchmarks/results/reproduce_tune.json, time_to_loss.jsonl, faces.json.
"""

from kfqn_optax.experiment.paper import paper_config

TUNED = {
    "kbfgs": {"learning_rate": 0.8, "damping": 0.1},
    "kbfgs_l": {"learning_rate": 0.8, "damping": 0.3},
    "kfac": {"learning_rate": 1.0, "damping": 3.0},
    "adam": {"learning_rate": 3e-3, "epsilon": 1e-8},
    "rmsprop": {"learning_rate": 1e-3, "epsilon": 1e-4},
    "sgdm": {"learning_rate": 1e-2},
}


def get_config(method="kbfgs"):
    return paper_config("curves", method, TUNED, epochs=100)
