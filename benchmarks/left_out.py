"""Which layers of the transformer K-BFGS should have: runs that leave some kinds to the fallback.

    python benchmarks/left_out.py [--steps 160]

The config's settings of K-BFGS, and Adam as it is in the config as fallback; only the kinds of
layers left to it differ. Results go run by run to ``benchmarks/results/left_out.json``, and what is
there is not run again; the table is printed at the end.
"""

import argparse
import json

from methods import RESULTS, Trial

from kfqn_optax.experiment.config import default_config
from kfqn_optax.experiment.problems import make_problem
from kfqn_optax.experiment.train import load_dataset

KINDS = ("", "embed", "dense general", "embed,dense general", "dense")
SETTINGS = {
    "problem": "char_transformer", "optimizer": "kbfgs", "learning_rate": 300.0, "damping": 3.0,
    "norm_constraint": 10.0, "fallback_learning_rate": 0.003, "batch_size": 32,
}  # fmt: skip
PATH = RESULTS / "left_out.json"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=160)
    options = parser.parse_args()
    results = json.loads(PATH.read_text()) if PATH.exists() else {}
    for kinds in KINDS:
        if kinds not in results:
            config = default_config()
            config.update({**SETTINGS, "fallback_kinds": kinds})
            trial = Trial(config, "kbfgs", make_problem(config), load_dataset(config))
            results[kinds] = trial.run(config.learning_rate, options.steps)
            PATH.write_text(json.dumps(results) + "\n")
    print("| left to Adam | " + " | ".join(f"step {n}" for n in (40, 80, 120, 160)) + " |")
    print("|---|---|---|---|---|")
    for kinds, run in results.items():
        losses = {point["step"]: point["train_loss"] for point in run["curve"]}
        cells = " | ".join(f"{losses[n]:.3f}" for n in (40, 80, 120, 160))
        print(f"| {kinds.replace(',', ', ') or 'nothing'} | {cells} |")


if __name__ == "__main__":
    main()
