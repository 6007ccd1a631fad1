"""Compiling steps, and timing them in turns.

Every step is compiled ahead of time, donates what it carries, and is run once a round, so that
whatever else the machine does hits all alike. Where steps are short (as on a GPU), each round also
sends off a queue of them and waits once, which is what a training loop does: the time a step then
takes is without the wait for the device.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

import jax
import jax.numpy as jnp

WARM_UP = 2  # rounds left out: the first step may also make the factors
QUEUE = 10
SHORT = 0.02  # seconds; below it a queue is timed too


@dataclasses.dataclass
class Program:
    """A step and what it carries from one call to the next.

    Attributes:
        name: of the candidate or stage.
        starting: the compiled ``params -> state``; None where the carry is the parameters alone.
        stepping: the compiled step, ``(carry, batch) -> (carry, result)``.
        facts: what compiling told.
        batch: what the step takes.
        carry: None before `begin`.
        steps_s: seconds of single steps, each waited for.
        queued_s: seconds a step in queues of `QUEUE`.
        every: the factors change in every so many steps, beginning with the first.
        full: of each step in ``steps_s``, whether they did.
        count: steps taken.
    """

    name: str
    starting: Any
    stepping: Any
    facts: dict[str, Any]
    batch: Any
    carry: Any = None
    result: Any = None
    steps_s: list[float] = dataclasses.field(default_factory=list)
    queued_s: list[float] = dataclasses.field(default_factory=list)
    every: int = 1
    full: list[bool] = dataclasses.field(default_factory=list)
    count: int = 0

    def begin(self, params: Any) -> None:
        """Makes the first carry, with parameters of its own, since they are donated."""
        carry = params if self.starting is None else (params, self.starting(params))
        self.carry = jax.block_until_ready(jax.tree.map(jnp.copy, carry))

    def run(self, steps: int = 1) -> float:
        """Seconds for some steps with one wait at the end."""
        begin = time.perf_counter()
        for _ in range(steps):
            carry, self.result = self.stepping(self.carry, self.batch)
            self.carry = self.carry if carry is None else carry
        jax.block_until_ready((self.carry, self.result))
        self.count += steps
        return time.perf_counter() - begin

    def typical_s(self) -> float:
        """Seconds a step: the median; where steps differ, the mean of two medians, weighed."""
        sorts = {full: [] for full in self.full}
        for seconds, full in zip(self.steps_s, self.full, strict=True):
            sorts[full].append(seconds)
        if len(sorts) == 1:
            return statistics.median(self.steps_s)
        full, kept = statistics.median(sorts[True]), statistics.median(sorts[False])
        return (full + (self.every - 1) * kept) / self.every


def compile_step(
    pool: Executor,
    name: str,
    step: Callable,
    params: Any,
    batch: Any,
    init: Callable | None,
    every: int = 1,
) -> Callable[[], Program]:
    """Traces a step here, compiles it in the pool; the result waits for the program.

    Args:
        pool: of threads that compile.
        name: of the program.
        step: ``(carry, batch) -> (carry, result)``.
        params: shapes of the parameters.
        batch: the second argument of ``step``.
        init: ``params -> state``, and the carry is parameters and state; None for a step whose
            carry is the parameters, which it leaves alone.
        every: see `Program`.
    """
    state = jax.eval_shape(init, params) if init else None
    carry = (params, state) if init else params
    begin = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=0 if init else ()).lower(carry, batch)
    lower_s = time.perf_counter() - begin
    starting = pool.submit(_compiled, jax.jit(init).lower(params)) if init else None
    stepping = pool.submit(_compiled, lowered)

    def wait() -> Program:
        program, compile_s = stepping.result()
        facts = {
            "lower_s": lower_s,
            "compile_s": compile_s,
            "state_bytes": _bytes(state),
            **_analysis(program),
        }
        begin = starting and starting.result()[0]
        return Program(name, begin, program, facts, batch, every=every)

    return wait


def _compiled(lowered: Any) -> tuple[Any, float]:
    begin = time.perf_counter()
    program = lowered.compile()
    return program, time.perf_counter() - begin


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _analysis(program: Any) -> dict[str, Any]:
    """FLOPs, bytes touched and peak memory, as the compiler tells them."""
    facts = {}
    cost = program.cost_analysis()
    if cost:
        facts["flops"] = cost.get("flops")
        facts["bytes_accessed"] = cost.get("bytes accessed")
    memory = program.memory_analysis()
    if memory is not None:
        facts["temp_bytes"] = memory.temp_size_in_bytes
        facts["peak_bytes"] = (
            memory.temp_size_in_bytes
            + memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
        )
    return facts


def take_turns(
    programs: list[Program],
    rounds: int,
    seconds: float,
    after_round: Callable[[], None],
) -> dict[str, str]:
    """Times the programs; the first is what the others are compared with.

    Args:
        programs: begun; what does not run or does not fit the time is dropped from the list.
        rounds: timed rounds.
        seconds: what the timed rounds may take; the slowest programs are dropped until they do.
        after_round: called after each round.

    Returns:
        By the name of each program dropped: why.
    """
    dropped = {}
    for program in list(programs):
        try:
            program.facts["first_s"] = program.run()
            program.facts["warm_s"] = min(program.run() for _ in range(WARM_UP - 1))
        except Exception as error:  # out of memory, most likely
            dropped[program.name] = f"{type(error).__name__}: {str(error)[:300]}"
            if program is programs[0]:
                return {other.name: "the plain step does not run" for other in programs} | dropped
            _drop(programs, program)
    queue = QUEUE if programs[0].facts["warm_s"] < SHORT else 0

    def needed() -> float:
        return rounds * (1 + queue) * sum(program.facts["warm_s"] for program in programs)

    while len(programs) > 1 and needed() > seconds:
        slowest = max(programs[1:], key=lambda program: program.facts["warm_s"])
        took = slowest.facts["warm_s"]
        dropped[slowest.name] = f"a step takes {took:.3g} s; with it {rounds} rounds would take "
        dropped[slowest.name] += f"{needed():.0f} s of the {seconds:.0f} s allowed"
        _drop(programs, slowest)
    for _ in range(rounds):
        for program in programs:
            program.full.append(program.count % program.every == 0)
            program.steps_s.append(program.run())
            if queue:
                program.queued_s.append(program.run(queue) / queue)
        after_round()
    return dropped


def _drop(programs: list[Program], program: Program) -> None:
    programs.remove(program)
    program.carry = program.result = None


def row(program: Program, plain: Program) -> dict[str, Any]:
    """What is written of a program: facts of compiling, and times as multiples of plain ones."""
    facts = dict(program.facts)
    if program.steps_s:
        median = statistics.median(plain.steps_s)
        facts["steps_s"] = [round(s, 6) for s in program.steps_s]
        facts["median_s"] = program.typical_s()
        facts["ratio"] = facts["median_s"] / median
        facts["slowest_ratio"] = max(program.steps_s) / median
    if program.queued_s:
        facts["queued_s"] = statistics.median(program.queued_s)
        facts["queued_ratio"] = facts["queued_s"] / statistics.median(plain.queued_s)
    return facts
