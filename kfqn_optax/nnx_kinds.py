"""Which Flax NNX modules are layers, and what a call of one is; the same `Call` as in linen.

A method counts if it is the one that Flax wrote. A subclass with its own ``__call__`` (a
``nnx.LoRALinear``, for one) is not a layer: what it is given need not be what the kernel is
multiplied with. Left out besides are ``nnx.ConvTranspose`` and calls of a ``nnx.Conv`` with a
``mask``; `linen_kinds` says why.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kfqn_optax import calls
from kfqn_optax.calls import Call

Shape = tuple[int, ...]


def is_layer(module: nnx.Module) -> bool:
    """Whether a module is a layer: at least one of its methods counts."""
    return bool(methods(type(module)))


def methods(kind: type[nnx.Module]) -> tuple[str, ...]:
    """Names of the methods of a class whose calls `describe` can tell about."""
    return tuple(
        name
        for flax_class, readers in _READERS.items()
        if issubclass(kind, flax_class)
        for name in readers
        if getattr(kind, name) is getattr(flax_class, name)
    )


def describe(
    module: nnx.Module,
    method: str,
    inputs: jax.Array,
    args: tuple,
    kwargs: dict[str, Any],
) -> Call | None:
    """What a call of a layer is.

    Args:
        module: the layer.
        method: the method's name, one of `methods`.
        inputs: what it was given.
        args: the arguments after the inputs.
        kwargs: arguments by name.

    Returns:
        The `Call`; None if it cannot be read as a matrix times rows.
    """
    (read,) = (
        readers[method]
        for flax_class, readers in _READERS.items()
        if isinstance(module, flax_class)
    )
    return read(module, jnp.shape(inputs), *args, **kwargs)


def _linear(module: nnx.Linear, shape: Shape, out_sharding: Any = None) -> Call | None:
    return calls.dense(len(shape), *_shapes(module))


def _linear_general(
    module: nnx.LinearGeneral, shape: Shape, out_sharding: Any = None
) -> Call | None:
    batch_axis = tuple(module.batch_axis)
    return calls.dense_general(len(shape), module.axis, batch_axis, *_shapes(module))


def _einsum(
    module: nnx.Einsum, shape: Shape, einsum_str: str | None = None, out_sharding: Any = None
) -> Call | None:
    return calls.einsum(einsum_str or module.einsum_str, shape, *_shapes(module))


def _conv(module: nnx.Conv, shape: Shape, out_sharding: Any = None) -> Call | None:
    if module.mask is not None:
        return None
    return calls.conv(
        shape,
        *_shapes(module),
        strides=module.strides,
        padding=module.padding,
        input_dilation=module.input_dilation,
        kernel_dilation=module.kernel_dilation,
        groups=module.feature_group_count,
    )


def _lookup(module: nnx.Embed, shape: Shape, out_sharding: Any = None) -> Call | None:
    return calls.lookup(module.embedding[...].shape)


def _attend(module: nnx.Embed, shape: Shape, out_sharding: Any = None) -> Call | None:
    return calls.attend(len(shape), module.embedding[...].shape)


_READERS: Mapping[type[nnx.Module], Mapping[str, Callable[..., Call | None]]] = {
    nnx.Linear: {"__call__": _linear},
    nnx.LinearGeneral: {"__call__": _linear_general},
    nnx.Einsum: {"__call__": _einsum},
    nnx.Conv: {"__call__": _conv},
    nnx.Embed: {"__call__": _lookup, "attend": _attend},
}


def _shapes(module: Any) -> tuple[Shape, Shape | None]:
    """Shapes of kernel and bias."""
    bias = None if module.bias is None else module.bias[...].shape
    return module.kernel[...].shape, bias
