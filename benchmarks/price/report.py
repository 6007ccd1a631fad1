"""The results in tables of Markdown.

python -m benchmarks.price.report [FILE.json]
"""

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.price import device

STEPS = {
    "ratio": ("ratio", "{:.2f}", 1),
    "slowest_ratio": ("slowest", "{:.2f}", 1),
    "queued_ratio": ("queued", "{:.2f}", 1),
    "median_s": ("step, ms", "{:.2f}", 1e3),
    "first_s": ("first, ms", "{:.0f}", 1e3),
    "compile": ("compile, s", "{:.1f}", 1),
    "state_bytes": ("state, MB", "{:.1f}", 1e-6),
    "peak_bytes": ("peak, MB", "{:.0f}", 1e-6),
    "flops": ("GFLOP", "{:.1f}", 1e-9),
}
STAGES = {
    "alone_s": ("stage, ms", "{:.2f}", 1e3),
    "share": ("share", "{:.0%}", 1),
    "queued_alone_s": ("queued, ms", "{:.2f}", 1e3),
    "queued_share": ("share", "{:.0%}", 1),
    "floor_s": ("floor, ms", "{:.2f}", 1e3),
    "counted_flops": ("GFLOP by formula", "{:.2f}", 1e-9),
    "counted_bytes": ("MB by formula", "{:.0f}", 1e-6),
    "flops": ("GFLOP so far, compiler", "{:.2f}", 1e-9),
}


def table(kind: str, name: str, entry: dict[str, Any]) -> str:
    """One entry of the results."""
    columns = STEPS if kind == "steps" else STAGES
    rows = {label: _flat(row) for label, row in entry["rows"].items()}
    columns = {key: of for key, of in columns.items() if any(key in row for row in rows.values())}
    lines = [f"\n{name}, batch {entry['examples']}, {entry['device']}, JAX {entry['jax']}\n"]
    lines.append("| | " + " | ".join(head for head, _, _ in columns.values()) + " |")
    lines.append("|---" * (len(columns) + 1) + "|")
    for label, row in rows.items():
        cells = [
            form.format(row[key] * scale) if row.get(key) is not None else ""
            for key, (_, form, scale) in columns.items()
        ]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    lines += [f"\n{label}: {row['skipped']}" for label, row in rows.items() if "skipped" in row]
    return "\n".join(lines)


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    flat = dict(row)
    if "compile_s" in row:
        flat["compile"] = row["lower_s"] + row["compile_s"]
    for key, value in row.get("counted", {}).items():
        flat[f"counted_{key}"] = value
    return flat


def main():
    content = json.loads((Path(sys.argv[1]) if sys.argv[1:] else device.results()).read_text())
    for kind in ("steps", "stages"):
        for name, entry in content.get(kind, {}).items():
            print(table(kind, name, entry))
    for module, words in content.get("peers", {}).items():
        print(f"\n{module}: {words}")


if __name__ == "__main__":
    main()
