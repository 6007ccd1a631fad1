"""Calls: what one call of a linear layer is, told from shapes and the layer's settings.

Shared by Flax linen and NNX, and free of both. A `Call` says how the call's input and output become
rows (`geometry`) and how kernel and bias become matrices (`MatrixView`), in matching order: entry i
of an input row meets row i of the kernel's matrix, entry j of an output row comes from its column j
and from column j of the bias.

Most layers are contractions, and are described as an einsum is: one symbol for each axis of input,
kernel and output. Which of the three a symbol appears in decides its part:

    input, kernel          contracted: rows of the matrix
    kernel, output         free: columns of the matrix
    input, output          rest: examples and positions
    all three              blocks

Each function returns None for a call that is not of this form.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

from jax import lax

from kfqn_optax.geometry import Contraction, Convolution, Geometry, Lookup
from kfqn_optax.matrix import MatrixView

Shape = Sequence[int]
Symbols = Sequence[Hashable]

_WRAPPED = {"CIRCULAR": "wrap", "REFLECT": "reflect"}  # Flax's word for a padding, and NumPy's


class Call(NamedTuple):
    """Static facts about one call of a layer.

    Shapes are those that the layer itself sees, without the axes that lifted transforms hide.

    Attributes:
        kind: what it is, in words: ``"dense"``, ``"conv"``, ``"dense general"``, ``"einsum"``,
            ``"embed"`` or ``"attend"``.
        geometry: how its input and output become rows.
        kernel: how its kernel becomes a matrix.
        bias: the same for its bias; None without one.
        kernel_name: the kernel's name in the layer.
        bias_name: the bias's.
    """

    kind: str
    geometry: Geometry
    kernel: MatrixView
    bias: MatrixView | None
    kernel_name: str = "kernel"
    bias_name: str = "bias"


def dense(rank: int, kernel_shape: Shape, bias_shape: Shape | None) -> Call | None:
    """A dense layer on the last axis of an input with so many axes."""
    rest = range(rank - 1)
    return _contraction(
        "dense", (*rest, "d"), ("d", "h"), (*rest, "h"), kernel_shape, bias_shape
    )  # fmt: skip


def dense_general(
    rank: int,
    axis: int | Sequence[int],
    batch_axis: int | Sequence[int],
    kernel_shape: Shape,
    bias_shape: Shape | None,
) -> Call | None:
    """A dense layer on some axes of the input, with its own weights along others.

    Args:
        rank: number of axes of the input.
        axis: those which are contracted; the kernel has them in ascending order.
        batch_axis: those with their own weights, the first ones.
        kernel_shape: [*batch, *contracted, *features].
        bias_shape: [*batch, *features].
    """
    contracted = sorted(i % rank for i in _sequence(axis))
    batch = sorted(i % rank for i in _sequence(batch_axis))
    features = [f"h{i}" for i in range(len(kernel_shape) - len(batch) - len(contracted))]
    rest = [i for i in range(rank) if i not in (*batch, *contracted)]
    return _contraction(
        "dense general",
        range(rank),
        [*batch, *contracted, *features],
        [*batch, *rest, *features],
        kernel_shape,
        bias_shape,
    )


def einsum(
    equation: str, input_shape: Shape, kernel_shape: Shape, bias_shape: Shape | None
) -> Call | None:
    """An einsum of input and kernel, ``"...d,dh->...h"``.

    None for what makes no matrix: a letter in one place only (summed, not contracted) or twice in
    one term (a diagonal), an ellipsis in the kernel's term, sizes that differ (one of them 1, which
    broadcasts), a bias in another shape than that of its letters.
    """
    operands, output = equation.replace(" ", "").split("->")
    inputs, kernel = operands.split(",")
    hidden = range(len(input_shape) - len(inputs.replace("...", "")))  # behind the dots

    def symbols(term: str) -> tuple[Hashable, ...]:
        before, dots, behind = term.partition("...")
        return (*before, *(hidden if dots else ()), *behind)

    if "..." in kernel:
        return None
    of_inputs = symbols(inputs)
    sizes = dict(zip(of_inputs, input_shape, strict=True))
    if any(sizes.get(c, n) != n for c, n in zip(kernel, kernel_shape, strict=True)):
        return None
    return _contraction(
        "einsum", of_inputs, tuple(kernel), symbols(output), kernel_shape, bias_shape
    )


def lookup(kernel_shape: Shape) -> Call:
    """A lookup of integers in a table, [size, d_out]."""
    size, features = kernel_shape
    view = MatrixView(((size,), (features,)), blocks=(), rows=(0,), columns=(1,))
    return Call("embed", Lookup(size), view, bias=None, kernel_name="embedding")


def attend(rank: int, kernel_shape: Shape) -> Call | None:
    """The scores of vectors for each row of a table, [size, d]: its transpose is the kernel."""
    rest = range(rank - 1)
    call = _contraction("attend", (*rest, "d"), ("h", "d"), (*rest, "h"), kernel_shape, None)
    return call and call._replace(kernel_name="embedding")


def conv(
    input_shape: Shape,
    kernel_shape: Shape,
    bias_shape: Shape | None,
    *,
    strides: int | Sequence[int] | None,
    padding: str | int | Sequence[int | tuple[int, int]],
    input_dilation: int | Sequence[int] | None,
    kernel_dilation: int | Sequence[int] | None,
    groups: int,
) -> Call:
    """A convolution with Flax's settings, where one number stands for all axes and None for 1.

    Args:
        input_shape: [*batch, *spatial, channels].
        kernel_shape: [*window, channels / groups, features].
        bias_shape: [features].
        strides: of the window.
        padding: ``"SAME"``, ``"VALID"``, ``"CAUSAL"``, ``"CIRCULAR"``, ``"REFLECT"``, or numbers.
        input_dilation: spacing of the input.
        kernel_dilation: spacing of the window.
        groups: number of groups of features.
    """
    *window, channels, features = kernel_shape
    n = len(window)
    stride = _for_each(strides, n)
    spacing = _for_each(kernel_dilation, n)
    extent = [(size - 1) * apart + 1 for size, apart in zip(window, spacing, strict=True)]
    pads, mode = _padding(padding, input_shape[-n - 1 : -1], extent, stride)
    geometry = Convolution(
        window=tuple(window),
        strides=stride,
        padding=pads,
        padding_mode=mode,
        input_dilation=_for_each(input_dilation, n),
        kernel_dilation=spacing,
        groups=groups,
    )
    of_window = tuple((size,) for size in (*window, channels))
    rows = tuple(range(n + 1))
    if groups == 1:
        kernel = MatrixView((*of_window, (features,)), (), rows, (n + 1,))
        bias = MatrixView(((features,),), (), (), (0,))
    else:
        split = (groups, features // groups)
        kernel = MatrixView((*of_window, split), (n + 1,), rows, (n + 2,))
        bias = MatrixView((split,), (0,), (), (1,))
    return Call("conv", geometry, kernel, None if bias_shape is None else bias)


def _contraction(
    kind: str,
    inputs: Symbols,
    kernel: Symbols,
    output: Symbols,
    kernel_shape: Shape,
    bias_shape: Shape | None,
) -> Call | None:
    """A contraction from the symbols of its axes; the bias has the kernel's, in output order."""
    places = [symbol for term in (inputs, kernel, output) for symbol in set(term)]
    diagonal = any(len(set(term)) < len(term) for term in (inputs, kernel, output))
    if diagonal or any(places.count(symbol) == 1 for symbol in places):
        return None
    rest = [c for c in inputs if c not in kernel]
    blocks = [c for c in kernel if c in inputs and c in output]
    contracted = [c for c in kernel if c not in output]
    free = [c for c in kernel if c not in inputs]

    def axes(symbols: Symbols, term: Symbols) -> tuple[int, ...]:
        return tuple(list(term).index(symbol) for symbol in symbols)

    geometry = Contraction(
        input_rest=axes(rest, inputs),
        input_blocks=axes(blocks, inputs),
        input_contracted=axes(contracted, inputs),
        output_rest=axes(rest, output),
        output_blocks=axes(blocks, output),
        output_free=axes(free, output),
    )

    def view(term: Symbols, shape: Shape, rows: Symbols) -> MatrixView:
        split = tuple((size,) for size in shape)
        return MatrixView(split, axes(blocks, term), axes(rows, term), axes(free, term))

    bias = None
    if bias_shape is not None:
        of_bias = [c for c in output if c in kernel]
        if tuple(bias_shape) != tuple(kernel_shape[list(kernel).index(c)] for c in of_bias):
            return None
        bias = view(of_bias, bias_shape, [])
    return Call(kind, geometry, view(kernel, kernel_shape, contracted), bias)


def _padding(
    padding: str | int | Sequence[int | tuple[int, int]],
    spatial: Shape,
    extent: Shape,
    strides: Shape,
) -> tuple[tuple[tuple[int, int], ...], str]:
    """What is added around the input, and what it is made of (see `Convolution`).

    Args:
        padding: as Flax takes it.
        spatial: lengths of the input's spatial axes.
        extent: lengths of the window, spacing included.
        strides: of the window.
    """
    if not isinstance(padding, str):
        sides = [padding] * len(spatial) if isinstance(padding, int) else padding
        pairs = [(side, side) if isinstance(side, int) else side for side in sides]
    elif padding in _WRAPPED:
        pairs = [((size - 1) // 2, size // 2) for size in extent]
    elif padding == "CAUSAL":
        pairs = [(size - 1, 0) for size in extent]
    else:
        pairs = lax.padtype_to_pads(spatial, extent, strides, padding)
    mode = _WRAPPED.get(padding, "zeros") if isinstance(padding, str) else "zeros"
    return tuple((int(low), int(high)) for low, high in pairs), mode


def _for_each(value: int | Sequence[int] | None, axes: int) -> tuple[int, ...]:
    """A setting for each spatial axis."""
    if value is None or isinstance(value, int):
        return (1 if value is None else value,) * axes
    return tuple(value)


def _sequence(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)
