"""Named axes of a mesh, inside ``jax.shard_map``: along which of them a value differs.

With ``check_vma=True``, the default of ``jax.shard_map``, JAX keeps account of it in the types of
arrays, and wants values that meet in a loop or in a backward pass to agree. Everywhere else no axis
is ever reported, and nothing here does anything.
"""

from collections.abc import Collection
from typing import Any

import jax


def varying(tree: Any) -> frozenset[str]:
    """The axes along which some array of a tree may differ from device to device."""
    axes: frozenset[str] = frozenset()
    for leaf in jax.tree.leaves(tree):
        type_ = leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jax.typeof(leaf)
        axes |= getattr(getattr(type_, "manual_axis_type", None), "varying", frozenset())
    return axes


def vary(tree: Any, names: Collection[str]) -> Any:
    """The tree, its arrays marked as differing along these axes; the numbers stay what they are."""
    manual = jax.sharding.get_abstract_mesh().manual_axes

    def one(leaf: Any) -> Any:
        missing = tuple(n for n in names if n in manual and n not in varying(leaf))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(one, tree)
