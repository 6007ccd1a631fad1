"""The two factors of each layer, and which pair feeds which.

The Hessian of a layer's parameters is approximated by ``A (x) G``: A the second moment of its
inputs, G the mean Hessian of the loss with respect to its outputs. K-BFGS keeps the two inverses,
``input`` near ``(A + lambda_A I)^-1`` and ``output`` near ``G^-1``, and never inverts a matrix
after the start: both learn by BFGS updates, one pair a step each.

The functions here take all layers through a step, in its order; arguments by layer path. Products
with matrices are taken layer by layer, everything else in rows, all layers at once (`packed`).
Where a kernel holds several matrices (layers stacked by ``nn.scan``, groups of a convolution),
every array has an axis of blocks in front, and each block has factors of its own.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfqn_optax import bfgs, inverse, lbfgs, pairs
from kfqn_optax.inverse import Diagonal
from kfqn_optax.layer_state import EMPTY, RUNNING, WARM, LayerState
from kfqn_optax.layers import Layer
from kfqn_optax.options import Options
from kfqn_optax.packed import Rows
from kfqn_optax.pairs import Pair
from kfqn_optax.statistics import LayerStatistics, running_average

States = Mapping[str, LayerState]
Measured = Mapping[str, LayerStatistics]


# --- before the direction -----------------------------------------------------------------------


class _Intake(NamedTuple):
    """How a layer takes in a batch: ``A <- old A + new A_batch`` if ``usable``."""

    usable: jax.Array
    old: jax.Array
    new: jax.Array
    positions: jax.Array
    stage: jax.Array


def begin(
    layers: Sequence[Layer], states: States, measured: Measured | None, options: Options
) -> dict[str, LayerState]:
    """Before the direction: A takes in the batch (Algorithm 2 of the paper).

    A is the first batch's moment, unless `warm_start` gave one, which the first batch then does not
    enter; afterwards a running average. A batch that did not reach the layer, or whose moment is
    not finite, leaves A as it is.

    Args:
        layers: whose states they are.
        states: as the previous step left them.
        measured: statistics at the parameters; None to leave the factors alone in this step. After
            a warm start the input factor is made from A even so (`start`), and A stays open to the
            first batch that is measured.
        options: factor_decay is read.
    """
    if measured is None:
        return {layer.path: _closed(states[layer.path]) for layer in layers}

    def intake(seen: jax.Array, of: LayerStatistics, state: LayerState) -> _Intake:
        usable = (of.rows > 0) & jnp.isfinite(jnp.sum(seen))
        stage, decay = state.stage, jnp.asarray(options.factor_decay, seen.dtype)
        return _Intake(
            usable=usable,
            old=jnp.where(stage == EMPTY, 0, jnp.where(stage == WARM, 1, decay)),
            new=jnp.where(stage == EMPTY, 1, jnp.where(stage == WARM, 0, 1 - decay)),
            positions=jnp.where(of.rows > 0, of.rows / of.examples, state.positions),
            stage=jnp.where(usable | (stage == WARM), RUNNING, stage),
        )

    seen, numbers, state_numbers = {}, {}, {}
    for layer in layers:
        state, of_layer = states[layer.path], measured[layer.path]
        moment = of_layer.input_moment
        if state.input_moment is None or moment is None:
            moment = None
            seen[layer.path] = of_layer.input_mean
        else:
            # Of a matrix the sums of the rows.
            matrix = moment.ndim > of_layer.input_mean.ndim
            seen[layer.path] = jnp.sum(moment, axis=-1) if matrix else moment
        numbers[layer.path] = of_layer._replace(
            input_moment=None, input_product=None, input_mean=None, cotangent_mean=None
        )
        state_numbers[layer.path] = _numbers(state)
    rows = Rows(seen)
    packed = rows.map(intake, *map(rows.pack, (seen, numbers, state_numbers)))
    intakes = rows.unpack(packed)
    return {
        layer.path: _take_in(states[layer.path], measured[layer.path], intakes[layer.path])
        for layer in layers
    }


def _closed(state: LayerState) -> LayerState:
    """The state without a batch: a warm start is used up, where A is not stored."""
    if state.input_moment is not None:
        return state
    return state._replace(stage=jnp.where(state.stage == WARM, RUNNING, state.stage))


def _take_in(state: LayerState, measured: LayerStatistics, intake: _Intake) -> LayerState:
    A, batch = state.input_moment, measured.input_moment
    if A is not None and batch is not None:
        usable, old, new = (
            number.reshape(*number.shape, *[1] * (A.ndim - number.ndim))
            for number in (intake.usable, intake.old, intake.new)
        )
        A = jnp.where(usable, old * A + new * batch, A).astype(A.dtype)
    return state._replace(input_moment=A, positions=intake.positions, stage=intake.stage)


def _numbers(state: LayerState) -> LayerState:
    """The state without its vectors and matrices."""
    return state._replace(input=None, output=None, input_moment=None, s=None, y=None)


def starts(state: LayerState, begun: LayerState) -> jax.Array:
    """Whether the input factor is to be made from A in this step; [*blocks].

    Args:
        state: as the previous step left it.
        begun: the same after `begin`.
    """
    return (begun.stage != EMPTY) & (state.stage != RUNNING)


def start(
    layers: Sequence[Layer],
    states: States,
    begun: States,
    moments: Mapping[str, jax.Array],
    options: Options,
    root: jax.Array,
) -> dict[str, Any]:
    """The input factors, made from A where this is a layer's first step.

    Layers of one size share one compiled inverse, which takes them in turn: on a CPU, batched
    calls of LAPACK side by side in one program can wait for each other forever.

    Args:
        layers: whose states they are.
        states: as the previous step left them.
        begun: the same after `begin`.
        moments: A of the first batch, where A is not stored; empty where nothing is measured.
        options: split is read.
        root: sqrt(lambda).
    """
    inputs = {layer.path: states[layer.path].input for layer in layers}
    alike: dict[Any, list[str]] = {}
    for layer in layers:
        path, state = layer.path, states[layer.path]
        if isinstance(state.input, Diagonal):
            first = starts(state, begun[path])[..., None]
            damping, _ = split(options, root, begun[path].positions)
            new = 1 / (jnp.asarray(begun[path].input_moment) + damping[..., None])
            inputs[path] = Diagonal(jnp.where(first, new, state.input.inverse))
        elif isinstance(state.input, jax.Array):
            alike.setdefault((state.input.shape[-2:], state.input.dtype), []).append(path)

    def of_one(state: LayerState, begun: LayerState, batch: jax.Array) -> Any:
        damping, _ = split(options, root, begun.positions)
        A = begun.input_moment
        if A is None:  # not stored: a warm start left it in the factor's place
            A = jnp.where(state.stage == WARM, state.input, batch)
            A = jnp.where(jnp.isfinite(jnp.sum(A)), A, 0)
        new = bfgs.inverse(A, damping).astype(A.dtype)
        return jnp.where(starts(state, begun), new, state.input)

    for paths in alike.values():
        trees = [
            (
                _numbers(states[path])._replace(input=inputs[path]),
                _numbers(begun[path])._replace(input_moment=begun[path].input_moment),
                moments.get(path, inputs[path]),
            )
            for path in paths
        ]
        counts = [inputs[path].shape[:-2] for path in paths]
        rows = [
            tree if blocks else jax.tree.map(lambda x: x[None], tree)
            for tree, blocks in zip(trees, counts, strict=True)
        ]
        stacked = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *rows)
        made, at = jax.lax.map(lambda row: of_one(*row), tuple(stacked)), 0
        for path, blocks in zip(paths, counts, strict=True):
            size = blocks[0] if blocks else 1
            inputs[path] = made[at : at + size].reshape(inputs[path].shape)
            at += size
    return inputs


# --- after the probe ----------------------------------------------------------------------------


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
    learned = {
        layer.path: {
            "input_moment": states[layer.path].input_moment,
            "positions": states[layer.path].positions,
            "stage": states[layer.path].stage,
        }
        for layer in layers
    }
    _learn_outputs(learned, layers, states, measured, probed, changes, options, root)
    _learn_inputs(learned, layers, states, measured, products, options, root)
    return {path: LayerState(**fields) for path, fields in learned.items()}


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


def split(options: Options, root: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """lambda_A and lambda_G, dampings of the two sides, from sqrt(lambda) and T."""
    root = root.astype(positions.dtype)
    if options.split == "sqrt":
        root = jnp.broadcast_to(root, positions.shape)
        return root, root
    return root * jnp.sqrt(positions), root / jnp.sqrt(positions)


def _learn_outputs(learned, layers, states, measured, probed, changes, options, root) -> None:
    """The output sides: averages the changes of mean output and cotangent, damps, updates."""

    def average(s, y, change, at, plus) -> tuple[Pair, jax.Array, jax.Array]:
        raw = Pair(change, plus.cotangent_mean - at.cotangent_mean)
        reached = (at.rows != 0) & (plus.rows != 0)
        finite = jnp.isfinite(jnp.sum(raw.s)) & jnp.isfinite(jnp.sum(raw.y))
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
        _, damping = split(options, root, positions)
        if options.shift:
            damped, by_powell = pairs.damp_powell(average, Hy, options.powell)
            damped, by_second = pairs.damp_shift(damped, damping), jnp.ones_like(by_powell)
        else:
            damped, by_powell, by_second = pairs.damp_double(average, Hy, options.powell, damping)
        status = pairs.pair_status(damped, at.cotangent_mean, options.curvature_tolerance)
        status = jnp.where(refusal == pairs.UPDATED, status, refusal)
        return _Offer(damped, status, by_powell & usable, by_second & usable)

    def cotangents(of_layers: Measured) -> list[LayerStatistics]:
        return rows.pack(
            {
                layer.path: of_layers[layer.path]._replace(
                    input_moment=None, input_product=None, input_mean=None
                )
                for layer in layers
            }
        )

    rows = Rows({layer.path: states[layer.path].s for layer in layers})
    s, y, positions = (
        rows.pack({layer.path: getattr(states[layer.path], field) for layer in layers})
        for field in ("s", "y", "positions")
    )
    at = cotangents(measured)
    averaged = rows.map(average, s, y, rows.pack(changes), at, cotangents(probed))
    held = {layer: states[layer.path].output for layer in layers}
    averages = rows.unpack([average for average, _, _ in averaged])
    Hy = {
        layer.path: layer.over_blocks(inverse.apply)(H, averages[layer.path].y)
        for layer, H in held.items()
    }
    offers = rows.map(damp, averaged, rows.pack(Hy), at, positions)
    factors, statuses = _update(rows, held, offers)
    by_powell = rows.unpack([offer.by_powell for offer in offers])
    by_second = rows.unpack([offer.by_second for offer in offers])
    for layer in layers:
        learned[layer.path] |= {
            "output": factors[layer],
            "output_status": statuses[layer],
            "s": averages[layer.path].s,
            "y": averages[layer.path].y,
            "powell_damped": by_powell[layer.path],
            "second_damped": by_second[layer.path],
        }


def _is_noise(measured: LayerStatistics) -> jax.Array:
    """Whether the mean cotangent is nothing but what rounding leaves of a sum that is 0."""
    size = jnp.sqrt(pairs.dot(measured.cotangent_mean, measured.cotangent_mean))
    return size < measured.cotangent_noise


def _learn_inputs(learned, layers, states, measured, products, options, root) -> None:
    """The input sides; the matrix to invert is known, so their pairs are exact."""

    def action(s, As, a, rows_seen, positions) -> _Offer:
        damping, _ = split(options, root, positions)
        pair = pairs.hessian_action(s, As, damping)
        status = pairs.pair_status(pair, a, options.curvature_tolerance)
        return _Offer(pair, jnp.where(rows_seen != 0, status, pairs.NOT_MEASURED))

    steps = input_steps(layers, states, measured)
    held = {layer: states[layer.path].input for layer in layers if layer.path in steps}
    factors, statuses = {}, {}
    if held:
        As = {
            layer.path: products[layer.path]
            if states[layer.path].input_moment is None
            else layer.over_blocks(pairs.matvec)(states[layer.path].input_moment, steps[layer.path])
            for layer in held
        }
        rows = Rows(steps)
        offers = rows.map(
            action,
            rows.pack(steps),
            rows.pack(As),
            rows.pack({layer.path: measured[layer.path].input_mean for layer in held}),
            rows.pack({layer.path: measured[layer.path].rows for layer in held}),
            rows.pack({layer.path: states[layer.path].positions for layer in held}),
        )
        factors, statuses = _update(rows, held, offers)
    for layer in layers:
        if layer not in held:  # an embedding's lookups: A is diagonal
            state = states[layer.path]
            damping, _ = split(options, root, state.positions)
            factors[layer] = Diagonal(1 / (state.input_moment + damping[..., None]))
            seen = measured[layer.path].rows > 0
            statuses[layer] = jnp.where(seen, pairs.UPDATED, pairs.NOT_MEASURED).astype(jnp.int32)
        learned[layer.path] |= {"input": factors[layer], "input_status": statuses[layer]}


def _update(
    rows: Rows, held: Mapping[Layer, Any], offers: list[_Offer]
) -> tuple[dict[Layer, Any], dict[Layer, jax.Array]]:
    """One side's factors after their pairs, and what became of these, by layer."""
    offered = rows.unpack(offers)
    dense = {layer: H for layer, H in held.items() if isinstance(H, jax.Array)}
    factors, statuses = {}, {}
    if dense:
        Hy = {
            layer.path: layer.over_blocks(bfgs.apply)(dense[layer], offered[layer.path].pair.y)
            if layer in dense
            else jnp.zeros_like(offered[layer.path].pair.y)
            for layer in held
        }
        changes = rows.map(
            bfgs.change,
            [offer.pair for offer in offers],
            rows.pack(Hy),
            [offer.status for offer in offers],
        )
        for layer, (step, status) in zip(held, rows.unpack(changes).values(), strict=True):
            if layer in dense:
                factors[layer] = layer.over_blocks(bfgs.add)(dense[layer], step)
                statuses[layer] = status
    for layer, H in held.items():
        if layer not in dense:
            offer = offered[layer.path]
            factors[layer], statuses[layer] = layer.over_blocks(lbfgs.update)(
                H, offer.pair, offer.status
            )
    return factors, statuses
