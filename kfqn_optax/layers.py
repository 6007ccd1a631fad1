"""Layers: what counts as one in a tree of parameters, and its parameters as one matrix.

A layer computes ``h = a W`` for each row of its input: one example at one position. With a bias,
its input is ``a = [x, 1]``, and its parameters form one matrix [d_in, d_out]: the kernel as a
matrix (`MatrixView`) with the bias as the last row (the transpose of the paper's W). ``d_in``
counts the bias row. Where one array holds several such matrices (layers stacked by ``nn.scan``, the
groups of a convolution) there is a leading axis of blocks, [blocks, d_in, d_out].

Parameters are named by their path in the tree, joined with "/": ``params/Dense_0/kernel``; a layer
by the path of the dictionary that holds its kernel: ``params/Dense_0``.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kfqn_optax.matrix import MatrixView


@dataclasses.dataclass(frozen=True)
class Layer:
    """Static facts about one layer; hashable, never part of the state.

    Attributes:
        path: where its parameters are in the tree, e.g. ``params/encoder/Dense_0``.
        kind: what it is, in words: ``"dense"``, ``"conv"``, ...
        kernel: how its kernel is read as a matrix, the axes of stacked layers included.
        bias: the same for its bias, one row; None without a bias.
        kernel_name: the kernel's key in the layer's dictionary.
        bias_name: the bias's.
        lookup: whether its input vector is one-hot (an embedding), so that the second moment of its
            input is diagonal.
    """

    path: str
    kind: str
    kernel: MatrixView
    bias: MatrixView | None
    kernel_name: str = "kernel"
    bias_name: str = "bias"
    lookup: bool = False

    @property
    def d_in(self) -> int:
        """Length of its input vector, the constant 1 of the bias included."""
        return self.kernel.matrix_shape[-2] + (self.bias is not None)

    @property
    def d_out(self) -> int:
        """Length of its output vector."""
        return self.kernel.matrix_shape[-1]

    @property
    def blocks(self) -> int | None:
        """How many matrices its kernel holds; None if it is one matrix."""
        return self.kernel.matrix_shape[0] if self.kernel.blocks else None

    @property
    def kernel_path(self) -> str:
        """Path of the kernel."""
        return join(self.path, self.kernel_name)

    @property
    def bias_path(self) -> str:
        """Path of the bias."""
        return join(self.path, self.bias_name)

    @property
    def parameter_paths(self) -> tuple[str, ...]:
        """Paths of all its parameters."""
        return (self.kernel_path,) if self.bias is None else (self.kernel_path, self.bias_path)

    def over_blocks(self, fn: Callable) -> Callable:
        """A function of one matrix's arrays, mapped over the blocks if there are any."""
        return fn if self.blocks is None else jax.vmap(fn)

    def for_each_block(self, tree: Any) -> Any:
        """Arrays that are the same for each block, with an axis of blocks in front if there are."""
        if self.blocks is None:
            return tree
        return jax.tree.map(lambda x: jnp.tile(x, (self.blocks, *[1] * x.ndim)), tree)


def join(*parts: str) -> str:
    """Joins the parts of a path; empty parts vanish."""
    return "/".join(part for part in parts if part)


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by path, in the order of the tree.

    The ``value`` level of a box (``nn.Partitioned``, an NNX variable) is left out, so that a
    parameter has the same name whether it comes boxed or bare.
    """
    paths_and_leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {path_name(path): leaf for path, leaf in paths_and_leaves}


def path_name(path: tuple[Any, ...]) -> str:
    """The name of a key path as `jax.tree_util.tree_flatten_with_path` gives it."""
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def fill_holes(full: Any, given: Any) -> Any:
    """``full`` with the leaves of ``given`` in the place of its own.

    ``given`` may have holes, nodes without leaves: what ``optax.masked`` and ``optax.partition``
    leave of a parameter, or, with masks that are prefixes, of a whole part of the tree.

    Raises:
        ValueError: if ``given`` has a leaf or a hole where ``full`` has nothing.
    """

    def parts(tree: Any) -> dict[str, Any]:
        found, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_hole)
        return {path_name(path): node for path, node in found}

    names, nodes = parts(full), parts(given)
    leaves = {name: node for name, node in nodes.items() if not is_hole(node)}
    inner = {join(*name.split("/")[:i]) for name in names for i in range(1, name.count("/") + 1)}
    surplus = nodes.keys() - names.keys() - (inner - leaves.keys())
    if surplus:
        raise ValueError(
            "the parameters given to the update differ in structure from those given to "
            f"curvature_fn; only in the update: {some(sorted(surplus))}; only in curvature_fn: "
            f"{some(sorted(names.keys() - nodes.keys()))}. Pass both the same parameters."
        )
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaves.get(path_name(path), leaf), full
    )


def is_hole(node: Any) -> bool:
    """Whether this is a single node without leaves."""
    structure = jax.tree.structure(node)
    return structure.num_nodes == 1 and structure.num_leaves == 0


def infer_layers(leaves: Mapping[str, Any]) -> tuple[Layer, ...]:
    """The dense layers that the names and shapes of parameters show.

    Args:
        leaves: parameters by path; anything with a shape will do.

    Returns:
        A layer for every ``kernel`` of two axes; beside it there may be a ``bias`` of one axis.

    Raises:
        ValueError: for a kernel with another number of axes (a convolution, a DenseGeneral, a stack
            of layers under ``nn.scan``?) and for a bias that does not fit its kernel.
    """
    layers = []
    for name, leaf in leaves.items():
        path, _, last = name.rpartition("/")
        if last != "kernel":
            continue
        shape = jnp.shape(leaf)
        if len(shape) != 2:
            raise ValueError(
                f"layer {path!r} has a kernel with {len(shape)} axes, shape {shape}, which may be "
                "a convolution, a DenseGeneral or a stack of layers; its shape does not tell. "
                "Pass layers=kfqn_optax.find_layers(loss_fn, params, *args), which looks at the "
                "model; what is not among the layers goes to the fallback."
            )
        bias = leaves.get(join(path, "bias"))
        if bias is not None and jnp.shape(bias) != shape[1:]:
            raise ValueError(
                f"layer {path!r} has a kernel of shape {shape} and a bias of shape "
                f"{jnp.shape(bias)}; a dense layer's bias has shape {shape[1:]}. Pass "
                "layers=kfqn_optax.find_layers(loss_fn, params, *args) to say what the layers are."
            )
        layers.append(dense(path, shape, bias is not None))
    return tuple(layers)


def dense(path: str, kernel_shape: tuple[int, ...], bias: bool) -> Layer:
    """A dense layer from the shape of its kernel, [d_in without the bias row, d_out]."""
    d_in, d_out = kernel_shape
    return Layer(
        path,
        kind="dense",
        kernel=MatrixView(((d_in,), (d_out,)), blocks=(), rows=(0,), columns=(1,)),
        bias=MatrixView(((d_out,),), blocks=(), rows=(), columns=(0,)) if bias else None,
    )


def as_layers(layers: Iterable[Layer] | None) -> tuple[Layer, ...] | None:
    """The argument ``layers=`` as a tuple; a TypeError for what is not a `Layer`."""
    if layers is None:
        return None
    layers = (layers,) if isinstance(layers, Layer) else tuple(layers)
    for layer in layers:
        if not isinstance(layer, Layer):
            raise TypeError(f"layers must hold what kfqn_optax.find_layers returns, got {layer!r}.")
    return layers


def check_layers(layers: Iterable[Layer], leaves: Mapping[str, Any]) -> None:
    """Checks that the parameters of every layer are there and usable.

    Args:
        layers: what the user passed as ``layers=``, or what `infer_layers` found.
        leaves: parameters by path.

    Raises:
        ValueError: if a layer's parameters are missing or have another shape.
        TypeError: if they are not real floating-point numbers.
    """
    for layer in layers:
        views = (layer.kernel,) if layer.bias is None else (layer.kernel, layer.bias)
        for name, view in zip(layer.parameter_paths, views, strict=True):
            shape = view.shape
            if name not in leaves:
                raise ValueError(
                    f"layer {layer.path!r} has no parameter {name!r} in the parameters given; "
                    f"they hold: {some(leaves)}. Call find_layers and init on the same parameters."
                )
            if jnp.shape(leaves[name]) != shape:
                raise ValueError(
                    f"parameter {name!r} has shape {jnp.shape(leaves[name])}, but layer "
                    f"{layer.path!r} needs {shape}. Call find_layers and init on the same "
                    "parameters."
                )
            if not jnp.issubdtype(leaves[name].dtype, jnp.floating):
                raise TypeError(
                    f"parameter {name!r} has dtype {leaves[name].dtype}; K-BFGS needs real "
                    "floating-point parameters. Leave the layer out with layers=, or convert it."
                )


def some(names: Iterable[str], most: int = 6) -> str:
    """The first few names as a list in words, for messages."""
    names = list(names)
    shown = ", ".join(repr(name) for name in names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown or "nothing"


def factor_dtype(dtype: Any) -> jnp.dtype:
    """The dtype of factors and averages: float64 for float64 parameters, else float32."""
    return jnp.promote_types(dtype, jnp.float32)


def to_matrices(layer: Layer, leaves: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """A layer's kernel and bias as matrices, in the dtype of the factors.

    Returns:
        ``kernel``, [*blocks, d_in, d_out] without the row of the bias; ``bias``, [*blocks, 1,
        d_out], if there is one.
    """
    kernel = leaves[layer.kernel_path]
    dtype = factor_dtype(kernel.dtype)
    matrices = {"kernel": layer.kernel.to_matrix(kernel.astype(dtype))}
    if layer.bias is not None:
        matrices["bias"] = layer.bias.to_matrix(leaves[layer.bias_path].astype(dtype))
    return matrices


def to_matrix(layer: Layer, leaves: Mapping[str, jax.Array]) -> jax.Array:
    """A layer's kernel and bias (or their gradients) as one matrix, [*blocks, d_in, d_out].

    In the dtype of the factors; the bias is the last row.
    """
    matrices = list(to_matrices(layer, leaves).values())
    return jnp.concatenate(matrices, axis=-2) if len(matrices) > 1 else matrices[0]


def from_matrix(layer: Layer, matrix: jax.Array) -> dict[str, jax.Array]:
    """The inverse of `to_matrix`: kernel and bias by path, in the matrix's dtype."""
    if layer.bias is None:
        return from_matrices(layer, [matrix])
    return from_matrices(layer, [matrix[..., :-1, :], matrix[..., -1:, :]])


def from_matrices(layer: Layer, matrices: Sequence[jax.Array]) -> dict[str, jax.Array]:
    """The inverse of `to_matrices`, of its values: kernel and bias by path."""
    views = [layer.kernel] if layer.bias is None else [layer.kernel, layer.bias]
    return {
        path: view.from_matrix(matrix)
        for path, view, matrix in zip(layer.parameter_paths, views, matrices, strict=True)
    }
