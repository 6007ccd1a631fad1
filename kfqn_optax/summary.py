"""What will happen to every parameter, as a table to print."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from kfqn_optax import inverse
from kfqn_optax.layer_state import LayerState
from kfqn_optax.layers import Layer, join, named_leaves, path_name
from kfqn_optax.optimizer import FALLBACK, MomentumState
from kfqn_optax.transform import ScaleByKBFGSState

_KERNELS = ("kernel", "embedding")
_HEADER = ("parameter", "shape", "dtype", "updated by", "factors", "state bytes", "why")


def summary(opt_state: Any, params: Any = None, layers: Iterable[Layer] | None = None) -> str:
    """A table of who updates which parameter, with what, and why.

    Args:
        opt_state: state of `kbfgs`, or of anything that holds a K-BFGS state.
        params: the parameters; without them, those outside the layers are listed without shapes,
            and not at all where ``scale_by_kbfgs`` is used without `kbfgs`.
        layers: what `find_layers` returned, to say of what kind each layer is.

    Returns:
        One line a parameter: path, shape, dtype, who updates it, the sizes of its two factors, the
        bytes of state kept for it, and the reason; and a line of totals. Momentum counts for each
        parameter, the factors for the kernel.

    Raises:
        ValueError: if there is no K-BFGS state in ``opt_state``.
    """
    state = _only(opt_state, ScaleByKBFGSState)
    if state is None:
        raise ValueError(
            "opt_state holds no K-BFGS state: pass what tx.init(params) returned, for a tx made "
            "with kbfgs or scale_by_kbfgs."
        )
    partition = _only(opt_state, optax.transforms.PartitionState)
    inner = {} if partition is None else partition.inner_states
    bytes_of = _bytes_by_name(inner or opt_state)
    shapes = named_leaves(params) if params is not None else _momentum_leaves(opt_state)

    kinds = {layer.path: layer.kind for layer in layers or ()}
    rows = []
    for name, leaf in shapes.items():
        path, _, last = name.rpartition("/")
        layer = state.layers.get(path)
        shape, dtype = ("", "") if leaf is None else (str(jnp.shape(leaf)), str(leaf.dtype))
        kept = bytes_of(name)
        if layer is not None and last in (*_KERNELS, "bias"):
            by, why = "K-BFGS", f"{kinds.get(path, '')} layer".strip()
            if last in _KERNELS:
                factors = f"{inverse.words(layer.input)} and {inverse.words(layer.output)}"
                kept += _layer_bytes(layer)
            else:
                factors = "with its kernel"
        else:
            by = "fallback" if FALLBACK in inner else "passed on"
            factors = "none"
            why = "not among layers=" if last in _KERNELS else "no part of a layer"
        rows.append((name, shape, dtype, by, factors, f"{kept:,}", why))
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(opt_state))
    rows.append(("total", "", "", "", "", f"{total:,}", "counters included"))
    return _table([_HEADER, *rows])


def _only(tree: Any, kind: type) -> Any:
    """The first node of a kind in a tree, or None."""
    nodes = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, kind))
    return next((node for node in nodes if isinstance(node, kind)), None)


def _momentum_leaves(opt_state: Any) -> dict[str, Any]:
    """Every parameter that the momentum of `kbfgs` knows of: None where it is masked out."""
    momentum = _only(opt_state, MomentumState)
    if momentum is None:
        state = _only(opt_state, ScaleByKBFGSState)
        return {join(path, "kernel"): None for path in state.layers}
    leaves, _ = jax.tree_util.tree_flatten_with_path(
        momentum.momentum, is_leaf=lambda node: isinstance(node, optax.MaskedNode)
    )
    return {
        path_name(path): None if isinstance(leaf, optax.MaskedNode) else leaf
        for path, leaf in leaves
    }


def _bytes_by_name(state: Any) -> Any:
    """A function from a parameter's path to the bytes of the state's arrays named after it."""
    sizes = {name: leaf.nbytes for name, leaf in named_leaves(state).items()}
    return lambda wanted: sum(
        size for name, size in sizes.items() if name == wanted or name.endswith("/" + wanted)
    )


def _layer_bytes(layer: LayerState) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(layer))


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
