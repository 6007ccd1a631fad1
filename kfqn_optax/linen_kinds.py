"""Which Flax linen modules are layers, and what a call of one is.

A call counts if it runs the method that Flax wrote: a subclass that has its own ``__call__`` and
goes on to ``super().__call__`` is met inside, with the input that the kernel is multiplied with.
Layers made of layers (attention, recurrent cells) need nothing here: their parts are met.

Left out, although they have a kernel: ``nn.ConvLocal`` (its own weights at each pixel: a row of
outputs has no matrix in common with the next), ``nn.ConvTranspose``, and ``nn.Conv`` with a
``mask`` (what is convolved is kernel times mask, and a step for the one is none for the other).
"""

import inspect
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn

from kfqn_optax import calls
from kfqn_optax.calls import Call

Shape = tuple[int, ...]


def is_layer_call(module: nn.Module, method: Callable) -> bool:
    """Whether an interceptor has met the call of a layer.

    Args:
        module: ``context.module``.
        method: ``context.orig_method``.
    """
    return _reader(module, method) is not None


def describe(
    module: nn.Module, method: Callable, args: tuple, kwargs: dict[str, Any]
) -> tuple[Call | None, jax.Array]:
    """What a call for which `is_layer_call` holds is, and what the layer was given.

    Args:
        module: the layer, bound: its parameters are looked up.
        method: ``context.orig_method``.
        args: of the call.
        kwargs: of the call, by name.

    Returns:
        The `Call`, None if it cannot be read as a matrix times rows, and the input.
    """
    read = _reader(module, method)
    assert read is not None, method
    arguments = inspect.signature(method).bind(*args, **kwargs).arguments
    inputs, *rest = arguments.values()
    inputs = jnp.asarray(inputs)
    return read(module, inputs, *rest), inputs


def _dense(module: nn.Dense, inputs: jax.Array) -> Call | None:
    return calls.dense(inputs.ndim, *_shapes(module))


def _dense_general(module: nn.DenseGeneral, inputs: jax.Array) -> Call | None:
    return calls.dense_general(inputs.ndim, module.axis, module.batch_dims, *_shapes(module))


def _einsum(module: nn.Einsum, inputs: jax.Array, equation: str | None = None) -> Call | None:
    equation = equation or module.einsum_str
    assert equation is not None  # Flax has seen to it
    return calls.einsum(equation, inputs.shape, *_shapes(module))


def _conv(module: nn.Conv, inputs: jax.Array) -> Call | None:
    if module.mask is not None:
        return None
    return calls.conv(
        inputs.shape,
        *_shapes(module),
        strides=module.strides,
        padding=module.padding,
        input_dilation=module.input_dilation,
        kernel_dilation=module.kernel_dilation,
        groups=module.feature_group_count,
    )


def _lookup(module: nn.Embed, inputs: jax.Array) -> Call | None:
    del inputs
    return calls.lookup(_shape(module, "embedding"))


def _attend(module: nn.Embed, inputs: jax.Array) -> Call | None:
    return calls.attend(inputs.ndim, _shape(module, "embedding"))


# nn.Conv and nn.ConvLocal share a method, hence the class beside it.
_READERS: dict[Callable, tuple[type[nn.Module], Callable[..., Call | None]]] = {
    inspect.unwrap(nn.Dense.__call__): (nn.Dense, _dense),
    inspect.unwrap(nn.DenseGeneral.__call__): (nn.DenseGeneral, _dense_general),
    inspect.unwrap(nn.Einsum.__call__): (nn.Einsum, _einsum),
    inspect.unwrap(nn.Conv.__call__): (nn.Conv, _conv),
    inspect.unwrap(nn.Embed.__call__): (nn.Embed, _lookup),
    inspect.unwrap(nn.Embed.attend): (nn.Embed, _attend),
}


def _reader(module: nn.Module, method: Callable) -> Callable[..., Call | None] | None:
    """The function that describes such a call; None if it is not the call of a layer."""
    # An interceptor is given the method with the module as its first argument already.
    kind, read = _READERS.get(cast(Callable, getattr(method, "func", None)), (None, None))
    return read if kind is not None and isinstance(module, kind) else None


def _shapes(module: nn.Module) -> tuple[Shape, Shape | None]:
    """Shapes of kernel and bias."""
    bias = _shape(module, "bias") if module.has_variable("params", "bias") else None
    return _shape(module, "kernel"), bias


def _shape(module: nn.Module, name: str) -> Shape:
    return nn.meta.unbox(module.get_variable("params", name)).shape
