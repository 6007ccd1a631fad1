"""Matrix views: how the parameters of any linear layer are read as matrices.

A layer computes ``h = a W`` with the layer's input a, [d_in], and its output h, [d_out], whatever
shape its kernel is stored in: [height, width, channels, features] for a convolution, [d, heads,
head_dim] for a projection of attention. A `MatrixView` says which axes of the array make up the
rows of W (the input side) and which the columns (the output side).

Some arrays hold several such matrices that have nothing to do with each other: the groups of a
grouped convolution, the batch axes of a ``DenseGeneral``, the layers that ``nn.scan`` stacks. Their
axes are the view's blocks, and the view is [blocks, rows, columns].
"""

import dataclasses
import math

import jax


@dataclasses.dataclass(frozen=True)
class MatrixView:
    """How an array is read as a matrix or as a stack of them.

    Attributes:
        split: for each axis of the array the sizes it is split into; ``((3,), (8,), (2, 16))`` for
            the shape (3, 8, 32) with the last axis split into 2 x 16.
        blocks: which of the split axes count the matrices, slowest first.
        rows: which make up the rows; empty for a bias, which is one row.
        columns: which make up the columns.
    """

    split: tuple[tuple[int, ...], ...]
    blocks: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return tuple(math.prod(sizes) for sizes in self.split)

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """Shape of the matrices: (rows, columns), or (blocks, rows, columns)."""
        flat = self._flat
        sizes = [math.prod(flat[i] for i in axes) for axes in (self.rows, self.columns)]
        if self.blocks:
            sizes.insert(0, math.prod(flat[i] for i in self.blocks))
        return tuple(sizes)

    def to_matrix(self, array: jax.Array) -> jax.Array:
        """The array as its matrices, `matrix_shape`."""
        split = array.reshape(self._flat).transpose(self._order)
        return split.reshape(self.matrix_shape)

    def from_matrix(self, matrix: jax.Array) -> jax.Array:
        """The inverse of `to_matrix`."""
        order = self._order
        split = matrix.reshape([self._flat[i] for i in order])
        inverse = [order.index(i) for i in range(len(order))]
        return split.transpose(inverse).reshape(self.shape)

    def stacked(self, axes: tuple[int, ...], sizes: tuple[int, ...]) -> "MatrixView":
        """The view of an array with more axes, each counting such arrays.

        Args:
            axes: positions of the new axes in the new array, ascending.
            sizes: their lengths.
        """
        split = list(self.split)
        moved = list(range(len(self._flat)))  # where the present split axes go
        new: list[int] = []
        for axis, size in zip(axes, sizes, strict=True):
            at = sum(len(parts) for parts in split[:axis])
            split.insert(axis, (size,))
            moved = [i + (i >= at) for i in moved]
            new = [i + (i >= at) for i in new] + [at]
        return MatrixView(
            tuple(split),
            blocks=(*new, *(moved[i] for i in self.blocks)),
            rows=tuple(moved[i] for i in self.rows),
            columns=tuple(moved[i] for i in self.columns),
        )

    @property
    def _flat(self) -> tuple[int, ...]:
        return tuple(size for sizes in self.split for size in sizes)

    @property
    def _order(self) -> tuple[int, ...]:
        return (*self.blocks, *self.rows, *self.columns)
