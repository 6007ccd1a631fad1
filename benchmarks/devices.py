"""The table of docs/devices.md: training in several ways, compared with one device.

    python benchmarks/devices.py [ROW ...]

An autoencoder 784-250-30-250-784 on random images, batch 256, 50 steps of K-BFGS; on CPU, as eight
devices of one process and as two processes of four. The ways are those of the tests.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from devices.processes import run

SIZE = {"widths": [784, 250, 30, 250, 784], "batch": 256, "learning_rate": 0.03, "damping": 0.3}
NAMES = {
    "other_order": "one device, examples of a batch in another order",
    "jit": "`jit`, batch sharded",
    "shard_map": "`shard_map`, `over_axis`",
    "pmap": "`pmap`, `over_axis`",
    "microbatches": "`jit`, batch sharded, 2 microbatches",
    "spread": "`jit`, batch and state sharded",
}


def row(name, double, single):
    sent = "; ".join(
        f"{number} {kind} ({size / 1e6:.2f} MB)"
        for kind, (number, size) in single.get("collectives", {}).items()
    )
    state = f"{single['state_bytes'] / 1e6:.2f} MB" if "state_bytes" in single else ""
    errors = f"{double['params']:.0e} | {single['params']:.0e}"
    sent = sent or ("none" if "collectives" in single else "")
    print(f"| {name} | {errors} | {sent} | {state} |", flush=True)


def main():
    print("| | float64 | float32 | sent in a step | state on a device |\n|---|---|---|---|---|")
    chosen = sys.argv[1:] or [*NAMES, "two-jit", "two-shard_map"]
    for way, name in NAMES.items():
        if way not in chosen:
            continue
        report = run(
            {**SIZE, "ways": [way], "steps": 50, "dtypes": ["float64", "float32"]},
            seconds=3000,
            quick=False,
        )
        row(name, report["float64"][way], report["float32"][way])
    for way in ("jit", "shard_map"):
        if f"two-{way}" not in chosen:
            continue
        report, _ = run(
            {**SIZE, "ways": [way], "steps": 50, "dtypes": ["float64", "float32"]},
            devices=4,
            processes=2,
            seconds=3000,
            quick=False,
        )
        row(f"two processes, {NAMES[way]}", report["float64"][way], report["float32"][way])


if __name__ == "__main__":
    main()
