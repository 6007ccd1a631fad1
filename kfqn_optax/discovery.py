"""Discovery: which layers a loss goes through, seen in one abstract evaluation of it."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kfqn_optax import layers as layers_lib
from kfqn_optax.calls import Call
from kfqn_optax.geometry import Lookup
from kfqn_optax.layers import Layer
from kfqn_optax.matrix import MatrixView


@dataclasses.dataclass(frozen=True)
class Seen:
    """A layer as it was met.

    Attributes:
        layer: what it is.
        examples: the length of the first axis of its input, axes hidden by vmap counted.
        hidden: whether there are such axes.
        dtype: of its statistics.
        kernel: its kernel as the layer itself sees it, without the axes of a stack.
        stack: the axes of the kernel in the tree of parameters along which layers are stacked.
    """

    layer: Layer
    examples: int
    hidden: bool
    dtype: Any
    kernel: MatrixView
    stack: tuple[int, ...]


@dataclasses.dataclass
class _Met:
    """What the first call of a layer showed."""

    call: Call
    examples: int
    vmapped: list[int]


class Discovery:
    """Collects the layers that one abstract evaluation of a loss goes through.

    Args:
        parameters: by path of the dictionary that holds them, the kernels and biases in the tree:
            ``{path: {name: array}}``.
    """

    def __init__(self, parameters: Mapping[str, Mapping[str, Any]]):
        self._parameters = parameters
        self._met: dict[str, _Met] = {}
        self._refused: set[str] = set()

    def see(
        self,
        path: str,
        call: Call | None,
        inputs: jax.Array,
        output: jax.Array,
        kernel: jax.Array | None,
    ) -> jax.Array:
        """Notes a call of a layer; returns the output.

        An embedding that serves both as a table and as an output layer counts as the latter: its
        ``attend`` replaces its lookups. A kernel with a call that cannot be read as a matrix times
        rows, or that two calls read as different matrices, is no layer.
        """
        met = self._met.get(path)
        if call is None or (met and met.call.kind == call.kind and met.call.kernel != call.kernel):
            self._refused.add(path)
            return output
        if met is None or (isinstance(met.call.geometry, Lookup) and call.kind != met.call.kind):
            met = self._met[path] = _Met(call, call.geometry.examples(inputs), [])
        if call.kind == met.call.kind and kernel is not None:
            return _watch_vmap(met.vmapped, output, kernel)
        return output

    def result(self, evaluate: Callable[[Callable, dict[str, dict]], Any]) -> tuple[Seen, ...]:
        """The layers in the order of the tree.

        Args:
            evaluate: ``evaluate(see, extra)`` evaluates the loss again, with more arrays by name
                next to the kernels of some layers, given by path, and raises if it cannot; needed
                where the place of a stack's axis cannot be told from shapes.
        """
        settled = (
            self._settle(path, self._met[path], evaluate)
            for path in self._parameters
            if path in self._met and path not in self._refused
        )
        return tuple(seen for seen in settled if seen is not None)

    def _settle(self, path: str, met: _Met, evaluate: Callable) -> Seen | None:
        """The layer of a path; None if its parameters are not those that its call was given."""
        outer, call = self._parameters[path], met.call
        kernel, bias = outer[call.kernel_name], outer.get(call.bias_name)
        inner = {call.kernel_name: call.kernel.shape}
        shapes = {call.kernel_name: kernel.shape}
        if call.bias is not None and bias is not None:
            inner[call.bias_name], shapes[call.bias_name] = call.bias.shape, bias.shape

        def traces(dummies: dict[str, tuple[int, ...]]) -> bool:
            zeros = {name: jnp.zeros(shape) for name, shape in dummies.items()}
            try:
                evaluate(lambda path, call, inputs, output, kernel: output, {path: zeros})
            except Exception:  # whatever Flax or JAX says when a slice does not fit
                return False
            return True

        axes = _stack_axes(inner, shapes, traces)
        if axes is None:
            return None
        stack = axes[call.kernel_name]

        def view(name: str, of_one: MatrixView) -> MatrixView:
            return of_one.stacked(axes[name], tuple(shapes[name][axis] for axis in axes[name]))

        layer = Layer(
            path,
            kind=call.kind,
            kernel=view(call.kernel_name, call.kernel),
            bias=None if call.bias is None else view(call.bias_name, call.bias),
            kernel_name=call.kernel_name,
            bias_name=call.bias_name,
            lookup=isinstance(call.geometry, Lookup),
        )
        return Seen(
            layer,
            examples=met.vmapped[-1] if met.vmapped else met.examples,
            hidden=bool(met.vmapped),
            dtype=layers_lib.factor_dtype(kernel.dtype),
            kernel=call.kernel,
            stack=stack,
        )


def _stack_axes(
    inner: Mapping[str, tuple[int, ...]],
    outer: Mapping[str, tuple[int, ...]],
    traces: Callable[[dict[str, tuple[int, ...]]], bool],
) -> dict[str, tuple[int, ...]] | None:
    """The axes of each parameter along which layers are stacked; None if no choice fits.

    Args:
        inner: shapes inside the layer, by name.
        outer: shapes in the tree; longer where layers are stacked.
        traces: whether the loss can be evaluated with arrays of these shapes next to the kernel.
    """
    names = list(inner)
    choices = list(itertools.product(*(_insertions(inner[n], outer[n]) for n in names)))
    if len(choices) == 1:
        return dict(zip(names, choices[0], strict=True))
    # Shapes do not tell: a stack as long as one of the layer's own axes. Arrays that have the
    # stack's length along the axes in question and 1 elsewhere can be sliced there only.
    for choice in choices:
        dummies = {
            name: tuple(size if i in axes else 1 for i, size in enumerate(outer[name]))
            for name, axes in zip(names, choice, strict=True)
        }
        if traces(dummies):
            return dict(zip(names, choice, strict=True))
    return None


def _insertions(inner: tuple[int, ...], outer: tuple[int, ...]) -> list[tuple[int, ...]]:
    """All sets of axes of ``outer`` without which it is ``inner``."""
    return [
        axes
        for axes in itertools.combinations(range(len(outer)), len(outer) - len(inner))
        if tuple(size for i, size in enumerate(outer) if i not in axes) == tuple(inner)
    ]


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
