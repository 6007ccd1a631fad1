"""The figure: ratios by method, and how the overhead grows with width and batch.

    python -m benchmarks.price.draw [FILE.json]

Writes FILE.png; without a name, for this device's results. A line of the growth shows the seconds
that a step takes on top of a plain one; beside it, dashed, the FLOPs of that overhead by formula,
at the rate of the largest size. The slopes, of log time against log size, are fitted over all
points. Where queues of steps were timed, those are drawn.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.price import device
from benchmarks.price.problems import AUTOENCODERS

COLORS = ["tab:blue", "tab:cyan", "tab:purple", "tab:red", "tab:olive", "tab:brown"]


def ratio(row: dict[str, Any]) -> float | None:
    """Of a row: queued if that was timed."""
    return row.get("queued_ratio", row.get("ratio"))


def growth(entries: dict[str, Any], family: str) -> dict[str, list[tuple[int, float, float]]]:
    """By candidate: size, overhead in seconds, overhead in FLOPs."""
    lines: dict[str, list] = {}
    sizes = {int(name.split("-")[1]): e for name, e in entries.items() if name.startswith(family)}
    for size, entry in sorted(sizes.items()):
        plain = entry["rows"].get("plain", {})
        for label, row in entry["rows"].items():
            key = "queued_s" if "queued_s" in plain else "median_s"
            if "counted" in row and key in row:
                flops = row["counted"]["overhead_flops"]
                lines.setdefault(label, []).append((size, row[key] - plain[key], flops))
    return lines


def slope(points: list[tuple[float, float]]) -> float:
    """Of log y against log x, by least squares; nan where that says nothing."""
    if len(points) < 2 or min(y for _, y in points) <= 0:
        return math.nan
    x, y = np.log(np.array(points)).T
    return float(np.polyfit(x, y, 1)[0])


def draw_ratios(axes: Any, entries: dict[str, Any]) -> None:
    names = [name for name in AUTOENCODERS if name in entries]
    labels: list[str] = []
    for name in names:
        labels += [label for label in entries[name]["rows"] if label not in [*labels, "plain"]]
    for number, name in enumerate(names):
        rows = entries[name]["rows"]
        values = [ratio(rows.get(label, {})) for label in labels]
        places = [i + 0.8 * (number + 0.5) / len(names) - 0.4 for i in range(len(labels))]
        axes.barh(places, [v or 0 for v in values], 0.8 / len(names), label=name)
        for place, value in zip(places, values, strict=True):
            if value:
                axes.text(value, place, f" {value:.2f}", va="center", fontsize=6)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("step, as a multiple of value_and_grad")
    if names:
        axes.legend()


def draw_growth(axes: Any, entries: dict[str, Any], family: str) -> None:
    for color, (label, line) in zip(COLORS, growth(entries, family).items(), strict=False):
        sizes, seconds, flops = zip(*line, strict=True)
        measured = slope(list(zip(sizes, seconds, strict=True)))
        counted = slope(list(zip(sizes, flops, strict=True)))
        text = f"{label}: slope {measured:.2f}, by formula {counted:.2f}"
        print(f"{family}: {text}")
        axes.plot(sizes, [1e3 * s for s in seconds], "o-", color=color, label=text)
        scale = 1e3 * seconds[-1] / flops[-1]
        axes.plot(sizes, [scale * f for f in flops], "--", color=color, alpha=0.6)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(family)
    axes.set_ylabel("overhead of a step, ms")
    axes.grid(alpha=0.3, which="both")
    if axes.lines:
        axes.legend(fontsize=7)


def main():
    path = Path(sys.argv[1]) if sys.argv[1:] else device.results()
    entries = json.loads(path.read_text()).get("steps", {})
    figure = Figure(figsize=(15, 5), layout="constrained")
    FigureCanvasAgg(figure)
    bars, widths, batches = figure.subplots(1, 3)
    draw_ratios(bars, entries)
    draw_growth(widths, entries, "width")
    draw_growth(batches, entries, "batch")
    first = next(iter(entries.values()))
    figure.suptitle(f"{first['device']}, JAX {first['jax']}")
    figure.savefig(path.with_suffix(".png"), dpi=120)
    print(path.with_suffix(".png"))


if __name__ == "__main__":
    main()
