"""The share of each stage: programs that grow by one stage, all timed in turns.

    gradient     the plain step
    direction    a step with ``curvature_fn=None``: momentum, the products with the factors, the
                 limit on the length, the new parameters
    statistics   and the curvature at the parameters
    probe        and a second pass at the point proposed
    factors      the whole step: A averaged, pairs damped, factors updated

What a stage costs is the difference to the one before; each returns all that it computes, so that
nothing is dropped. Where A is not stored, its product with a vector belongs to ``factors``.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax

from benchmarks.price import candidates, count
from benchmarks.price.candidates import Candidate
from benchmarks.price.problems import Problem


def steps(problem: Problem, candidate: Candidate, tx: Any) -> dict[str, Callable]:
    """By stage: ``(carry, batch) -> (carry, result)`` of the step up to that stage."""
    kept = dataclasses.replace(candidate, examples=None)

    def up_to(stage: int) -> Callable:
        def step(carry, batch):
            params, state = carry
            loss, grads = jax.value_and_grad(problem.loss_fn)(params, *batch)
            updates, state = tx.update(grads, state, params, curvature_fn=None)
            new = optax.apply_updates(params, updates)
            measure = candidates.curvature(problem, candidate, params, batch)
            none: list[str] = []
            moments = None if candidate.moment else none
            measured = [measure(params, moments=moments)] if stage >= 2 else []
            probed = [measure(new, moments=none)] if stage >= 3 else []
            return (new, state), (loss, measured, probed)

        return step

    return {
        "gradient": candidates.plain_step(problem),
        "direction": candidates.training_step(problem, kept, tx),
        "statistics": up_to(2),
        "probe": up_to(3),
        "factors": candidates.training_step(problem, candidate, tx),
    }


def shares(
    rows: dict[str, dict[str, Any]], problem: Problem, candidate: Candidate, peaks: dict
) -> None:
    """Adds to each stage's row what it takes alone, its share of the step, its floor.

    The floor of a stage is the longer of: its FLOPs at the rate that a large product of matrices
    has here (in the precision that the stage asks for), its bytes at the rate of a large copy.
    """
    counted = {}
    if problem.widths:
        counted = count.by_formula(problem.widths, problem.examples, candidate)
    timed = [stage for stage in count.STAGES if "median_s" in rows.get(stage, {})]
    for total, alone, share in (
        ("median_s", "alone_s", "share"),
        ("queued_s", "queued_alone_s", "queued_share"),
    ):
        before = 0.0
        for stage in timed:
            if total in rows[stage]:
                rows[stage][alone] = rows[stage][total] - before
                rows[stage][share] = rows[stage][alone] / rows[timed[-1]][total]
                before = rows[stage][total]
    for stage in timed:
        if stage in counted:
            # passes run in the user's precision, our own products in the highest
            ours = stage in ("direction", "statistics")
            rate = peaks["highest_flops_per_s" if ours else "flops_per_s"]
            rows[stage]["counted"] = counted[stage]
            rows[stage]["floor_s"] = max(
                counted[stage]["flops"] / rate, counted[stage]["bytes"] / peaks["bytes_per_s"]
            )
