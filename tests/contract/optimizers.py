"""The optimizers that the checks are run for: our methods, their kin, and peers of Optax."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax

import kfqn_optax as kfqn


@dataclasses.dataclass(frozen=True, eq=False)
class Optimizer:
    """An optimizer, and what its update wants to be given.

    Attributes:
        name: in the table.
        factory: as ``optax.inject_hyperparams`` takes it; it has an argument ``learning_rate``.
        numbers: its arguments.
        extra: from the arguments of the gradient to the extra arguments of the update.
        static: arguments that are no hyperparameters.
    """

    name: str
    factory: Callable[..., optax.GradientTransformation]
    numbers: dict[str, Any]
    extra: Callable[..., dict[str, Any]] = lambda loss_fn, params, *batch: {}
    static: tuple[str, ...] = ()

    def make(self, **numbers: Any) -> Any:
        return self.factory(**self.numbers, **numbers)


def _curvature(loss_fn, params, *batch):
    return {"curvature_fn": kfqn.curvature_fn(loss_fn, params, *batch)}


def line_search_arguments(loss_fn, params, *batch):
    value, grad = jax.value_and_grad(loss_fn)(params, *batch)
    return {"value": value, "grad": grad, "value_fn": lambda p: loss_fn(p, *batch)}


_NUMBERS = {"learning_rate": 0.1, "damping": 0.1}
OURS = {
    "kbfgs": Optimizer("kbfgs", kfqn.kbfgs, _NUMBERS, _curvature),
    "kbfgs_l": Optimizer(
        "kbfgs_l",
        kfqn.kbfgs_l,
        {**_NUMBERS, "memory_size": 3},
        _curvature,
        ("memory_size",),
    ),
    "kfqn": Optimizer("kfqn", kfqn.kfqn, _NUMBERS, _curvature),
}
KIN = {
    "kfac": Optimizer("kfac", kfqn.kfac, _NUMBERS, _curvature),
    "tkfac": Optimizer("tkfac", kfqn.tkfac, _NUMBERS, _curvature),
    "mbf": Optimizer("mbf", kfqn.mbf, _NUMBERS),
}
PEERS = {
    "adam": Optimizer("adam", optax.adam, {"learning_rate": 0.1}),
    "lbfgs": Optimizer(
        "lbfgs",
        optax.lbfgs,
        {"learning_rate": 1.0, "memory_size": 3},
        line_search_arguments,
        ("memory_size", "scale_init_precond"),
    ),
    "muon": Optimizer(
        "muon", optax.contrib.muon, {"learning_rate": 0.01}, static=("ns_steps", "ns_coeffs")
    ),
    "sophia": Optimizer(
        "sophia",
        optax.contrib.sophia,
        {"learning_rate": 0.01, "weight_decay": 0.0},
        lambda loss_fn, params, *batch: {"obj_fn": lambda p: loss_fn(p, *batch)},
    ),
}
