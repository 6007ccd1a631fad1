"""Capture for Flax NNX: the same statistics as `capture`, from an NNX model and its loss.

NNX has no interceptors. But a loss takes the model itself, so we hand it a copy: made from the
graph of the user's model, the parameters to measure at, and the rest of its state, with each
``nnx.Linear`` turned into a subclass that tags its output. The user's model, its batch statistics
and its random counters are never touched. The zeros that `tag.tag` needs are variables of the
copy's layers, of a subclass of ``nnx.Param``, so that ``nnx.jit``, ``nnx.scan``, ``nnx.vmap`` and
``nnx.remat`` treat them as they do the kernels.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from kfqn_optax import tag
from kfqn_optax.layers import Layer, join
from kfqn_optax.statistics import Statistics, Sums
from kfqn_optax.tag import LossFn, Seen

_PREFIX = "kfqn_optax_"  # of the attributes of a copy's layers
_DISCOVERY = _PREFIX + "discovery"
_discoveries = itertools.count()
_open: dict[int, tag.Discovery] = {}  # discoveries under way, by number


class SumsParam(nnx.Param):
    """One field of a layer's `Sums`, as a variable of the layer."""


def nnx_curvature_fn(
    loss_fn: LossFn, model: nnx.Module, /, *args: Any, **kwargs: Any
) -> Callable[[Any], Statistics]:
    """`curvature_fn` for a loss of an NNX model, ``loss_fn(model, *args, **kwargs)``.

    Args:
        loss_fn: the user's own: the mean loss of a batch (a scalar, or a pair of a scalar and
            anything else). It may change the model's state; the changes are dropped here.
        model: the model as it is before the step.
        *args: whatever else the loss takes.
        **kwargs: the same, by name.

    Returns:
        A function from the model's parameters (``nnx.state(model, nnx.Param)``, of variables or of
        bare arrays, as an Optax transformation gets them from ``nnx.Optimizer``) to `Statistics`.

    Raises:
        TypeError: if the loss does not return a scalar, or ``model`` is not an NNX module.

    Examples:
        >>> from flax import nnx; import jax, jax.numpy as jnp, kfqn_optax as kfqn
        >>> model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        >>> optimizer = nnx.Optimizer(model, kfqn.kbfgs(0.1), wrt=nnx.Param)
        >>> def loss_fn(model, x):
        ...     return jnp.mean(jnp.sum(model(x) ** 2, axis=-1))
        >>> @nnx.jit
        ... def step(model, optimizer, x):
        ...     curvature_fn = kfqn.nnx_curvature_fn(loss_fn, model, x)
        ...     grads = nnx.grad(loss_fn)(model, x)
        ...     optimizer.update(model, grads, curvature_fn=curvature_fn)
        >>> x = jnp.ones((4, 3))
        >>> before = loss_fn(model, x)
        >>> for _ in range(3):
        ...     step(model, optimizer, x)
        >>> bool(loss_fn(model, x) < before)
        True
    """
    seen = tuple(s for s in _discover(loss_fn, model, args, kwargs) if not s.stacked)
    graph, _, rest = nnx.split(model, nnx.Param, ...)

    def measure(params: Any) -> Statistics:
        def run(sums: dict[str, dict[str, jax.Array]]) -> jax.Array:
            copy = nnx.merge(graph, _variables(params), rest, copy=True)
            for path, layer in _linear_layers(copy).items():
                if path in sums:
                    for name, zeros in sums[path].items():
                        setattr(layer, _PREFIX + name, SumsParam(zeros))
                    layer.__class__ = _tagging(type(layer))
            return tag.scalar(loss_fn, loss_fn(copy, *args, **kwargs))

        return tag.measure(run, seen, loss_fn)

    return measure


def find_nnx_layers(
    loss_fn: LossFn, model: nnx.Module, /, *args: Any, **kwargs: Any
) -> tuple[Layer, ...]:
    """`find_layers` for a loss of an NNX model: one `Layer` for each ``nnx.Linear`` it calls."""
    return tag.find(_discover(loss_fn, model, args, kwargs))


def is_model(params: Any) -> bool:
    """Whether what stands for the parameters is an NNX model."""
    return isinstance(params, nnx.Module)


def open_model(model: nnx.Module) -> tuple[Callable[[Any], nnx.Module], Any]:
    """A function from a tree of arrays to the model, and that tree."""
    graph, state = nnx.split(model)
    return lambda state: nnx.merge(graph, state, copy=True), state


def parameters(model: nnx.Module) -> Any:
    """The model's parameters, as `nnx_curvature_fn`'s function takes them."""
    return nnx.state(model, nnx.Param)


def _discover(loss_fn: LossFn, model: nnx.Module, args: tuple, kwargs: dict) -> tuple[Seen, ...]:
    if not is_model(model):
        raise TypeError(
            f"nnx_curvature_fn needs an NNX module, got {type(model).__name__}; for a linen model "
            "and its parameters use kfqn_optax.curvature_fn."
        )
    number = next(_discoveries)
    layers = _linear_layers(model)
    discovery = tag.Discovery({path: layer.kernel[...] for path, layer in layers.items()})
    rebuild, state = open_model(model)
    call, arrays, _ = tag.split_arrays(loss_fn, args, kwargs)

    def run(state: Any, arrays: list) -> jax.Array:
        copy = rebuild(state)
        for path, layer in _linear_layers(copy).items():
            # Static, so that the graph is new to every inner jit.
            setattr(layer, _DISCOVERY, (number, path))
            layer.__class__ = _tagging(type(layer))
        return tag.scalar(loss_fn, call(copy, arrays))

    _open[number] = discovery
    try:
        tag.explain(lambda: jax.eval_shape(run, state, arrays), loss_fn)
    finally:
        del _open[number]
    return discovery.result()


def _linear_layers(model: nnx.Module) -> dict[str, nnx.Linear]:
    """The ``nnx.Linear`` modules of a model by path; not subclasses with their own call."""
    return {
        join(*map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, nnx.Linear) and type(module).__call__ is nnx.Linear.__call__
    }


@functools.cache
def _tagging(kind: type[nnx.Linear]) -> type[nnx.Linear]:
    """A subclass of a linear layer that shows its output to a discovery or to `tag.tag`."""

    class Tagging(kind):
        def __call__(self, inputs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
            output = super().__call__(inputs, *args, **kwargs)
            if hasattr(self, _DISCOVERY):
                number, path = getattr(self, _DISCOVERY)
                bias = self.bias is not None
                return _open[number].see(path, self.kernel[...], bias, output)
            sums = {name: getattr(self, _PREFIX + name)[...] for name in Sums._fields}
            return tag.tag(output, inputs, sums)

    Tagging.__name__ = Tagging.__qualname__ = kind.__name__
    return Tagging


def _variables(params: Any) -> Any:
    """Parameters as NNX variables, whether they come as variables or as bare arrays."""
    return jax.tree.map(
        lambda leaf: leaf if isinstance(leaf, nnx.Variable) else nnx.Param(leaf),
        params,
        is_leaf=lambda node: isinstance(node, nnx.Variable),
    )
