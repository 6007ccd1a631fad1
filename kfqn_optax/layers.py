"""Layers: what counts as one in a tree of parameters, and its parameters as one matrix.

A dense layer computes ``h = x @ kernel + bias`` on the last axis of x. With the bias, its input is
``a = [x, 1]`` and its parameters form one matrix [d_in, d_out]: the kernel with the bias as the
last row (the transpose of the paper's W). ``d_in`` counts the bias row.

Parameters are named by their path in the tree, joined with "/": ``params/Dense_0/kernel``; a layer
by the path of the dictionary that holds its kernel: ``params/Dense_0``.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Layer:
    """Static facts about one layer; hashable, never part of the state.

    Attributes:
        path: where its parameters are in the tree, e.g. ``params/encoder/Dense_0``.
        d_in: length of its input vector, the constant 1 of the bias included.
        d_out: length of its output vector.
        bias: whether it has a bias.
        kind: ``"dense"``, so far the only kind.
    """

    path: str
    d_in: int
    d_out: int
    bias: bool
    kind: str = "dense"

    @property
    def kernel_path(self) -> str:
        """Path of the kernel, [d_in - bias, d_out]."""
        return join(self.path, "kernel")

    @property
    def bias_path(self) -> str:
        """Path of the bias, [d_out]."""
        return join(self.path, "bias")

    @property
    def parameter_paths(self) -> tuple[str, ...]:
        """Paths of all its parameters."""
        return (self.kernel_path, self.bias_path) if self.bias else (self.kernel_path,)


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
    return Layer(path, kernel_shape[0] + bias, kernel_shape[1], bias)


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
        shapes = [(layer.d_in - layer.bias, layer.d_out), (layer.d_out,)]
        for name, shape in zip(layer.parameter_paths, shapes, strict=False):
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


def to_matrix(layer: Layer, leaves: Mapping[str, jax.Array]) -> jax.Array:
    """A layer's kernel and bias (or their gradients) as one matrix [d_in, d_out].

    In the dtype of the factors; the bias is the last row.
    """
    kernel = leaves[layer.kernel_path]
    dtype = factor_dtype(kernel.dtype)
    if not layer.bias:
        return kernel.astype(dtype)
    bias = leaves[layer.bias_path].astype(dtype)
    return jnp.concatenate([kernel.astype(dtype), bias[None]], axis=0)


def from_matrix(layer: Layer, matrix: jax.Array) -> dict[str, jax.Array]:
    """The inverse of `to_matrix`: kernel and bias by path, in the matrix's dtype."""
    if not layer.bias:
        return {layer.kernel_path: matrix}
    return {layer.kernel_path: matrix[:-1], layer.bias_path: matrix[-1]}
