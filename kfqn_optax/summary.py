"""What will happen to every parameter, as a table to print."""

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from kfqn_optax import inverse
from kfqn_optax.block_step import ScaleByBlockKBFGSState
from kfqn_optax.layers import Layer, join, named_leaves, path_name
from kfqn_optax.mbf_rule import ScaleByMBFState
from kfqn_optax.mini_block import MiniBlockState
from kfqn_optax.natural import ScaleByKFACState
from kfqn_optax.optimizer import FALLBACK, MomentumState
from kfqn_optax.tkfac_rule import ScaleByTKFACState
from kfqn_optax.transform import ScaleByKBFGSState

_KERNELS = ("kernel", "embedding")
_METHODS = {
    ScaleByBlockKBFGSState: "block K-BFGS",
    ScaleByKBFGSState: "K-BFGS",
    ScaleByKFACState: "K-FAC",
    ScaleByMBFState: "MBF",
    ScaleByTKFACState: "TKFAC",
}
_MAKERS = {
    ScaleByBlockKBFGSState: "block_kbfgs",
    ScaleByKBFGSState: "kbfgs, kbfgs_l, kfqn",
    ScaleByKFACState: "kfac",
    ScaleByMBFState: "mbf",
    ScaleByTKFACState: "tkfac",
}
_HEADER = ("parameter", "shape", "dtype", "updated by", "factors", "state bytes", "why")


def summary(opt_state: Any, params: Any = None, layers: Iterable[Layer] | None = None) -> str:
    """A table of who updates which parameter, with what, and why.

    Args:
        opt_state: state of `kbfgs`, `kfac` and their like, or of anything that holds such states;
            shapes will do.
        params: the parameters; without them, those outside the layers are listed without shapes,
            and not at all where ``scale_by_kbfgs`` is used without `kbfgs`.
        layers: what `find_layers` returned, to say of what kind each layer is.

    Returns:
        One line a parameter: path, shape, dtype, who updates it, the sizes of its two factors, the
        bytes of state kept for it, and the reason; and a line of totals. Momentum counts for each
        parameter, the factors for the kernel.

    Raises:
        ValueError: if there is no state of ours in ``opt_state``.
    """
    states = _states(opt_state, *_METHODS)
    held = {path: layer for state in states for path, layer in state.layers.items()}
    methods = {path: _METHODS[type(state)] for state in states for path in state.layers}
    partitions = _all(opt_state, optax.transforms.PartitionState)
    fallback = any(FALLBACK in partition.inner_states for partition in partitions)
    parameters = _named(params, opt_state)
    bytes_of = _bytes_by_name(opt_state, set(parameters))
    kinds = {layer.path: layer.kind for layer in layers or ()}
    rows = []
    for name, leaf in parameters.items():
        path, _, last = name.rpartition("/")
        layer = held.get(path)
        shape, dtype = ("", "") if leaf is None else (str(jnp.shape(leaf)), str(leaf.dtype))
        kept = bytes_of(name)
        if layer is not None and (last in _KERNELS or (last == "bias" and _has_bias(layer))):
            by, why = methods[path], f"{kinds.get(path, '')} layer".strip()
            if last in _KERNELS:
                factors = _factors(layer)
                kept += _layer_bytes(layer)
            else:
                factors = "with its kernel"
        else:
            by = "fallback" if fallback else "passed on"
            factors = "none"
            why = "not among layers=" if last in _KERNELS else "no part of a layer"
        rows.append((name, shape, dtype, by, factors, f"{kept:,}", why))
    total = sum(_nbytes(leaf) for leaf in jax.tree.leaves(opt_state))
    rows.append(("total", "", "", "", "", f"{total:,}", "counters included"))
    return table([_HEADER, *rows])


def states_of_pairs(opt_state: Any) -> list[ScaleByKBFGSState | ScaleByBlockKBFGSState]:
    """The states of K-BFGS and its kin, which learn from pairs, wherever in an optimizer's state.

    Raises:
        ValueError: if there is none in ``opt_state``.
    """
    return _states(opt_state, ScaleByBlockKBFGSState, ScaleByKBFGSState)


def _states(opt_state: Any, *kinds: type) -> list[Any]:
    """The states of these kinds; there must be one at least."""
    states = _all(opt_state, kinds)
    if not states:
        makers = some_of(_MAKERS[kind] for kind in kinds)
        raise ValueError(
            f"opt_state holds no state of {makers}: pass what tx.init(params) returned, for a tx "
            "made with one of these, or with the scale_by_ function of the same name."
        )
    return states


def some_of(names: Iterable[str]) -> str:
    """Names in a sentence: "a, b or c"."""
    *first, last = ", ".join(names).split(", ")
    return f"{', '.join(first)} or {last}"


def _all(tree: Any, kind: type | tuple[type, ...]) -> list[Any]:
    """The nodes of a kind, or of several, in a tree."""
    nodes = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, kind))
    return [node for node in nodes if isinstance(node, kind)]


def _named(params: Any, opt_state: Any) -> dict[str, Any]:
    """The parameters by path, or what the state tells of them: None where it has no shape."""
    if params is not None:
        return named_leaves(params)
    momenta = _all(opt_state, MomentumState)
    if not momenta:
        states = _all(opt_state, tuple(_METHODS))
        return {join(path, "kernel"): None for state in states for path in state.layers}
    known: dict[str, Any] = {}
    for momentum in momenta:
        leaves, _ = jax.tree_util.tree_flatten_with_path(
            momentum.momentum, is_leaf=lambda node: isinstance(node, optax.MaskedNode)
        )
        for path, leaf in leaves:
            masked = isinstance(leaf, optax.MaskedNode)
            known[path_name(path)] = known.get(path_name(path)) if masked else leaf
    # A mask may stand for a whole dictionary, of which another momentum knows the parameters.
    return {
        name: leaf
        for name, leaf in known.items()
        if leaf is not None or not any(other.startswith(name + "/") for other in known)
    }


def _bytes_by_name(state: Any, names: set[str]) -> Any:
    """A function from a parameter's path to the bytes of the state's arrays named after it.

    An array belongs to the longest of the names that its own path ends in.
    """
    sizes: dict[str, int] = {}
    for path, leaf in named_leaves(state).items():
        parts = path.split("/")
        ends = ("/".join(parts[i:]) for i in range(len(parts)))
        owner = next((end for end in ends if end in names), None)
        if owner is not None:
            sizes[owner] = sizes.get(owner, 0) + _nbytes(leaf)
    return lambda name: sizes.get(name, 0)


def _has_bias(layer: Any) -> bool:
    """Whether a bias next to the kernel is part of the layer: not to MBF's convolutions."""
    return not isinstance(layer, MiniBlockState) or layer.moment.ndim == layer.momentum.ndim


def _factors(layer: Any) -> str:
    """The sizes of a layer's factors."""
    if not isinstance(layer, MiniBlockState):
        return f"{inverse.words(layer.input)} and {inverse.words(layer.output)}"
    d, count = layer.moment.shape[-1], math.prod(layer.moment.shape[:-2])
    return f"{d}^2" if count == 1 else f"{count:,} of {d}^2"


def _layer_bytes(layer: Any) -> int:
    return sum(_nbytes(leaf) for leaf in jax.tree.leaves(layer))


def _nbytes(leaf: Any) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def table(rows: list[tuple[str, ...]]) -> str:
    """Rows of cells, the first of them the header, as lines with aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
