"""The FACES autoencoder with a method of the K-BFGS paper: configs/paper_faces.py:adam, say.

The settings are those of the smallest train loss among those tried, most of them in short runs:
benchmarks/results/reproduce_tune.json, time_to_loss.jsonl, faces.json.
"""

from kfqn_optax.experiment.paper import paper_config

TUNED = {
    "kbfgs": {"learning_rate": 0.3, "damping": 0.1},
    "kbfgs_l": {"learning_rate": 0.3, "damping": 0.1},
    "kfac": {"learning_rate": 0.3, "damping": 1.0},
    "adam": {"learning_rate": 1e-3, "epsilon": 1e-8},
    "rmsprop": {"learning_rate": 3e-4, "epsilon": 1e-8},
    "sgdm": {"learning_rate": 1e-3},
}


def get_config(method="kbfgs"):
    return paper_config("faces", method, TUNED, epochs=10)
