"""Trainings of the tiny problem on several devices, in a process that has them; prints JSON.

python tiny_devices.py FOLDER
"""

import json
import sys
from pathlib import Path

import jax
import tiny

from kfqn_optax.experiment import plots, train
from kfqn_optax.experiment.config import ConfigError
from kfqn_optax.experiment.problems import PROBLEMS


def main(folder):
    # A layer wide enough that its factors are spread.
    PROBLEMS["curves"] = tiny.written(type(tiny.PROBLEM)((12, 40, 12), binary=True))
    train.load_dataset = lambda config: tiny.dataset()
    plots.losses_figure = lambda run: None
    plots.save = lambda figure, path: None

    def losses(name, **values):
        config = tiny.config(**{"curvature_examples": 8} | values)
        return [line["train_loss"] for line in train.train(config, Path(folder) / name)]

    def refusal(name, **values):
        try:
            losses(name, **values)
        except (ConfigError, FileExistsError) as error:
            return str(error)
        return "nothing is refused"

    many = {"devices": 4, "microbatches": 2, "shard_state": True}
    report = {
        "devices": jax.device_count(),
        "one": losses("one"),
        "many": losses("many", **many, epochs=1),
        "continued": losses("many", **many),
        "elsewhere": refusal("many", devices=2),
        "too many": refusal("none", devices=5),
        "uneven": refusal("none", devices=3),
        "run": json.loads((Path(folder) / "many" / "run.json").read_text())["device"],
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
