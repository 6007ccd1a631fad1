"""Tag: how a layer's output carries statistics out of a pass; shared by linen and NNX.

`tag` is an identity on a layer's output. Its backward pass returns sums over the rows that went
through the layer as the "gradient" of some zeros that were handed in beside the output, so one
ordinary ``jax.value_and_grad`` with respect to those zeros collects them, however the layer is
called. Around it: what is known of a layer once it was seen, and what can be wrong with a loss.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kfqn_optax import layers as layers_lib
from kfqn_optax.layers import Layer
from kfqn_optax.statistics import Statistics, Sums, reduce, zero_sums

LossFn = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Seen:
    """A layer as it was met during discovery, one abstract evaluation of the loss.

    Attributes:
        layer: what it is.
        examples: the length of the first axis of its input, axes hidden by vmap counted.
        dtype: of its statistics.
        outer_shape: the kernel's shape in the tree of parameters.
        inner_shape: the kernel's shape inside the layer; another where layers are stacked.
    """

    layer: Layer
    examples: int
    dtype: jnp.dtype
    outer_shape: tuple[int, ...]
    inner_shape: tuple[int, ...]

    @property
    def stacked(self) -> bool:
        """Whether the parameters of several layers are stacked in one array."""
        return self.inner_shape != self.outer_shape


class Discovery:
    """Collects the layers that one abstract evaluation of a loss goes through.

    Args:
        kernels: the kernels in the tree of parameters, by layer path.
    """

    def __init__(self, kernels: dict[str, Any]):
        self._kernels = kernels
        self._seen: dict[str, Seen] = {}
        self._vmapped: dict[str, list[int]] = {}

    def see(self, path: str, kernel: jax.Array, bias: bool, output: jax.Array) -> jax.Array:
        """Notes a dense layer with its kernel as the layer sees it; returns the output."""
        if path not in self._seen:
            outer = self._kernels[path]
            self._seen[path] = Seen(
                layer=layers_lib.dense(path, kernel.shape, bias),
                examples=output.shape[0] if output.ndim > 1 else 1,
                dtype=layers_lib.factor_dtype(outer.dtype),
                outer_shape=outer.shape,
                inner_shape=kernel.shape,
            )
        return _watch_vmap(self._vmapped.setdefault(path, []), output, kernel)

    def result(self) -> tuple[Seen, ...]:
        """The layers in the order of the tree."""
        return tuple(
            dataclasses.replace(self._seen[path], examples=self._vmapped[path][-1])
            if self._vmapped[path]
            else self._seen[path]
            for path in self._kernels
            if path in self._seen
        )


def _watch_vmap(sizes: list[int], output: jax.Array, kernel: jax.Array) -> jax.Array:
    """The output; notes the sizes of the axes that vmap hides from the layer, outermost last.

    A layer under ``jax.vmap`` sees one example and cannot count them, but the batching rule of a
    ``custom_vmap`` can. An axis which the kernel has too is a stack of layers, not of examples.
    """

    @jax.custom_batching.custom_vmap
    def watch(output, kernel):
        return output

    @watch.def_vmap
    def rule(axis_size, in_batched, output, kernel):
        output_batched, kernel_batched = in_batched
        if output_batched and not kernel_batched:
            sizes.append(axis_size)
        return _watch_vmap(sizes, output, kernel), output_batched

    return watch(output, kernel)


def find(seen: tuple[Seen, ...]) -> tuple[Layer, ...]:
    """The layers, if K-BFGS supports them all.

    Raises:
        ValueError: for a layer whose parameters are stacked.
    """
    for s in seen:
        if s.stacked:
            raise ValueError(
                f"layer {s.layer.path!r} has stacked parameters: its kernel is {s.outer_shape} in "
                f"the tree and {s.inner_shape} in the layer, as nn.scan and nn.vmap with "
                "variable_axes={'params': axis} make it. K-BFGS does not support stacked layers "
                "yet; give these parameters to another optimizer with optax.partition, and K-BFGS "
                "sees the others."
            )
    return tuple(s.layer for s in seen)


def measure(
    loss_of_sums: Callable[[dict[str, dict[str, jax.Array]]], jax.Array],
    seen: tuple[Seen, ...],
    loss_fn: LossFn,
) -> Statistics:
    """One pass forward and backward, reduced to statistics.

    Args:
        loss_of_sums: the loss as a function of the zeros that `tag` is given, by layer path.
        seen: the layers.
        loss_fn: the user's function, for messages.
    """
    zeros = {s.layer.path: zero_sums(s.layer, s.dtype)._asdict() for s in seen}
    loss, sums = explain(lambda: jax.value_and_grad(loss_of_sums)(zeros), loss_fn)
    return Statistics(
        loss=loss,
        layers={
            s.layer.path: reduce(s.layer, Sums(**sums[s.layer.path]), s.examples) for s in seen
        },
    )


@jax.custom_vjp
def tag(output: jax.Array, inputs: jax.Array, sums: dict[str, jax.Array]) -> jax.Array:
    """The output of a dense layer, unchanged; its backward pass collects the layer's `Sums`.

    Args:
        output: [..., d_out].
        inputs: what the layer was given, [..., d_in without the bias].
        sums: zeros, the fields of `Sums`; their "gradient" are the sums over all rows.

    Returns:
        ``output``, to the last bit, forward and backward.
    """
    del inputs, sums
    return output


def _tag_forward(output, inputs, sums):
    return output, (inputs, sums["moment"])


def _tag_backward(residuals, cotangent):
    inputs, zeros = residuals
    dtype = zeros.dtype
    x = inputs.reshape(-1, inputs.shape[-1]).astype(dtype)
    g = cotangent.reshape(-1, cotangent.shape[-1])
    # A plain constant would not be summed over an axis that vmap hides; this depends on g.
    one_a_row = jnp.where(g[:, :1] == 0, 1, 1).astype(dtype)
    sums = {
        "moment": jnp.matmul(x.T, x, precision=jax.lax.Precision.HIGHEST),
        "inputs": jnp.sum(x, axis=0),
        "cotangents": jnp.sum(g.astype(dtype), axis=0),
        "rows": jnp.sum(one_a_row, axis=0),
    }
    return cotangent, None, sums


tag.defvjp(_tag_forward, _tag_backward)


def split_arrays(loss_fn: LossFn, args: tuple, kwargs: dict) -> tuple[Callable, list, Any]:
    """Splits the loss's arguments into arrays, which can be traced, and the rest, which cannot.

    Returns:
        ``call(params, arrays)``, the arrays, and a key that is equal for arguments which differ in
        arrays only. Flags, strings and the like stay what they are.
    """
    leaves, treedef = jax.tree.flatten((args, kwargs))
    kinds = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)
    is_array = [isinstance(leaf, kinds) for leaf in leaves]

    @functools.wraps(loss_fn, updated=())
    def call(params: Any, arrays: list) -> Any:
        rest = iter(arrays)
        merged = [next(rest) if a else leaf for a, leaf in zip(is_array, leaves, strict=True)]
        args, kwargs = jax.tree.unflatten(treedef, merged)
        return loss_fn(params, *args, **kwargs)

    static = tuple(None if a else leaf for a, leaf in zip(is_array, leaves, strict=True))
    return call, [x for a, x in zip(is_array, leaves, strict=True) if a], (treedef, static)


class _NotScalar(TypeError):
    """The loss did not return a scalar."""


def scalar(loss_fn: LossFn, result: Any) -> jax.Array:
    """The loss in what ``loss_fn`` returned: a scalar, or the first of a pair."""
    loss: Any = result[0] if isinstance(result, tuple) and len(result) == 2 else result
    if jax.tree.structure(loss) != jax.tree.structure(0) or jnp.shape(loss) != ():
        shapes = jax.tree.map(jnp.shape, loss)
        raise _NotScalar(
            f"{_name(loss_fn)} must return the mean loss of the batch, a scalar (or a pair of a "
            f"scalar and auxiliary output); it returned shape {shapes}. Take the mean over the "
            "examples."
        )
    return loss


def explain(
    run: Callable[[], Any], loss_fn: LossFn, plain: Callable[[], Any] | None = None, needs: str = ""
) -> Any:
    """Runs, and turns what can go wrong through our own doing into a sentence.

    Args:
        run: a pass with our additions to the parameters.
        loss_fn: for its name.
        plain: the same pass without them, to see whether they are to blame.
        needs: what the additions are.
    """
    try:
        return run()
    except _NotScalar:
        raise
    except Exception as error:
        message = str(error)
        if "custom_lin" in message or "forward-mode" in message:
            raise ValueError(
                f"{_name(loss_fn)} takes a forward-mode derivative (jax.jvp, jax.jacfwd, "
                "jax.linearize or jax.hessian) through a layer. The layers' cotangents cannot be "
                "collected through that: use reverse mode (jax.grad, jax.vjp) inside the loss, or "
                "give curvature_fn a loss without that term."
            ) from error
        if plain is None:
            raise
        plain()  # raises the user's own error, where that is what it is
        raise ValueError(
            f"{_name(loss_fn)} runs on the parameters but not with {needs}, which curvature_fn "
            f"needs: {type(error).__name__}: {message[:300]} Does it compare or combine the whole "
            "tree of parameters with another tree? Give curvature_fn the loss without that term "
            "(a penalty on the weights is not wanted there)."
        ) from error


def _name(fn: Callable) -> str:
    return getattr(fn, "__name__", None) or repr(fn)
