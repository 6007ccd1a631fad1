"""The numbers of the method, each with its symbol in the paper, checked once.

Every number may be a Python float, an array, or a tracer (``optax.inject_hyperparams`` makes
tracers of them); ``learning_rate`` and ``damping`` may also be Optax schedules. What is known when
the transformation is built is checked then. Values seen only inside a traced program cannot raise;
an unusable one (a schedule that returns a negative damping, say) leaves the factors as they were
in that step, whose pairs count as not finite.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

Number = float | int | np.ndarray | jax.Array
ScalarOrSchedule = Number | Callable[[jax.Array], Number]
SPLITS = ("sqrt", "sqrt_t")
MAX_FACTOR_DIM = 8192
LARGE_MEMORY = 100  # pairs kept for a side longer than max_factor_dim


@dataclasses.dataclass(frozen=True)
class Options:
    """The numbers of K-BFGS (Goldfarb, Ren, Bahamou 2020, Algorithm 2 and its appendix).

    Attributes:
        learning_rate: alpha, at least 0; a number or a schedule. It scales the step at whose end
            the curvature is measured again (the probe).
        damping: lambda, above 0; a number or a schedule. Each side is damped by its square root:
            ``A + sqrt(lambda) I`` on the input side, and on the output side ``s.y`` is kept at or
            above ``sqrt(lambda) |s|^2``.
        factor_decay: decay of the running average of the input second moment A, in [0, 1).
        pair_decay: decay of the running averages of s and y, in [0, 1).
        powell: mu_1 of Powell's damping, in (0, 1): ``s.y`` is kept at or above ``mu_1 y.Hy``.
        curvature_tolerance: a pair is refused unless ``s.y > tolerance |s|^2 |v|``, v the mean
            cotangent (output side) or the mean input (input side); at least 0. From the authors'
            code, not in the paper.
        norm_constraint: the most that the squared length of the step in the metric of the factors
            may be, above 0; None for no limit. Not in the paper; see `scale_by_kbfgs`.
        update_every: k; curvature is measured, and the factors change, in steps 0, k, 2k, ... only;
            a whole number of at least 1. Not in the paper.
        input_memory: pairs kept for a limited-memory input factor; None for a dense one.
        output_memory: the same for the output factor (K-BFGS(L): p).
        max_factor_dim: a side longer than this is never dense; it keeps `LARGE_MEMORY` pairs. None
            for `MAX_FACTOR_DIM`; not a number by default, since ``optax.inject_hyperparams`` makes
            an array of every number, a traced one in a jitted ``init``.
        matrix_free: whether A is never stored, and its product with a vector comes from the
            current examples (arXiv 2102.06737).
        shift: whether the second damping of the output pair is ``y + lambda_G s``, always
            (arXiv 2102.06737), instead of only where ``s.y`` is below ``lambda_G |s|^2``.
        split: how lambda is split between the sides for a layer of T positions an example:
            ``"sqrt"``, sqrt(lambda) each; ``"sqrt_t"``, sqrt(lambda T) on the input side and
            sqrt(lambda / T) on the output side (arXiv 2102.06737, third version).
    """

    learning_rate: ScalarOrSchedule
    damping: ScalarOrSchedule = 0.3
    factor_decay: Number = 0.9
    pair_decay: Number = 0.9
    powell: Number = 0.2
    curvature_tolerance: Number = 1e-4
    norm_constraint: Number | None = None
    update_every: Number = 1
    input_memory: Number | None = None
    output_memory: Number | None = None
    max_factor_dim: Number | None = None
    matrix_free: bool = False
    shift: bool = False
    split: str = "sqrt"

    def __post_init__(self):
        check("learning_rate", self.learning_rate, lambda v: v >= 0, "at least 0", schedule=True)
        check("damping", self.damping, lambda v: v > 0, "above 0", schedule=True)
        check_decay("factor_decay", self.factor_decay)
        check_decay("pair_decay", self.pair_decay)
        check("powell", self.powell, lambda v: 0 < v < 1, "between 0 and 1, both excluded")
        check("curvature_tolerance", self.curvature_tolerance, lambda v: v >= 0, "at least 0")
        if self.norm_constraint is not None:
            check("norm_constraint", self.norm_constraint, lambda v: v > 0, "above 0, or None")
        for name, size in (
            ("update_every", self.update_every),
            ("memory_size", self.output_memory),
            ("input_memory", self.input_memory),
            ("max_factor_dim", self.max_factor_dim),
        ):
            if size is not None:
                check_size(name, size)
        if self.split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {self.split!r}.")


def check_size(name: str, value: Number, step: int = 1) -> None:
    """Raises unless ``value`` is a multiple of ``step`` above 0, as far as that can be seen."""
    words = "a whole number of at least 1" if step == 1 else f"a multiple of {step} above 0"
    check(name, value, lambda v: v >= step and v % step == 0, words)


def known_size(name: str, value: Number) -> int:
    """A size that decides the shapes of a state, as an int.

    Raises:
        TypeError: for a tracer, which ``optax.inject_hyperparams`` makes of a number in a jitted
            ``init``.
    """
    if isinstance(value, jax.core.Tracer):
        raise TypeError(
            f"{name} decides the shapes of the state and must be a plain int, got a traced value. "
            f"With optax.inject_hyperparams, name it in static_args={name!r}."
        )
    return int(value)


def known(value: Number) -> Number | None:
    """The number, or None where it is traced."""
    return None if isinstance(value, jax.core.Tracer) else float(value)


def longest_side(max_factor_dim: Number | None) -> int:
    """The longest side of a layer that may have a matrix; None stands for `MAX_FACTOR_DIM`."""
    return (
        MAX_FACTOR_DIM if max_factor_dim is None else known_size("max_factor_dim", max_factor_dim)
    )


def inverses_due(count: jax.Array, every: Number) -> jax.Array:
    """Whether all inverses are made in step ``count``: steps 0 to k, then each k-th."""
    every = jnp.asarray(every).astype(jnp.int32)
    return (count <= every) | (count % every == 0)


def check_decay(name: str, value: Number) -> None:
    """Raises unless ``value`` is a usable decay of a running average."""
    check(name, value, lambda v: 0 <= v < 1, "at least 0 and below 1")


def check(
    name: str,
    value: ScalarOrSchedule,
    allowed: Callable[[float], bool],
    range_: str,
    *,
    schedule: bool = False,
) -> None:
    """Raises unless ``value`` is one finite real number in its range, as far as that can be seen.

    Args:
        name: the argument's name, for the message.
        value: a number, an array without axes, a tracer, or (with ``schedule``) a schedule.
        allowed: whether a finite number is in range.
        range_: the range in words, for the message.
        schedule: whether a callable is welcome.

    Raises:
        TypeError: if ``value`` is not a number (or a schedule).
        ValueError: if it is out of range, not finite, or an array with axes.
    """
    if callable(value):
        if schedule:
            return
        raise TypeError(
            f"{name} must be a number, not the function {value!r}: only learning_rate "
            "and damping may follow a schedule."
        )
    if isinstance(value, (bool, str)) or value is None:
        raise TypeError(f"{name} must be a number {range_}, got {value!r}.")
    try:
        dtype, shape = jnp.result_type(value), jnp.shape(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a number {range_}, got {value!r}.") from error
    if shape != ():
        raise ValueError(f"{name} must be one number, got an array of shape {shape}.")
    if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
        raise TypeError(f"{name} must be a real number, got dtype {dtype}.")
    if isinstance(value, jax.core.Tracer):
        return
    number = float(value)
    if not (np.isfinite(number) and allowed(number)):
        raise ValueError(f"{name} must be {range_}, got {number:g}.")


def value_at(value: ScalarOrSchedule, count: jax.Array) -> Number:
    """The number itself, or the schedule's value at step ``count``."""
    return value(count) if callable(value) else value


def dampings(
    options: Options, root: jax.Array, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """lambda_A and lambda_G, dampings of the two sides, from sqrt(lambda) and T.

    Args:
        options: split is read.
        root: sqrt(lambda).
        positions: T, of any shape.

    Returns:
        Both in the shape and dtype of ``positions``.
    """
    root = root.astype(positions.dtype)
    if options.split == "sqrt":
        root = jnp.broadcast_to(root, positions.shape)
        return root, root
    return root * jnp.sqrt(positions), root / jnp.sqrt(positions)


def is_damping(value: jax.Array) -> jax.Array:
    """Whether a damping, which may come from a schedule, is a number above 0."""
    return (value > 0) & jnp.isfinite(value)
