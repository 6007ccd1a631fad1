"""The vectors of many layers side by side: one program for all, not one for each.

What a step does to a pair (s, y) is some dozens of operations on vectors of length d and on single
numbers, the same for every side of every layer. Written out layer by layer they make up most of a
program, and of the time that it takes to compile: a compiler does not see that it has met them
before. So the vectors are laid into the rows of one array, filled up with zeros to the length of
the longest, and the operations are mapped over its rows. Only products with matrices, which differ
in size from layer to layer, remain outside.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

# Vectors less than a quarter as long as the longest get an array of their own, unless all of them
# together, filled up, have no more entries than this.
_SMALL = 2**18


class Rows:
    """Which vector lies in which row of which array.

    A packed tree is a list, one tree for each array of rows: [rows, width] for vectors, [rows] for
    numbers. Layers of one dtype and of similar length share an array.
    """

    def __init__(self, like: Mapping[Any, jax.Array]):
        """Rows for vectors [d], or [blocks, d], with these shapes and dtypes."""
        self._like = {key: jax.ShapeDtypeStruct(v.shape, v.dtype) for key, v in like.items()}
        self._groups = _groups(self._like)

    def pack(self, trees: Mapping[Any, Any]) -> list[Any]:
        """Trees of vectors [*blocks, d] and numbers [*blocks], by key, as a packed tree."""
        return [
            jax.tree.map(lambda *leaves: self._pack(group, leaves), *(trees[key] for key in group))  # noqa: B023
            for group in self._groups
        ]

    def map(self, fn: Callable, *packed: list[Any]) -> list[Any]:
        """``fn`` of each row of packed trees.

        Args:
            fn: a function of trees of vectors [d] and numbers [] that returns such a tree. It must
                not mind zeros behind the end of a vector: inner products, sums, and whatever is
                done entry by entry to vectors of the same layer.
            *packed: its arguments.
        """
        # The barrier keeps XLA from computing everything again for each layer that reads a row.
        return jax.lax.optimization_barrier(
            [jax.vmap(fn)(*arguments) for arguments in zip(*packed, strict=True)]
        )

    def unpack(self, packed: list[Any]) -> dict[Any, Any]:
        """A packed tree as trees by key."""
        trees = {}
        for group, tree in zip(self._groups, packed, strict=True):
            at = 0
            for key in group:
                *blocks, d = self._like[key].shape
                rows = slice(at, at + blocks[0]) if blocks else at
                at += blocks[0] if blocks else 1
                trees[key] = jax.tree.map(
                    lambda x: x[rows] if x.ndim == 1 else x[rows, ..., :d],  # noqa: B023
                    tree,
                )
        return {key: trees[key] for key in self._like}

    def _pack(self, group: list[Any], leaves: tuple[Any, ...]) -> jax.Array:
        """One leaf of the trees of a group, [rows, width] or [rows].

        Laid end to end with the zeros between them, since XLA copies such pieces and needs no code.
        """
        width = self._like[group[0]].shape[-1]
        pieces, vectors = [], False
        for key, leaf in zip(group, leaves, strict=True):
            *blocks, d = self._like[key].shape
            leaf = jnp.asarray(leaf)
            vectors = leaf.ndim > len(blocks)
            if not vectors or d == width:
                pieces.append(leaf.reshape(-1))
            elif not blocks:
                pieces += [leaf, jnp.zeros(width - d, leaf.dtype)]
            else:
                pieces.append(jnp.pad(leaf, ((0, 0), (0, width - d))).reshape(-1))
        flat = jnp.concatenate(pieces)
        return flat.reshape(-1, width) if vectors else flat


def _groups(like: Mapping[Any, Any]) -> list[list[Any]]:
    """Keys whose vectors share an array, the longest first."""
    groups: list[list[Any]] = []
    for dtype in dict.fromkeys(vector.dtype for vector in like.values()):
        alike = [key for key, vector in like.items() if vector.dtype == dtype]
        alike.sort(key=lambda key: like[key].shape[-1], reverse=True)
        while alike:
            width = like[alike[0]].shape[-1]
            rows = sum(like[key].shape[0] if len(like[key].shape) > 1 else 1 for key in alike)
            few = width * rows <= _SMALL
            group = [key for key in alike if few or 4 * like[key].shape[-1] >= width]
            groups.append(group)
            alike = alike[len(group) :]
    return groups
