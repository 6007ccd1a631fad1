"""The two factors of each layer, and which pair feeds which.

The Hessian of a layer's parameters is approximated by ``A (x) G``: A the second moment of its
inputs, G the mean Hessian of the loss with respect to its outputs. K-BFGS keeps the two inverses,
``input`` near ``(A + lambda_A I)^-1`` and ``output`` near ``G^-1``, and never inverts a matrix
after the start: both learn by BFGS updates, one pair a step each.

The functions here take all layers through what follows the direction (`intake` has what goes before
it); arguments by layer path. Products with matrices are taken layer by layer, everything else in
rows, all layers at once (`packed`). Where a kernel holds several matrices (layers stacked by
``nn.scan``, groups of a convolution), every array has an axis of blocks in front, and each block
has factors of its own.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfqn_optax import intake, inverse, layer_state, pairs
from kfqn_optax.inverse import Diagonal
from kfqn_optax.layer_state import RUNNING, LayerState
from kfqn_optax.layers import Layer
from kfqn_optax.one_side import Side
from kfqn_optax.options import Options, dampings, is_damping
from kfqn_optax.pairs import Pair
from kfqn_optax.statistics import LayerStatistics, is_usable, running_average

States = Mapping[str, LayerState]
Measured = Mapping[str, LayerStatistics]


class _Offer(NamedTuple):
    """A pair for one factor, and what is to be kept of it.

    Attributes:
        pair: damped.
        status: whether it may enter the factor, see `pairs`.
        by_powell: whether Powell's damping acted; None on the input side.
        by_second: whether the second damping did.
    """

    pair: Pair
    status: jax.Array
    by_powell: jax.Array | None = None
    by_second: jax.Array | None = None


def input_steps(
    layers: Sequence[Layer], states: States, measured: Measured
) -> dict[str, jax.Array]:
    """S of the input sides, ``H_a a``, [*blocks, d_in] by layer path.

    Layers whose input factor takes no pairs, embeddings, have none.
    """
    return {
        layer.path: layer.over_blocks(inverse.apply)(
            states[layer.path].input, measured[layer.path].input_mean
        )
        for layer in layers
        if not isinstance(states[layer.path].input, Diagonal)
    }


def learn(
    layers: Sequence[Layer],
    states: States,
    measured: Measured,
    probed: Measured,
    products: Mapping[str, jax.Array],
    changes: Mapping[str, jax.Array],
    options: Options,
    root: jax.Array,
) -> dict[str, LayerState]:
    """After the probe: both factors take one pair (Algorithm 2 of the paper).

    Args:
        layers: whose states they are.
        states: from `begin`, with the factors that the direction was made with.
        measured: statistics at the parameters.
        probed: statistics of the same examples at the probe.
        products: A of these examples times `input_steps`, [*blocks, d_in], where A is not stored.
        changes: of the mean output, [*blocks, d_out], from `output_change`.
        options: pair_decay, powell, curvature_tolerance, shift and split are read.
        root: sqrt(lambda).
    """
    outputs = _outputs(layers, states, measured, probed, changes, options, root)
    inputs = _inputs(layers, states, measured, products, options, root)
    return {
        layer.path: LayerState(
            **inputs[layer.path],
            **outputs[layer.path],
            input_moment=states[layer.path].input_moment,
            positions=states[layer.path].positions,
            stage=states[layer.path].stage,
            counts=layer_state.count(
                states[layer.path].counts,
                inputs[layer.path]["input_status"],
                outputs[layer.path]["output_status"],
                outputs[layer.path]["powell_damped"],
                outputs[layer.path]["second_damped"],
            ),
        )
        for layer in layers
    }


def output_change(
    layer: Layer,
    before: Mapping[str, jax.Array],
    after: Mapping[str, jax.Array],
    measured: LayerStatistics,
    probed: LayerStatistics,
) -> jax.Array:
    """Change of the mean output from parameters to probe, [*blocks, d_out].

    The mean output is W a, so its change is ``(W+ - W) a+ + W (a+ - a)``: the small step is not
    lost in a difference of two large means.

    Args:
        layer: the layer.
        before: W as [*blocks, d_in, d_out] under ``kernel``, without the row of the bias, and that
            row under ``bias`` if there is one.
        after: the same of the probe.
        measured: input_mean is read, a.
        probed: the same at the probe, a+.
    """

    def of_one(before, after, a, a_plus):
        K, K_plus = before["kernel"], after["kernel"]
        x, x_plus = a[: len(K)], a_plus[: len(K)]
        change = jnp.sum((K_plus - K) * x_plus[:, None] + K * (x_plus - x)[:, None], axis=0)
        if "bias" in before:
            change += after["bias"][0] * a_plus[-1] - before["bias"][0] * a[-1]
        return change

    return layer.over_blocks(of_one)(before, after, measured.input_mean, probed.input_mean)


def change_of_output(
    before: Mapping[str, jax.Array],
    after: Mapping[str, jax.Array],
    inputs: jax.Array,
    probed: jax.Array,
) -> jax.Array:
    """As `output_change`, of one matrix and for several combinations of the examples, [q, d_out].

    Args:
        before: W of one matrix, in parts.
        after: the same at the probe.
        inputs: combinations of the inputs, [q, d_in].
        probed: the same at the probe.
    """
    K, K_plus = before["kernel"], after["kernel"]
    x, x_plus = inputs[:, : len(K)], probed[:, : len(K)]
    change = pairs.matmul(x_plus, K_plus - K) + pairs.matmul(x_plus - x, K)
    if "bias" in before:
        change += probed[:, -1:] * after["bias"] - inputs[:, -1:] * before["bias"]
    return change


def _outputs(layers, states, measured, probed, changes, options, root) -> dict[str, dict[str, Any]]:
    """What changes of a state on the output side: averages, damps, updates."""

    def average(s, y, change, at, plus) -> tuple[Pair, jax.Array, jax.Array]:
        raw = Pair(change, plus.cotangent_mean - at.cotangent_mean)
        reached = (at.rows != 0) & (plus.rows != 0)
        finite = is_usable(raw.s) & is_usable(raw.y)
        # A mean of cotangents that cancel exactly (softmax does not see a shift of all keys) is
        # noise, and so is its change; damping would make a pair of it all the same. Cotangents that
        # do not cancel have a mean of at least their size over the square root of their number.
        drowned = _is_noise(at) & _is_noise(plus)
        usable = reached & finite & ~drowned
        reasons = [~reached, drowned, ~finite]
        words = [pairs.NOT_MEASURED, pairs.ROUNDING, pairs.NOT_FINITE]
        refusal = jnp.select(reasons, words, pairs.UPDATED).astype(jnp.int32)
        averaged = Pair(
            jnp.where(usable, running_average(s, raw.s, options.pair_decay), s),
            jnp.where(usable, running_average(y, raw.y, options.pair_decay), y),
        )
        return averaged, usable, refusal

    def damp(averaged, Hy, at, positions) -> _Offer:
        average, usable, refusal = averaged
        _, damping = dampings(options, root, positions)
        if options.shift:
            damped, by_powell = pairs.damp_powell(average, Hy, options.powell)
            damped, by_second = pairs.damp_shift(damped, damping), jnp.ones_like(by_powell)
        else:
            damped, by_powell, by_second = pairs.damp_double(average, Hy, options.powell, damping)
        status = pairs.pair_status(damped, at.cotangent_mean, options.curvature_tolerance)
        status = jnp.where(is_damping(damping), status, pairs.NOT_FINITE)
        status = jnp.where(refusal == pairs.UPDATED, status, refusal)
        return _Offer(damped, status, by_powell & usable, by_second & usable)

    def cotangents(of_layers: Measured) -> list[LayerStatistics]:
        without_inputs = {"input_moment": None, "input_product": None, "input_mean": None}
        return rows.pack({path: of_layers[path]._replace(**without_inputs) for path in held})

    held = {layer.path: states[layer.path].output for layer in layers}
    side = Side(layers, held)
    rows = side.rows
    s, y, positions = (
        rows.pack({path: getattr(states[path], field) for path in held})
        for field in ("s", "y", "positions")
    )
    at = cotangents(measured)
    averaged = rows.map(average, s, y, rows.pack(changes), at, cotangents(probed))
    averages = rows.unpack([average for average, _, _ in averaged])
    Hy = side.apply([average.y for average, _, _ in averaged])
    offers = rows.map(damp, averaged, Hy, at, positions)
    by_powell = rows.unpack([offer.by_powell for offer in offers])
    by_second = rows.unpack([offer.by_second for offer in offers])
    return {
        path: {
            "output": factor,
            "output_status": status,
            "s": averages[path].s,
            "y": averages[path].y,
            "powell_damped": by_powell[path],
            "second_damped": by_second[path],
        }
        for path, (factor, status) in _update(side, offers).items()
    }


def _is_noise(measured: LayerStatistics) -> jax.Array:
    """Whether the mean cotangent is nothing but what rounding leaves of a sum that is 0."""
    size = jnp.sqrt(pairs.dot(measured.cotangent_mean, measured.cotangent_mean))
    return size < measured.cotangent_noise


def _inputs(layers, states, measured, products, options, root) -> dict[str, dict[str, Any]]:
    """What changes of a state on the input side; the matrix to invert is known: exact pairs."""

    def action(s, As, a, seen, at, positions, stage) -> _Offer:
        damping, _ = dampings(options, root, positions)
        pair = pairs.hessian_action(s, As, damping)
        status = pairs.pair_status(pair, a, options.curvature_tolerance)
        # A factor does not learn from what A has not taken in, nor before it is made from A.
        learns = is_usable(seen) & (stage == RUNNING) & is_damping(damping)
        status = jnp.where(learns, status, pairs.NOT_FINITE)
        return _Offer(pair, jnp.where(at != 0, status, pairs.NOT_MEASURED))

    seen = {
        layer.path: intake.witness(states[layer.path], measured[layer.path]) for layer in layers
    }
    steps = input_steps(layers, states, measured)
    learning = [layer for layer in layers if layer.path in steps]
    updated = {}
    if learning:
        As = {
            layer.path: products[layer.path]
            if states[layer.path].input_moment is None
            else layer.over_blocks(pairs.matvec)(states[layer.path].input_moment, steps[layer.path])
            for layer in learning
        }
        side = Side(learning, {path: states[path].input for path in steps})
        rows = side.rows
        offers = rows.map(
            action,
            rows.pack(steps),
            rows.pack(As),
            rows.pack({path: measured[path].input_mean for path in steps}),
            rows.pack({path: seen[path] for path in steps}),
            rows.pack({path: measured[path].rows for path in steps}),
            rows.pack({path: states[path].positions for path in steps}),
            rows.pack({path: states[path].stage for path in steps}),
        )
        updated = _update(side, offers)
    for path in [layer.path for layer in layers if layer.path not in steps]:
        # The lookups of an embedding: A is diagonal.
        damping, _ = dampings(options, root, states[path].positions)
        usable = jnp.isfinite(jnp.sum(seen[path] ** 2, axis=-1)) & is_damping(damping)
        status = jnp.where(usable, pairs.UPDATED, pairs.NOT_FINITE)
        status = jnp.where(measured[path].rows != 0, status, pairs.NOT_MEASURED).astype(jnp.int32)
        new = 1 / (states[path].input_moment + damping[..., None])
        held = states[path].input.inverse
        learned = (status == pairs.UPDATED)[..., None]
        updated[path] = Diagonal(jnp.where(learned, new, held)), status
    return {
        path: {"input": factor, "input_status": status}
        for path, (factor, status) in updated.items()
    }


def _update(side: Side, offers: list[_Offer]) -> dict[str, tuple[Any, jax.Array]]:
    """One side's factors after their pairs, and what became of these."""
    return side.update([offer.pair for offer in offers], [offer.status for offer in offers])
