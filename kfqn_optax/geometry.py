"""Geometries: how one call of a linear layer walks over its input, as rows.

Every layer here computes ``h = a W``, again and again: for each example, and within an example at
each position (the tokens of a sequence, the pixels of a convolution's output). One example at one
position is a row. `input_rows` lays out what the layer was given as [N, d], `output_rows` what it
returned (or the gradient with respect to that) as [N, d_out], and row n of one belongs to row n of
the other, whatever the axes of the arrays mean. The constant 1 of a bias is never among the d.

A layer may hold G blocks that have nothing to do with each other, each with its own part of the
input and of the output (the groups of a convolution). Then rows are [N, G, d], and every sum over
rows has an axis G in front.

What an optimizer needs are sums over rows, and those it gets without the rows where the rows would
be many times larger than the input: nothing is unfolded for `Convolution.product`, and the one-hot
vectors of a `Lookup` are never formed. The order of the d entries is that of the rows of the
kernel's `MatrixView`, for a convolution (window..., channels).

`dtype` is float32 or float64; arrays are cast to it before anything is summed.
"""

import abc
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

_HIGHEST = lax.Precision.HIGHEST
_WIDE = 512  # a second moment of this size or more, of as many rows, is made in three parts of four


class Geometry(abc.ABC):
    """One way to walk over an input; hashable, so it may be a static argument.

    Subclasses say what the rows are. The sums here go through the rows.
    """

    @abc.abstractmethod
    def examples(self, inputs: jax.Array) -> int:
        """Length of the first axis that counts rows; 1 if the input is a single row."""

    @abc.abstractmethod
    def input_rows(self, inputs: jax.Array, dtype: Any) -> jax.Array:
        """The input as rows, [N, d] or [N, G, d]."""

    @abc.abstractmethod
    def output_rows(self, outputs: jax.Array, dtype: Any) -> jax.Array:
        """The output, or its gradient, as rows, [N, d_out] or [N, G, d_out]."""

    def input_sum(self, inputs: jax.Array, dtype: Any) -> jax.Array:
        """Sum of the input rows x, [d] or [G, d]."""
        return jnp.sum(self.input_rows(inputs, dtype), axis=0)

    def moment(self, inputs: jax.Array, dtype: Any) -> jax.Array:
        """Sum of x x^T, [d, d] or [G, d, d]."""
        return second_moment(self.input_rows(inputs, dtype))

    def product(self, inputs: jax.Array, vector: jax.Array, dtype: Any) -> jax.Array:
        """Sum of x (x . v), which is `moment` times v, for a vector v, [d] or [G, d]."""
        rows = self.input_rows(inputs, dtype)
        along = jnp.einsum("n...i,...i->n...", rows, vector.astype(dtype), precision=_HIGHEST)
        return jnp.einsum("n...i,n...->...i", rows, along, precision=_HIGHEST)


@dataclasses.dataclass(frozen=True)
class Contraction(Geometry):
    """Some axes of the input are contracted with the kernel: dense layers, einsums, attention.

    Each field holds axes, counted from 0. Those of ``rest`` make up the N rows and come in the same
    order in input and output, as do the ``blocks``.

    Attributes:
        input_rest: axes of the input that count rows.
        input_blocks: axes of the input that count blocks; none if there is one matrix only.
        input_contracted: axes of the input that make up the vector of a row.
        output_rest: axes of the output that count rows.
        output_blocks: axes of the output that count blocks.
        output_free: axes of the output that make up the vector of a row.
    """

    input_rest: tuple[int, ...]
    input_blocks: tuple[int, ...]
    input_contracted: tuple[int, ...]
    output_rest: tuple[int, ...]
    output_blocks: tuple[int, ...]
    output_free: tuple[int, ...]

    def examples(self, inputs: jax.Array) -> int:
        """Length of the first axis that counts rows; 1 if there is none."""
        return inputs.shape[self.input_rest[0]] if self.input_rest else 1

    def input_rows(self, inputs: jax.Array, dtype: Any) -> jax.Array:
        """The input as rows, [N, d] or [N, G, d]."""
        return _rows(inputs, self.input_rest, self.input_blocks, self.input_contracted, dtype)

    def output_rows(self, outputs: jax.Array, dtype: Any) -> jax.Array:
        """The output, or its gradient, as rows, [N, d_out] or [N, G, d_out]."""
        return _rows(outputs, self.output_rest, self.output_blocks, self.output_free, dtype)


@dataclasses.dataclass(frozen=True)
class Convolution(Geometry):
    """A window moves over the input, [*batch, *spatial, channels]; a row is what it shows.

    The output is [*batch, *positions, features]; there may be any number of batch axes, also none.

    Attributes:
        window: size of the kernel along each spatial axis.
        strides: of the window.
        padding: how much is added before and after each spatial axis.
        padding_mode: what is added: ``"zeros"``, or as in ``jnp.pad``, ``"wrap"`` or ``"reflect"``.
        input_dilation: spacing of the input's pixels, zeros in between.
        kernel_dilation: spacing of the window's pixels.
        groups: number of blocks into which channels and features are divided.
    """

    window: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    padding_mode: str
    input_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]
    groups: int

    def examples(self, inputs: jax.Array) -> int:
        """Length of the first batch axis; 1 if there is none."""
        return inputs.shape[0] if inputs.ndim > len(self.window) + 1 else 1

    def input_rows(self, inputs: jax.Array, dtype: Any) -> jax.Array:
        """The patches, [N, d] or [N, G, d]."""
        return self._patches(self._images(inputs, dtype))

    def output_rows(self, outputs: jax.Array, dtype: Any) -> jax.Array:
        """The output's pixels, [N, d_out] or [N, G, d_out]."""
        *positions, features = outputs.shape
        shape = (math.prod(positions), self.groups, features // self.groups)
        return self._without_one_group(outputs.astype(dtype).reshape(shape))

    def input_sum(self, inputs: jax.Array, dtype: Any) -> jax.Array:
        """Sum of the patches, [d] or [G, d]: the patches of the sum of all images."""
        total = jnp.sum(self._images(inputs, dtype), axis=0, keepdims=True)
        return jnp.sum(self._patches(total), axis=0)

    def product(self, inputs: jax.Array, vector: jax.Array, dtype: Any) -> jax.Array:
        """Sum of x (x . v), [d] or [G, d], by two convolutions and no patches.

        All the x . v are the layer's own convolution with v as its kernel (one output channel for
        each group), and the sum is the transpose of that map from kernel to output, applied to its
        own result: 4 N d operations.
        """
        images = self._padded(self._images(inputs, dtype))
        channels = images.shape[-1] // self.groups
        kernel = vector.astype(dtype).reshape(self.groups, *self.window, channels)

        def convolve(kernel: jax.Array) -> jax.Array:
            return lax.conv_general_dilated(
                images,
                jnp.moveaxis(kernel, 0, -1),
                self.strides,
                self._zeros,
                lhs_dilation=self.input_dilation,
                rhs_dilation=self.kernel_dilation,
                dimension_numbers=self._axes,
                feature_group_count=self.groups,
                precision=_HIGHEST,
            )

        along, transpose = jax.vjp(convolve, kernel)
        (total,) = transpose(along)
        return total.reshape(vector.shape)

    def _images(self, inputs: jax.Array, dtype: Any) -> jax.Array:
        """The input with one batch axis."""
        batch = inputs.ndim - len(self.window) - 1
        shape = (math.prod(inputs.shape[:batch]), *inputs.shape[batch:])
        return inputs.astype(dtype).reshape(shape)

    def _padded(self, images: jax.Array) -> jax.Array:
        """The images, padded unless it is with zeros, which the convolutions do themselves."""
        if self.padding_mode == "zeros":
            return images
        return jnp.pad(images, ((0, 0), *self.padding, (0, 0)), mode=self.padding_mode)

    @property
    def _zeros(self) -> tuple[tuple[int, int], ...]:
        """How many zeros the convolutions have to add."""
        return self.padding if self.padding_mode == "zeros" else ((0, 0),) * len(self.window)

    @property
    def _axes(self) -> tuple[str, str, str]:
        """Names of the axes of images, kernel and output for `lax`."""
        spatial = "".join(map(str, range(len(self.window))))
        return f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"

    def _patches(self, images: jax.Array) -> jax.Array:
        """The rows of [n, *spatial, channels]."""
        groups, channels = self.groups, images.shape[-1]
        patches = lax.conv_general_dilated_patches(
            self._padded(images),
            self.window,
            self.strides,
            self._zeros,
            lhs_dilation=self.input_dilation,
            rhs_dilation=self.kernel_dilation,
            dimension_numbers=self._axes,
            precision=_HIGHEST,
        )
        # lax gives the channels before the window, our kernels have them behind it.
        rows, size = math.prod(patches.shape[:-1]), math.prod(self.window)
        patches = patches.reshape(rows, groups, channels // groups, size).swapaxes(2, 3)
        return self._without_one_group(patches.reshape(rows, groups, size * (channels // groups)))

    def _without_one_group(self, rows: jax.Array) -> jax.Array:
        return rows[:, 0] if self.groups == 1 else rows


@dataclasses.dataclass(frozen=True)
class Lookup(Geometry):
    """Each integer of the input picks a row of a table, as if multiplied with a one-hot vector.

    The second moment of one-hot vectors is diagonal: how often each row was picked. `moment` is
    that diagonal, [d]. Indices count from the end if negative and nothing if out of range, as in
    ``jnp.take``, except that every index means row 0 of a table with one row, as in Flax.

    Attributes:
        size: number of rows of the table, d.
    """

    size: int

    def examples(self, inputs: jax.Array) -> int:
        """Length of the first axis; 1 for a single index."""
        return inputs.shape[0] if inputs.ndim else 1

    def input_rows(self, inputs: jax.Array, dtype: Any) -> jax.Array:
        """The one-hot vectors, [N, d], of indices in range; the sums do without them."""
        indices = self._indices(inputs)
        counted = jnp.where(indices < 0, indices + self.size, indices)
        return jax.nn.one_hot(counted, self.size, dtype=dtype)

    def output_rows(self, outputs: jax.Array, dtype: Any) -> jax.Array:
        """The rows that were picked, or their gradients, [N, d_out]."""
        *rest, d_out = outputs.shape
        return outputs.astype(dtype).reshape(math.prod(rest), d_out)

    def input_sum(self, inputs: jax.Array, dtype: Any) -> jax.Array:
        """How often each row was picked, [d]."""
        indices = self._indices(inputs)
        return jnp.zeros(self.size, dtype).at[indices].add(jnp.ones_like(indices, dtype))

    def moment(self, inputs: jax.Array, dtype: Any) -> jax.Array:
        """The same counts: the diagonal of the sum of x x^T, [d]."""
        return self.input_sum(inputs, dtype)

    def product(self, inputs: jax.Array, vector: jax.Array, dtype: Any) -> jax.Array:
        """Sum of x (x . v), [d]."""
        return self.input_sum(inputs, dtype) * vector.astype(dtype)

    def _indices(self, inputs: jax.Array) -> jax.Array:
        indices = inputs.reshape(math.prod(inputs.shape))
        if indices.dtype.itemsize < 4:  # an int8 cannot hold the size of a large table
            indices = indices.astype(jnp.int32)
        return jnp.zeros_like(indices) if self.size == 1 else indices


def second_moment(rows: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """Sum over rows of x x^T, [d, d] or [G, d, d].

    Args:
        rows: [N, d] or [N, G, d].
        weights: each row's x x^T is multiplied by the squared length of this one's row, [N, k] or
            [N, G, k].
    """
    weighted = rows if weights is None else rows * jnp.sum(weights**2, axis=-1, keepdims=True)
    if min(len(rows), rows.shape[-1]) < _WIDE:  # of few rows it is memory that takes the time
        return _inner(weighted, rows)
    left, right = jnp.split(rows, [rows.shape[-1] // 2], axis=-1)
    of_left, of_right = jnp.split(weighted, [rows.shape[-1] // 2], axis=-1)
    corner = _inner(of_left, right)
    return jnp.concatenate(
        [
            jnp.concatenate([_inner(of_left, left), corner], axis=-1),
            jnp.concatenate([corner.swapaxes(-1, -2), _inner(of_right, right)], axis=-1),
        ],
        axis=-2,
    )


def _inner(left: jax.Array, right: jax.Array) -> jax.Array:
    """Sum over rows of x y^T, [d, e] or [G, d, e], for rows x and y."""
    return jnp.einsum("n...i,n...j->...ij", left, right, precision=_HIGHEST)


def _rows(
    array: jax.Array,
    rest: tuple[int, ...],
    blocks: tuple[int, ...],
    entries: tuple[int, ...],
    dtype: Any,
) -> jax.Array:
    """An array as [N, d] or, with blocks, [N, G, d], from the axes that make up each."""
    sizes = [math.prod(array.shape[axis] for axis in axes) for axes in (rest, blocks, entries)]
    if not blocks:
        del sizes[1]
    return array.astype(dtype).transpose(*rest, *blocks, *entries).reshape(sizes)
