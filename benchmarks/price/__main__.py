"""The command; see benchmarks/README.md for what it measures and how to read it."""

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from benchmarks.price import candidates, count, device, measure, peers, problems, report, stages


class Results:
    """The JSON file: what is in it stays, entries measured again are replaced."""

    def __init__(self, path: Path):
        self.path = path
        self.content = json.loads(path.read_text()) if path.exists() else {}

    def entry(self, kind: str, name: str, facts: dict[str, Any]) -> dict[str, Any]:
        """A fresh entry, ``steps`` or ``stages``, with nothing measured yet."""
        fresh = {**facts, "rows": {}}
        self.content.setdefault(kind, {})[name] = fresh
        return fresh["rows"]

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.content, indent=1) + "\n")
        partial.replace(self.path)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--sizes", nargs="+", default=["mnist"], help=f"problems: {problems.__doc__}")
    add(
        "--candidates", nargs="*", default=["main"], help=f"main, all, or of {list(candidates.ALL)}"
    )
    add("--stages", nargs="*", default=[], help="candidates of ours whose stages are timed too")
    add("--rounds", type=int, default=20, help="timed steps of each program")
    add("--seconds", type=float, default=120.0, help="most that the timed rounds of a size take")
    add("--threads", type=int, help="programs compiled at once; 1 on a CPU, else 8")
    add("--precision", help="of products of float32 matrices, e.g. highest; the device's own")
    add("--output", type=Path, help="JSON file; what it holds already stays in it")
    add("--peers", action="store_true", help="try the peers' packages, write what became of each")
    return parser.parse_args()


def jobs(options: argparse.Namespace, found: dict[str, Any], pool: ThreadPoolExecutor):
    """Everything to be timed, compiling: (kind, entry's name, problem, candidate, programs)."""
    chosen = candidates.choose(options.candidates) | (found if options.candidates else {})
    for name in options.sizes:
        problem = problems.make(name)
        shapes = problem.shapes()

        def submit(label, step, tx=None, every=1, problem=problem, shapes=shapes):
            init = tx.init if tx else None
            return measure.compile_step(pool, label, step, shapes, problem.batch, init, every)

        if chosen:
            plain = candidates.plain_step(problem)
            waiting = {candidates.PLAIN: submit(candidates.PLAIN, plain)}
            for label, candidate in chosen.items():
                try:
                    tx = candidate.make(problem)
                    step = candidates.training_step(problem, candidate, tx)
                    waiting[label] = submit(label, step, tx, candidate.every)
                except Exception as error:  # a peer that wants other arguments, for one
                    waiting[label] = f"{type(error).__name__}: {str(error)[:300]}"
            yield "steps", name, problem, chosen, waiting
        for label in options.stages:
            candidate = candidates.ALL[label]
            tx = candidate.make(problem)
            waiting = {
                stage: submit(stage, step, tx if stage != count.STAGES[0] else None)
                for stage, step in stages.steps(problem, candidate, tx).items()
            }
            yield "stages", f"{name}: {label}", problem, {label: candidate}, waiting


def collect(waiting: dict[str, Any], rows: dict[str, Any], results: Results) -> list:
    """The programs, as they come out of the compiler; errors go to the rows."""
    programs = []
    for label, wait in waiting.items():
        try:
            if isinstance(wait, str):
                raise RuntimeError(wait)
            programs.append(wait())
            rows[label] = dict(programs[-1].facts)
        except Exception as error:
            rows[label] = {"skipped": str(error)[:300]}
        results.write()
    return programs


def time_all(job: Any, programs: list, rows: dict, options: Any, results: Results, peaks: dict):
    """Times one job's programs and writes after every round."""
    kind, _, problem, chosen, waiting = job
    params = problem.params()
    begun = []
    for program in programs:
        try:
            program.begin(params)
            begun.append(program)
        except Exception as error:
            rows[program.name] |= {"skipped": f"{type(error).__name__}: {str(error)[:300]}"}
    first = next(iter(waiting))
    if not begun or begun[0].name != first:
        rows[first].setdefault("skipped", "it does not run, so there is nothing to compare with")
        results.write()
        return
    plain = begun[0]

    def after_round() -> None:
        for program in begun:
            rows[program.name] = measure.row(program, plain)
        results.write()

    for name, why in measure.take_turns(
        begun, options.rounds, options.seconds, after_round
    ).items():
        rows[name] |= {"skipped": why}
    if kind == "stages":
        stages.shares(rows, problem, *chosen.values(), peaks)
    elif problem.widths:
        for name, candidate in chosen.items():
            if candidate.ours:
                rows[name]["counted"] = count.overhead(problem.widths, problem.examples, candidate)
    results.write()
    for program in programs:
        program.carry = program.result = None


def main():
    options = parse()
    if options.precision:
        jax.config.update("jax_default_matmul_precision", options.precision)
    output = options.output or device.results()
    results = Results(output)
    found, words = peers.load() if options.peers else ({}, {})
    if words:
        results.content["peers"] = words
    peaks = device.peaks()
    threads = options.threads or (1 if jax.devices()[0].platform == "cpu" else 8)
    facts = device.facts() | {"peaks": peaks, "compiled_at_once": threads}
    with ThreadPoolExecutor(threads) as pool:
        todo = []
        for job in jobs(options, found, pool):
            rows = results.entry(job[0], job[1], facts | {"examples": job[2].examples})
            todo.append((job, rows))
        # Nothing is timed before everything is compiled.
        ready = [(job, collect(job[-1], rows, results), rows) for job, rows in todo]
    for job, programs, rows in ready:
        time_all(job, programs, rows, options, results, peaks)
        print(report.table(job[0], job[1], results.content[job[0]][job[1]]), flush=True)
    print(output)


if __name__ == "__main__":
    main()
