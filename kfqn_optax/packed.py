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

    Attributes:
        groups: for each array the keys of its vectors.
    """

    def __init__(self, like: Mapping[Any, jax.Array], depths: Mapping[Any, int] | None = None):
        """Rows for vectors of some shapes.

        Args:
            like: by key, [d] or [blocks, d], of the right dtype.
            depths: how many further vectors of its length each row stands for, 0 if nothing is
                said. Keys of different depths share no array.
        """
        self._like = {key: jax.ShapeDtypeStruct(v.shape, v.dtype) for key, v in like.items()}
        self.groups = _groups(self._like, depths or {})

    def pack(self, trees: Mapping[Any, Any]) -> list[Any]:
        """Trees of vectors [*blocks, d] and numbers [*blocks], by key, as a packed tree."""
        return [self.pack_group(at, trees) for at in range(len(self.groups))]

    def pack_group(self, at: int, trees: Mapping[Any, Any]) -> Any:
        """The same for the vectors of one array alone."""
        group = self.groups[at]
        return jax.tree.map(
            lambda *leaves: self._pack(group, leaves), *(trees[key] for key in group)
        )

    def map(self, fn: Callable, *packed: list[Any]) -> list[Any]:
        """``fn`` of each row of packed trees.

        Args:
            fn: a function of trees of vectors [d] and numbers [] that returns such a tree. It must
                not mind zeros behind the end of a vector: inner products, sums, and whatever is
                done entry by entry to vectors of the same layer.
            *packed: its arguments.
        """
        return [
            _computed_once(jax.vmap(fn)(*arguments), arguments)
            for arguments in zip(*packed, strict=True)
        ]

    def unpack(self, packed: list[Any]) -> dict[Any, Any]:
        """A packed tree as trees by key."""
        trees = {}
        for at, tree in enumerate(packed):
            trees |= self.unpack_group(at, tree)
        return {key: trees[key] for key in self._like}

    def unpack_group(self, at: int, tree: Any) -> dict[Any, Any]:
        """The same for the vectors of one array alone."""
        trees = {}
        for key, rows in self.rows_of(at).items():
            d = self._like[key].shape[-1]
            trees[key] = jax.tree.map(
                lambda x: x[rows] if x.ndim == 1 else x[rows, ..., :d],  # noqa: B023
                tree,
            )
        return trees

    def rows_of(self, at: int) -> dict[Any, int | slice]:
        """By key the row of its vector in one array, or the rows of its blocks."""
        places, begin = {}, 0
        for key in self.groups[at]:
            *blocks, _ = self._like[key].shape
            places[key] = slice(begin, begin + blocks[0]) if blocks else begin
            begin += blocks[0] if blocks else 1
        return places

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


def _computed_once(rows: Any, arguments: Any) -> Any:
    """The same, in a form that XLA computes once and not again for each layer that reads a row.

    On a CPU it fuses what is cheap into everything that reads it, `jax.lax.optimization_barrier` or
    not: the kernels of each layer would then hold all of a step's logic of pairs. A division is not
    cheap, so it is not done twice, and to divide by 1 changes nothing. XLA must not know that it is
    1, so it is made from numbers that a program is given. Codes are divided as floating point
    numbers, which hold them exactly.
    """
    given = [leaf[0] > 0 for leaf in jax.tree.leaves(arguments) if leaf.ndim == 1]
    leaves, treedef = jax.tree.flatten(rows)
    floats = [leaf.dtype for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]
    dtype = jnp.result_type(jnp.float32, *floats)
    one = 1 + 0 * sum(number.astype(dtype) for number in given)
    numbers = [leaf.astype(dtype) for leaf in leaves if leaf.ndim == 1]
    columns = iter(jnp.stack(numbers) / one if numbers else [])
    return jax.tree.unflatten(
        treedef,
        [(next(columns) if leaf.ndim == 1 else leaf / one).astype(leaf.dtype) for leaf in leaves],
    )


def _groups(like: Mapping[Any, Any], depths: Mapping[Any, int]) -> list[list[Any]]:
    """Keys whose vectors share an array, the longest first."""
    groups: list[list[Any]] = []
    kinds = {key: (depths.get(key, 0), vector.dtype) for key, vector in like.items()}
    for depth, dtype in dict.fromkeys(kinds.values()):
        alike = [key for key in like if kinds[key] == (depth, dtype)]
        alike.sort(key=lambda key: like[key].shape[-1], reverse=True)
        while alike:
            width = like[alike[0]].shape[-1]
            rows = sum(like[key].shape[0] if len(like[key].shape) > 1 else 1 for key in alike)
            few = width * rows * max(depth, 1) <= _SMALL
            group = [key for key in alike if few or 4 * like[key].shape[-1] >= width]
            groups.append(group)
            alike = alike[len(group) :]
    return groups
