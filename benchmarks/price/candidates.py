"""Optimizers and options by name, and how each makes one step."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

import kfqn_optax as kfqn
from benchmarks.price.problems import Problem

PLAIN = "plain"  # value_and_grad alone; no candidate, but what all are compared with
RATE, DAMPING = 0.3, 0.3
LIGHT = {"input_rank": 64, "pairs": 4, "window": 8}  # the light recipe of block K-BFGS


@dataclasses.dataclass(frozen=True)
class Candidate:
    """An optimizer with its options.

    Attributes:
        make: the transformation for a problem.
        examples: the share of the batch that curvature is measured on; None for a step without.
        ours: whether ``update`` takes a ``curvature_fn``.
        moment: whether the input second moment A is stored.
        input_memory: pairs on the input side; None for a matrix.
        output_memory: the same on the output side.
        every: curvature is measured in every so many steps.
        asked: the arguments of `kfqn.value_and_grad`, where loss and gradient are taken from the
            curvature's own pass (those of further examples are added); None where they are apart.
        extra: further extra arguments of ``update``, from the loss and the batch.
    """

    make: Callable[[Problem], optax.GradientTransformation]
    examples: float | None = None
    ours: bool = False
    moment: bool = True
    input_memory: int | None = None
    output_memory: int | None = None
    every: int = 1
    asked: Mapping[str, Any] | None = None
    extra: Callable[..., dict[str, Any]] | None = None


def _ours(method, examples: float | None = 1.0, moment=True, output=None, **options) -> Candidate:
    def make(problem):
        return method(
            RATE,
            DAMPING,
            weight_decay=1e-5,
            norm_constraint=3.0,
            fallback=optax.adam(1e-3),
            layers=problem.layers(),
            **options,
        )

    sides = {name: options.get(name) for name in ("input_memory", "output_memory")}
    sides["output_memory"] = sides["output_memory"] or output
    every = options.get("update_every", 1)
    return Candidate(make, examples, ours=True, moment=moment, every=every, **sides)


def _block(every, **options) -> Candidate:
    def make(problem):
        given = {"layers": problem.layers(), "update_every": every} | options
        return kfqn.block_kbfgs(weight_decay=1e-5, **given)

    return Candidate(make, 0.1, ours=True, every=every)


def _peer(make, extra=None) -> Candidate:
    return Candidate(lambda _: make(), extra=extra)


# What the README's table shows.
MAIN = {
    "adam": _peer(lambda: optax.adam(1e-3)),
    "sgd with momentum": _peer(lambda: optax.sgd(1e-3, momentum=0.9)),
    "muon": _peer(lambda: optax.contrib.muon(1e-3)),
    "kbfgs": _ours(kfqn.kbfgs),
    "kbfgs, a tenth": _ours(kfqn.kbfgs, 0.1),
    "kbfgs_l": _ours(kfqn.kbfgs_l, output=100),
    "kfqn": _ours(kfqn.kfqn, moment=False),
    "kfqn, a tenth": _ours(kfqn.kfqn, 0.1, moment=False),
    "fast": _ours(kfqn.kfqn, 0.1, moment=False, output_memory=20),
    "fast, every 2nd step": _ours(kfqn.kfqn, 0.1, moment=False, output_memory=20, update_every=2),
    "block": _block(1),
    "block, every 4th step": _block(4),
    "light": _block(1, **LIGHT),
    "light, every 8th step": _block(8, **LIGHT),
    "kbfgs, factors kept": _ours(kfqn.kbfgs, None),
}
MORE = {
    **{
        f"{name}, one pass": dataclasses.replace(MAIN[name], asked=asked)
        for name, asked in {
            "kbfgs": {},
            "fast": {},
            "block": {"sketches": 8},
            "block, every 4th step": {"sketches": 8},
        }.items()
    },
    "kfqn, 20 pairs out": _ours(kfqn.kfqn, moment=False, output_memory=20),
    "kbfgs_l, a tenth": _ours(kfqn.kbfgs_l, 0.1, output=100),
    "kfqn, 20 pairs each": _ours(kfqn.kfqn, moment=False, input_memory=20, output_memory=20),
    "kfqn, 20 pairs each, a tenth": _ours(
        kfqn.kfqn, 0.1, moment=False, input_memory=20, output_memory=20
    ),
    "sophia": _peer(
        lambda: optax.contrib.sophia(1e-3),
        extra=lambda loss_fn, batch: {"obj_fn": lambda params: loss_fn(params, *batch)},
    ),
    "lbfgs, no line search": _peer(lambda: optax.lbfgs(1e-3, linesearch=None)),
}
ALL = MAIN | MORE


def choose(names: list[str]) -> dict[str, Candidate]:
    """Candidates by name; ``main`` and ``all`` are names of groups."""
    chosen = {}
    for name in names:
        group = {"main": MAIN, "all": ALL}.get(name)
        if group is None and name not in ALL:
            raise ValueError(f"there is no candidate {name!r}; there are main, all, {list(ALL)}.")
        chosen |= group or {name: ALL[name]}
    return chosen


def plain_step(problem: Problem) -> Callable:
    """``(params, batch) -> (None, (loss, grads))``; None: nothing is carried to the next step."""

    def step(params, batch):
        return None, jax.value_and_grad(problem.loss_fn)(params, *batch)

    return step


def split(problem: Problem, candidate: Candidate, batch: Any) -> tuple[Any, Any]:
    """The examples that curvature is measured on, and the others; None where there are none."""
    measured = max(1, round(problem.examples * (candidate.examples or 1)))
    if measured == problem.examples:
        return batch, None
    return jax.tree.map(lambda x: x[:measured], batch), jax.tree.map(lambda x: x[measured:], batch)


def curvature(problem: Problem, candidate: Candidate, params: Any, batch: Any) -> Any:
    """The ``curvature_fn`` that a candidate hands to its update; None for a step without."""
    if candidate.examples is None:
        return None
    part, _ = split(problem, candidate, batch)
    return kfqn.curvature_fn(problem.loss_fn, params, *part)


def one_pass(problem: Problem, candidate: Candidate, params: Any, batch: Any) -> Any:
    """Loss, gradient and ``curvature_fn`` of a step in which no example is seen twice."""
    fn = curvature(problem, candidate, params, batch)
    *found, fn = kfqn.value_and_grad(fn, params, **(candidate.asked or {}))
    _, others = split(problem, candidate, batch)
    if others is not None:
        share = candidate.examples
        more = jax.value_and_grad(problem.loss_fn)(params, *others)
        found = jax.tree.map(lambda a, b: share * a + (1 - share) * b, tuple(found), more)
    return *found, fn


def training_step(problem: Problem, candidate: Candidate, tx: Any) -> Callable:
    """``((params, state), batch) -> ((params, state), loss)``."""

    def step(carry, batch):
        params, state = carry
        extra = candidate.extra(problem.loss_fn, batch) if candidate.extra else {}
        if candidate.asked is not None:
            loss, grads, extra["curvature_fn"] = one_pass(problem, candidate, params, batch)
        else:
            loss, grads = jax.value_and_grad(problem.loss_fn)(params, *batch)
            if candidate.ours:
                extra["curvature_fn"] = curvature(problem, candidate, params, batch)
        updates, state = tx.update(grads, state, params, **extra)
        return (optax.apply_updates(params, updates), state), loss

    return step
