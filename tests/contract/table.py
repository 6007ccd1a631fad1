"""The table: its rows, and what is written into a cell."""

from collections.abc import Callable

from contract import calls, common, devices, wrappers
from contract.optimizers import Optimizer

CHECKS = {
    "`chain`": wrappers.chain,
    "`masked`": wrappers.masked,
    "`partition`": wrappers.partition,
    "`MultiSteps`": wrappers.multi_steps,
    "`apply_if_finite`": wrappers.apply_if_finite,
    "`inject_hyperparams`": wrappers.inject_hyperparams,
    "`tree.map_params`": wrappers.map_params,
    "schedules": wrappers.schedules,
    "`lax.scan` over steps": calls.scan,
    "`jit` with donation": calls.donation,
    "no second compilation": calls.one_program,
    "`lax.cond` in f16, bf16, f32, f64": calls.cond,
    "`init` on `ShapeDtypeStruct`": calls.shapes,
    "unknown extra arguments": calls.unknown_arguments,
    "zero gradients": calls.zero_gradients,
    "8 devices, `Auto` mesh": devices.auto_mode,
    "8 devices, `Explicit` mesh": devices.explicit_mode,
    "Optax's tests for `optax.contrib`": common.common_test,
    "`MultiSteps` inside `chain`": wrappers.multi_steps_in_chain,
    "`flatten`": wrappers.flatten,
    "inside `contrib.sam`": wrappers.inside_sam,
    "before a line search": wrappers.line_search,
}
ON_DEVICES = ["auto_mode", "explicit_mode"]


def outcome(check: Callable[[Optimizer], None], optimizer: Optimizer) -> str:
    """``ok``, ``fails: ...`` if a result is wrong, ``refused: ...`` if there is an error."""
    try:
        check(optimizer)
    except AssertionError as error:
        return f"fails: {_first(error)}"
    except Exception as error:
        return f"refused: {type(error).__name__}: {_first(error)}"
    return "ok"


def _first(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
