"""Curves of several runs in one small JSON file, for the results that are committed here.

    python benchmarks/collect.py RUN RUN ... --output benchmarks/results/faces.json

RUN is a folder that kfqn-train wrote; `kfqn-compare RUN RUN ...` shows the same runs as a figure
and a table.
"""

import argparse
import json
from pathlib import Path

SETTINGS = ["problem", "optimizer", "learning_rate", "damping", "norm_constraint", "train_examples"]
COLUMNS = ["epoch", "seconds", "train_loss", "test_loss"]


def read(run):
    """Settings and curve of a run."""
    config = json.loads((run / "config.json").read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    curve = [[round(float(row[column]), 2) for column in COLUMNS] for row in rows]
    return {**{key: config[key] for key in [*SETTINGS, "seed"]}, "curve": curve}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    runs = ",\n".join(json.dumps(read(run)) for run in options.runs)
    options.output.write_text(f'{{"columns": {json.dumps(COLUMNS)}, "runs": [\n{runs}\n]}}\n')


if __name__ == "__main__":
    main()
