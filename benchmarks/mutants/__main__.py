"""Makes each mistake in a copy of the project and runs the tests that should find it.

    python -m benchmarks.mutants [--only TEXT] [--again] [--seconds N]

A mutant that was tried before, by the same tests, is not tried again unless ``--again`` says so or
it is an open question (it survived and has no reason, or the other way round), so a run that was
broken off goes on. Results go to ``benchmarks/results/mutants.json``. The status is
1 if a mutant without a reason survives, or one with a reason is found, and 2 if the text of a
mutant does not occur exactly once in its file, or the tests fail without any mutant.
"""

import argparse
import collections
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.mutants.block import BLOCK
from benchmarks.mutants.factors import FACTORS
from benchmarks.mutants.mutant import Mutant
from benchmarks.mutants.steps import STEPS

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "mutants.json"
MUTANTS = (*FACTORS, *STEPS, *BLOCK)
COPIED = ("kfqn_optax", "tests", "benchmarks", "docs", "configs", "pyproject.toml", "README.md")
CAUGHT, SURVIVED, TIME_IS_UP = "caught", "survived", "caught: takes too long"


def misfits(mutants: tuple[Mutant, ...]) -> list[str]:
    """A line for each mutant whose text does not occur exactly once, or that is there twice."""
    wrong = []
    for mutant in mutants:
        count = (ROOT / mutant.path).read_text().count(mutant.old)
        if count != 1:
            wrong.append(f"{mutant.path}: {count} times instead of once: {mutant.old!r}")
        if mutant.old == mutant.new:
            wrong.append(f"{mutant.path}: nothing is changed: {mutant.old!r}")
    keys = collections.Counter(mutant.key for mutant in mutants)
    return wrong + [f"{m.path}: twice: {m.old!r}" for m in mutants if keys[m.key] > 1]


def copied(folder: Path) -> Path:
    """A copy of the project in the folder, with the recordings of the authors' code beside it."""
    copy = folder / "project"
    copy.mkdir()
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / name)
    recordings = ROOT.parent / "shared"
    if recordings.exists():
        (folder / "shared").symlink_to(recordings)
    return copy


def run_tests(copy: Path, tests: tuple[str, ...], seconds: float) -> tuple[str, str]:
    """Whether a test fails, and which.

    Raises:
        RuntimeError: if pytest found no tests, or did not work.
    """
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    env = os.environ | {
        "PYTHONPATH": str(copy),
        "PYTHONDONTWRITEBYTECODE": "1",
        "JAX_COMPILATION_CACHE_DIR": str(copy.parent / "compiled"),
    }
    try:
        done = subprocess.run(
            command, cwd=copy, env=env, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return TIME_IS_UP, ""
    if done.returncode == 0:
        return SURVIVED, ""
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    if done.returncode == 1 and failed:
        return CAUGHT, failed[1]
    raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-3000:]}")


def tried(mutant: Mutant, copy: Path, seconds: float) -> dict:
    """What becomes of one mutant, as it is kept in the results."""
    path, begun = copy / mutant.path, time.monotonic()
    sound = path.read_text()
    path.write_text(sound.replace(mutant.old, mutant.new))
    try:
        verdict, by = run_tests(copy, mutant.tests, seconds)
    finally:
        path.write_text(sound)
    return {
        "file": mutant.path,
        "old": mutant.old,
        "new": mutant.new,
        "verdict": verdict,
        "by": by,
        "reason": mutant.reason,
        "seconds": round(time.monotonic() - begun),
    }


def is_open(result: dict) -> bool:
    """Whether a mutant survived without a reason, or was caught in spite of one."""
    return (result["verdict"] == SURVIVED) != bool(result["reason"])


def table(results: dict[str, dict]) -> str:
    """Counts by file, and the survivors, in Markdown; it is in ``docs/reliability.md``."""
    lines = ["| file | tried | caught | survive |", "|---|---|---|---|"]
    for file in [*dict.fromkeys(r["file"] for r in results.values()), "all"]:
        of_file = [r for r in results.values() if file in (r["file"], "all")]
        alive = sum(r["verdict"] == SURVIVED for r in of_file)
        name = f"`{Path(file).name}`" if file != "all" else file
        lines.append(f"| {name} | {len(of_file)} | {len(of_file) - alive} | {alive} |")
    lines += ["", "| survives in | | becomes | why no test finds it |", "|---|---|---|---|"]
    for r in results.values():
        if r["verdict"] == SURVIVED:
            texts = (Path(r["file"]).name, r["old"], r["new"])
            cells = (f"`{text}`".replace("|", "\\|").replace("\n", " ") for text in texts)
            lines.append(f"| {' | '.join(cells)} | {r['reason'] or '**no reason given**'} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="text in the file's name or the mutated text")
    parser.add_argument("--again", action="store_true", help="also those that were tried before")
    parser.add_argument("--seconds", type=float, default=600, help="the most for one mutant")
    options = parser.parse_args()
    wrong = misfits(MUTANTS)
    if wrong:
        print("\n".join(wrong), file=sys.stderr)
        return 2
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results = {m.key: known[m.key] | {"reason": m.reason} for m in MUTANTS if m.key in known}
    wanted = [m for m in MUTANTS if options.only in m.path or options.only in m.old]
    wanted = [m for m in wanted if options.again or m.key not in results or is_open(results[m.key])]
    with tempfile.TemporaryDirectory() as folder:
        copy = copied(Path(folder))
        for tests in dict.fromkeys(m.tests for m in wanted):  # sound code must pass; -x stops early
            verdict, by = run_tests(copy, tests, 10 * options.seconds)
            if verdict != SURVIVED:
                print(f"without any mutant: {' '.join(tests)}: {verdict} {by}", file=sys.stderr)
                return 2
        for mutant in wanted:
            result = results[mutant.key] = tried(mutant, copy, options.seconds)
            print(
                f"{result['verdict']:10} {mutant.path}: {mutant.old!r} {result['by']}", flush=True
            )
            ordered = {m.key: results[m.key] for m in MUTANTS if m.key in results}
            RESULTS.write_text(json.dumps(ordered, indent=1) + "\n")
    print(table({m.key: results[m.key] for m in MUTANTS if m.key in results}))
    surprises = [r for r in results.values() if is_open(r)]
    for r in surprises:
        print(f"{r['verdict']} unexpectedly: {r['file']}: {r['old']!r}", file=sys.stderr)
    return int(bool(surprises))


if __name__ == "__main__":
    sys.exit(main())
