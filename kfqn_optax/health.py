"""What became of the curvature pairs so far, layer by layer, as numbers and as a table to print."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.core
import numpy as np

from kfqn_optax import pairs
from kfqn_optax.layer_state import COLUMNS
from kfqn_optax.summary import held_layers, table

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
        second_damped: how many the second damping changed (with `kfqn`: all that were measured).
    """

    input: dict[str, np.ndarray]
    output: dict[str, np.ndarray]
    powell_damped: np.ndarray
    second_damped: np.ndarray


class Health(dict[str, LayerHealth]):
    """What `health` returns: `LayerHealth` by layer path; ``print`` shows it as a table."""

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
        """Two lines for each layer, or for each of its blocks, one a side."""
        rows = [row for path, layer in self.items() for row in _rows(path, layer)]
        return table([_HEADER, *rows])


def health(opt_state: Any) -> Health:
    """What became of every curvature pair so far, to see whether all layers learn.

    A healthy layer has nearly all of its pairs under ``updated``. What the other columns mean: with
    ``s.y <= 0`` there was nothing to learn (a learning rate of 0, a layer whose units are all
    dead); ``s.y too small for |s|``, next to nothing; ``not finite``, numbers were infinite, not
    numbers, or too large to be squared (in float32 above some 1e19); ``not measured``, the loss did
    not depend on the layer; ``only rounding``, the mean gradient of the layer's outputs is zero.
    ``Powell`` and ``second`` count the output pairs that each damping changed. Steps with
    ``curvature_fn=None``, and those that ``optax.apply_if_finite`` rejects, are not counted.

    Args:
        opt_state: state of `kbfgs`, or of anything that holds K-BFGS states (``optax.chain``,
            ``optax.partition``, ``optax.MultiSteps``, ``optax.apply_if_finite``, the ``opt_state``
            of an ``nnx.Optimizer``). It is read on the host: call this outside of ``jax.jit``.

    Returns:
        A dict of `LayerHealth` by layer path, whose ``str`` is a table.

    Raises:
        ValueError: if there is no state of `kbfgs`, `kbfgs_l` or `kfqn` in ``opt_state``, or one of
            shapes only. (`kfac`, `tkfac` and `mbf` learn from no pairs.)
    """
    return Health({path: _of_layer(path, layer) for path, layer in held_layers(opt_state).items()})


def _of_layer(path: str, layer: Any) -> LayerHealth:
    (counts,) = jax.tree.leaves(layer.counts)  # an nnx.Optimizer wraps it in a variable
    if isinstance(counts, jax.core.Tracer) or not isinstance(counts, (jax.Array, np.ndarray)):
        raise ValueError(
            f"the counts of layer {path!r} are not numbers but {counts}: pass health() a state "
            "with values, outside of jax.jit and jax.eval_shape."
        )
    columns = dict(zip(COLUMNS, np.moveaxis(np.asarray(counts, np.int64), -1, 0), strict=True))

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
