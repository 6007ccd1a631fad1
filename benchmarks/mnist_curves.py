"""Our MNIST runs beside the losses that the authors of K-BFGS recorded, as JSON and as a figure.

    python benchmarks/mnist_curves.py --limited RUN ... --published RUN ... --authors FILE

RUN is a folder that kfqn-train wrote for configs/mnist.py: limited with the config as it is,
published with --config.norm_constraint=0. FILE is a JSON file with the authors' losses, epoch by
epoch: {"K-BFGS": [[epoch, train loss, ...], ...]}. Without arguments the figure is drawn again from
the committed results.
"""

import argparse
import json
import statistics
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"


def curve(run):
    """Train losses of a run by epoch, epoch 0 first, and its seed."""
    lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
    config = json.loads((Path(run) / "config.json").read_text())
    return {
        "seed": config["seed"],
        "train_loss": [json.loads(line)["train_loss"] for line in lines],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limited", nargs="*", default=[])
    parser.add_argument("--published", nargs="*", default=[])
    parser.add_argument("--authors", type=Path)
    options = parser.parse_args()
    path = RESULTS / "mnist_curves.json"
    if options.authors:
        recorded = json.loads(options.authors.read_text())["K-BFGS"]
        results = {
            "problem": "MNIST autoencoder, K-BFGS, learning rate 0.3, damping 0.3, batch 1000",
            "authors": {int(row[0]): row[1] for row in recorded if row[0] <= 10},
            "limited": [curve(run) for run in options.limited],
            "published": [curve(run) for run in options.published],
        }
        path.write_text(json.dumps(results, indent=1) + "\n")
    results = json.loads(path.read_text())
    authors = {int(epoch): loss for epoch, loss in results["authors"].items()}
    draw(results, authors).savefig(RESULTS / "mnist_curves.png", dpi=120)
    report(results, authors)


def draw(results, authors):
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(list(authors), list(authors.values()), "ko-", label="the authors' record", zorder=3)
    styles = [
        ("published", "tab:orange", "ours, as published"),
        ("limited", "tab:blue", "ours, norm_constraint=3"),
    ]
    for key, colour, label in styles:
        for run in results[key]:
            losses = run["train_loss"][1:]
            axes.plot(range(1, len(losses) + 1), losses, color=colour, alpha=0.8, label=label)
            label = None
    axes.set(xlabel="epoch", ylabel="train loss", yscale="log", xlim=(1, 10), ylim=(55, 200))
    axes.set_yticks(
        [60, 70, 80, 100, 120, 150, 200], labels=map(str, [60, 70, 80, 100, 120, 150, 200])
    )
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    axes.set_title("MNIST autoencoder, K-BFGS, learning rate 0.3, damping 0.3", fontsize=10)
    return figure


def report(results, authors):
    for key in ["published", "limited"]:
        finished = [run["train_loss"] for run in results[key] if len(run["train_loss"]) > 10]
        stopped = [run["seed"] for run in results[key] if len(run["train_loss"]) <= 10]
        print(f"{key}: {len(finished)} runs finished; seeds {stopped or 'none'} went non-finite")
        for epoch, theirs in authors.items():
            if finished:
                median = statistics.median(losses[epoch] for losses in finished)
                change = 100 * (median / theirs - 1)
                print(
                    f"  epoch {epoch:2}  median {median:7.2f}  theirs {theirs:7.2f}  {change:+.1f}%"
                )


if __name__ == "__main__":
    main()
