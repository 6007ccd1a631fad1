"""The factors of one side of all layers: products with vectors, and updates with a pair each.

Dense factors are multiplied layer by layer, and what they learn is computed in rows (`packed`).
Limited memories of one size lie side by side as well, filled up with zeros to the length of the
longest: they are small, and a program takes time to compile for each layer that it takes apart.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kfqn_optax import bfgs, lbfgs
from kfqn_optax.layers import Layer
from kfqn_optax.lbfgs import Memory
from kfqn_optax.packed import Rows
from kfqn_optax.pairs import Pair


class Side:
    """One side's factors, each dense or a limited memory.

    Attributes:
        rows: for vectors as long as the factors.
    """

    def __init__(self, layers: Sequence[Layer], held: Mapping[str, Any]):
        """The factors of some layers, by path; with blocks they have an axis of blocks in front."""
        self._layers = {layer.path: layer for layer in layers}
        self._held = held
        depths = {path: H.s.shape[-2] if isinstance(H, Memory) else 0 for path, H in held.items()}
        vectors = {
            path: H.s[..., 0, :] if isinstance(H, Memory) else H[..., 0] for path, H in held.items()
        }
        self.rows = Rows(vectors, depths)
        self._memories = [
            self._side_by_side(group) if isinstance(held[group[0]], Memory) else None
            for group in self.rows.groups
        ]

    def apply(self, vectors: list[jax.Array]) -> list[jax.Array]:
        """Each factor times its vector, packed."""
        return [self._apply(at, of_group) for at, of_group in enumerate(vectors)]

    def update(
        self, offered: list[Pair], statuses: list[jax.Array]
    ) -> dict[str, tuple[Any, jax.Array]]:
        """The factors after their pairs, and what became of these, by path.

        Args:
            offered: a damped pair for each factor, packed.
            statuses: whether it may enter, see `pairs`; packed.
        """
        updated: dict[str, tuple[Any, jax.Array]] = {}
        for at, (pair, status) in enumerate(zip(offered, statuses, strict=True)):
            memories = self._memories[at]
            if memories is not None:
                new = self.rows.map(lbfgs.update, [memories], [pair], [status])
                updated |= self._apart(at, *new[0])
                continue
            new = self.rows.map(bfgs.change, [pair], [self._apply(at, pair.y)], [status])
            for path, (change, reached) in self.rows.unpack_group(at, new[0]).items():
                add = self._layers[path].over_blocks(bfgs.add)
                updated[path] = add(self._held[path], change), reached
        return updated

    def _apply(self, at: int, vectors: jax.Array) -> jax.Array:
        memories = self._memories[at]
        if memories is not None:
            return jax.vmap(lbfgs.apply)(memories, vectors)
        return self.rows.pack_group(
            at,
            {
                path: self._layers[path].over_blocks(bfgs.apply)(self._held[path], vector)
                for path, vector in self.rows.unpack_group(at, vectors).items()
            },
        )

    def _side_by_side(self, group: list[str]) -> Memory:
        """Memories as one, with an axis of rows in front of every field."""
        width = max(self._held[path].s.shape[-1] for path in group)

        def in_rows(path: str) -> Memory:
            H = self._held[path]
            if self._layers[path].blocks is None:
                H = jax.tree.map(lambda x: x[None], H)
            more = ((0, 0), (0, 0), (0, width - H.s.shape[-1]))
            return H._replace(s=jnp.pad(H.s, more), y=jnp.pad(H.y, more))

        return jax.tree.map(lambda *x: jnp.concatenate(x), *map(in_rows, group))

    def _apart(self, at: int, H: Memory, status: jax.Array) -> dict[str, tuple[Memory, jax.Array]]:
        """The memories of a group and their statuses by path, as `_side_by_side` found them."""
        memories = {}
        for path, rows in self.rows.rows_of(at).items():
            d = self._held[path].s.shape[-1]
            memory = jax.tree.map(lambda x: x[rows], H)  # noqa: B023
            memories[path] = memory._replace(s=memory.s[..., :d], y=memory.y[..., :d]), status[rows]
        return memories
