"""What became of the curvature pairs so far, layer by layer, as numbers and as a table to print."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.core
import numpy as np

from kfqn_optax import pairs
from kfqn_optax.block_step import ScaleByBlockKBFGSState
from kfqn_optax.layer_state import COLUMNS
from kfqn_optax.summary import states_of_pairs, table

_SKIPPED = "skipped: "
_WORDS = {status: word.removeprefix(_SKIPPED) for status, word in pairs.STATUS_WORDS.items()}
_HEADER = ("layer", "side", *_WORDS.values(), "Powell", "second")


class LayerHealth(NamedTuple):
    """How often what happened to the pairs of one layer, since ``tx.init``.

    Every number is an int64 array of the shape [*blocks], [] for a layer that is one matrix.

    Attributes:
        input: of the input factor: how many of its pairs "updated" it, and how many were skipped,
            by reason, in the words of the table.
        output: the same of the output factor.
        powell_damped: how many output pairs Powell's damping changed.
        second_damped: how many the second damping changed (with `kfqn` and `block_kbfgs`: all that
            were measured).
    """

    input: dict[str, np.ndarray]
    output: dict[str, np.ndarray]
    powell_damped: np.ndarray
    second_damped: np.ndarray


class Health(dict[str, LayerHealth]):
    """What `health` returns: `LayerHealth` by layer path; ``print`` shows it as a table.

    Attributes:
        measured_steps: how many steps of a length above 0 `block_kbfgs` measured at their end; 0
            with the others, which take every step.
        rejected_steps: how many of those it did not take, because the loss would have risen.
    """

    measured_steps: int = 0
    rejected_steps: int = 0

    def totals(self) -> dict[str, int]:
        """Sums over all layers, blocks and sides.

        Returns:
            ``updated``; ``skipped``, pairs that were measured and refused, for whatever reason;
            ``not_finite``, those of the skipped that were not finite; ``reset``, factors that began
            anew; ``powell_damped`` and ``second_damped``.
        """
        sides = [side for layer in self.values() for side in (layer.input, layer.output)]

        def total(statuses: Iterable[int]) -> int:
            return int(sum(side[_WORDS[status]].sum() for side in sides for status in statuses))

        skipped = {s for s, word in pairs.STATUS_WORDS.items() if word.startswith(_SKIPPED)}
        reset = pairs.STATUS_WORDS.keys() - skipped - {pairs.UPDATED, pairs.NOT_MEASURED}
        return {
            "updated": total([pairs.UPDATED]),
            "skipped": total(skipped),
            "not_finite": total([pairs.NOT_FINITE]),
            "reset": total(reset),
            "powell_damped": int(sum(layer.powell_damped.sum() for layer in self.values())),
            "second_damped": int(sum(layer.second_damped.sum() for layer in self.values())),
        }

    def __str__(self) -> str:
        """Two lines for each layer, or for each of its blocks, one a side; and one of the steps."""
        rows = [row for path, layer in self.items() for row in _rows(path, layer)]
        steps = f"\nsteps: {self.measured_steps} measured, {self.rejected_steps} of them not taken"
        return table([_HEADER, *rows]) + (steps if self.measured_steps else "")


def health(opt_state: Any) -> Health:
    """What became of every curvature pair so far, to see whether all layers learn.

    A healthy layer has nearly all of its pairs under ``updated``. What the other columns mean: with
    ``s.y <= 0`` there was nothing to learn (a learning rate of 0, a layer whose units are all
    dead); ``s.y too small for |s|``, next to nothing; ``not finite``, numbers were infinite, not
    numbers, or too large to be squared (in float32 above some 1e19); ``not measured``, the loss did
    not depend on the layer; ``only rounding``, the mean gradient of the layer's outputs is zero
    (with `block_kbfgs`: its change is). ``Powell`` and ``second`` count the output pairs that each
    damping changed. Steps with ``curvature_fn=None``, and those that ``optax.apply_if_finite``
    rejects, are not counted.

    `block_kbfgs` offers several pairs a step to each factor, and a factor that begins anew is
    counted beside its pairs, where the others count the pair with which it begins. An input factor
    of directions (``input_rank``) counts as one pair. A last line says how many steps were measured
    and not taken.

    Args:
        opt_state: state of `kbfgs`, or of anything that holds K-BFGS states (``optax.chain``,
            ``optax.partition``, ``optax.MultiSteps``, ``optax.apply_if_finite``, the ``opt_state``
            of an ``nnx.Optimizer``). It is read on the host: call this outside of ``jax.jit``.

    Returns:
        A dict of `LayerHealth` by layer path, whose ``str`` is a table.

    Raises:
        ValueError: if there is no state of `kbfgs`, `kbfgs_l`, `kfqn` or `block_kbfgs` in
            ``opt_state``, or one of shapes only. (`kfac`, `tkfac` and `mbf` learn from no pairs.)
    """
    found = Health()
    for state in states_of_pairs(opt_state):
        found |= {path: _of_layer(path, layer) for path, layer in state.layers.items()}
        if isinstance(state, ScaleByBlockKBFGSState):
            found.measured_steps += int(_numbers("of the steps", state.trust.steps))
            found.rejected_steps += int(_numbers("of the steps", state.trust.rejected))
    return found


def _numbers(of_what: str, counts: Any) -> np.ndarray:
    (counts,) = jax.tree.leaves(counts)  # an nnx.Optimizer wraps it in a variable
    if isinstance(counts, jax.core.Tracer) or not isinstance(counts, (jax.Array, np.ndarray)):
        raise ValueError(
            f"the counts {of_what} are not numbers but {counts}: pass health() a state with "
            "values, outside of jax.jit and jax.eval_shape."
        )
    return np.asarray(counts, np.int64)


def _of_layer(path: str, layer: Any) -> LayerHealth:
    counts = _numbers(f"of layer {path!r}", layer.counts)
    columns = dict(zip(COLUMNS, np.moveaxis(counts, -1, 0), strict=True))

    def side(field: str) -> dict[str, np.ndarray]:
        return {word: columns[field, status] for status, word in _WORDS.items()}

    return LayerHealth(
        input=side("input_status"),
        output=side("output_status"),
        powell_damped=columns["powell_damped", True],
        second_damped=columns["second_damped", True],
    )


def _rows(path: str, layer: LayerHealth) -> Iterator[tuple[str, ...]]:
    """The table's lines for one layer."""
    for block in np.ndindex(layer.powell_damped.shape):
        name = path + "".join(f"[{i}]" for i in block)
        of_input = [str(number[block]) for number in layer.input.values()]
        of_output = [str(number[block]) for number in layer.output.values()]
        damped = [str(layer.powell_damped[block]), str(layer.second_damped[block])]
        yield (name, "input", *of_input, "", "")
        yield (name, "output", *of_output, *damped)
