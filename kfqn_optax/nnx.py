"""Capture for Flax NNX: the same statistics as `capture`, from an NNX model and its loss.

NNX has no interceptors. But a loss takes the model itself, so we hand it a copy: made from the
graph of the user's model, the parameters to measure at, and the rest of its state, with each layer
turned into a subclass that tags its output. The user's model, its batch statistics and its random
counters are never touched. The zeros that `tag.tag` needs are variables of the copy's layers, of a
subclass of ``nnx.Param``, so that ``nnx.jit``, ``nnx.scan``, ``nnx.vmap`` and ``nnx.remat`` treat
them as they do the kernels.
"""

import collections
import functools
import inspect
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from kfqn_optax import loss, nnx_kinds
from kfqn_optax.discovery import Discovery, Seen
from kfqn_optax.layers import Layer, fill_holes, join
from kfqn_optax.loss import LossFn
from kfqn_optax.statistics import CurvatureFn, Statistics
from kfqn_optax.tag import measure, tag

_PREFIX = "kfqn_optax_"  # of the attributes of a copy's layers
_DISCOVERY, _KIND, _FIELDS = _PREFIX + "discovery", _PREFIX + "kind", _PREFIX + "fields"
_discoveries = itertools.count()
_open: dict[int, Callable] = {}  # what discoveries under way do with a call, by number


class SumsParam(nnx.Param):
    """One field of a layer's entry (see `tag`), as a variable of the layer."""


def nnx_curvature_fn(
    loss_fn: LossFn, model: nnx.Module, /, *args: Any, **kwargs: Any
) -> CurvatureFn:
    """`curvature_fn` for a loss of an NNX model, ``loss_fn(model, *args, **kwargs)``.

    Args:
        loss_fn: the user's own: the mean loss of a batch (a scalar, or a pair of a scalar and
            anything else). It may change the model's state; the changes are dropped here.
        model: the model as it is before the step.
        *args: whatever else the loss takes; of NNX objects among them (other models, an
            ``nnx.Rngs``) it gets copies, as they are now.
        **kwargs: the same, by name.

    Returns:
        A function from the model's parameters (``nnx.state(model, nnx.Param)``, of variables or of
        bare arrays, as an Optax transformation gets them from ``nnx.Optimizer``) to `Statistics`,
        with the keyword arguments ``moments`` and ``vectors`` of `curvature_fn`'s.

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
    seen = _discover(loss_fn, model, args, kwargs)
    kinds = {s.layer.path: s.layer.kind for s in seen}
    graph, full, rest = nnx.split(model, nnx.Param, ...)
    arguments = _frozen((args, kwargs))

    def measure_at(params: Any, /, **asked: Any) -> Statistics:
        def run(entries: dict[str, dict[str, jax.Array]], params: Any) -> jax.Array:
            copy = nnx.merge(graph, fill_holes(full, params), rest, copy=True)
            for path, layer in _layers(copy).items():
                if path in entries:
                    for name, array in entries[path].items():
                        setattr(layer, _PREFIX + name, SumsParam(array))
                    setattr(layer, _FIELDS, tuple(entries[path]))
                    setattr(layer, _KIND, kinds[path])
                    layer.__class__ = _tagging(type(layer))
            args, kwargs = arguments()
            return loss.scalar(loss_fn, loss_fn(copy, *args, **kwargs))

        return measure(run, seen, loss_fn, params, **asked)

    return measure_at


def find_nnx_layers(
    loss_fn: LossFn, model: nnx.Module, /, *args: Any, **kwargs: Any
) -> tuple[Layer, ...]:
    """`find_layers` for a loss of an NNX model.

    Args:
        loss_fn: as in `nnx_curvature_fn`.
        model: the model.
        *args: the rest of the loss's arguments; ``jax.ShapeDtypeStruct`` will do for arrays.
        **kwargs: the same, by name.

    Returns:
        One `Layer` for each ``nnx.Linear``, ``nnx.Conv``, ``nnx.LinearGeneral``, ``nnx.Einsum`` and
        ``nnx.Embed`` that the loss calls, except those that share a parameter with another layer
        (``b.kernel = a.kernel``; one module used twice is a layer).

    Raises:
        TypeError: if the loss does not return a scalar, or ``model`` is not an NNX module.
    """
    return tuple(s.layer for s in _discover(loss_fn, model, args, kwargs))


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


def _frozen(arguments: Any) -> Callable[[], Any]:
    """A function that returns the arguments, each time with new copies of the NNX objects in them.

    A loss may change those objects, which JAX allows for objects made in the same trace only.
    """

    def is_object(node: Any) -> bool:
        return isinstance(node, nnx.Pytree)

    leaves, treedef = jax.tree.flatten(arguments, is_leaf=is_object)
    parts: list[Any] = [nnx.split(leaf) if is_object(leaf) else None for leaf in leaves]

    def thaw() -> Any:
        copies = [
            leaf if part is None else nnx.merge(*part, copy=True)
            for leaf, part in zip(leaves, parts, strict=True)
        ]
        return jax.tree.unflatten(treedef, copies)

    return thaw


def _discover(loss_fn: LossFn, model: nnx.Module, args: tuple, kwargs: dict) -> tuple[Seen, ...]:
    if not is_model(model):
        raise TypeError(
            f"nnx_curvature_fn needs an NNX module, got {type(model).__name__}; for a linen model "
            "and its parameters use kfqn_optax.curvature_fn."
        )
    layers = _layers(model)
    discovery = Discovery({path: _parameters_of(layer) for path, layer in layers.items()})
    rebuild, state = open_model(model)
    call, arrays, _ = loss.split_arrays(loss_fn, args, kwargs)

    def evaluate(see: Callable, extra: Mapping[str, Mapping[str, jax.Array]]) -> Any:
        number = next(_discoveries)

        def run(state: Any, arrays: list) -> jax.Array:
            copy = rebuild(state)
            for path, layer in _layers(copy).items():
                # Static, so that the graph is new to every inner jit.
                setattr(layer, _DISCOVERY, (number, path))
                for name, array in extra.get(path, {}).items():
                    setattr(layer, _PREFIX + name, SumsParam(array))
                layer.__class__ = _tagging(type(layer))
            return loss.scalar(loss_fn, call(copy, arrays))

        _open[number] = see
        try:
            return jax.eval_shape(run, state, arrays)
        finally:
            del _open[number]

    loss.explain(lambda: evaluate(discovery.see, {}), loss_fn)
    return discovery.result(evaluate)


def _layers(model: nnx.Module) -> dict[str, nnx.Module]:
    """The layers of a model by path.

    Not those whose kernel a wrapper replaces in the call, nor those that have a parameter in common
    with another layer, which has one gradient for both.
    """
    modules = [(join(*map(str, path)), module) for path, module in nnx.iter_modules(model)]
    wrappers = [p for p, m in modules if isinstance(m, (nnx.WeightNorm, nnx.SpectralNorm))]
    layers = {
        path: module
        for path, module in modules
        if nnx_kinds.is_layer(module)
        and not any(path.startswith(f"{w}/" if w else "") for w in wrappers)
    }
    users = collections.Counter(v for layer in layers.values() for v in _identities(layer))
    return {
        path: layer
        for path, layer in layers.items()
        if all(users[v] == 1 for v in _identities(layer))
    }


def _identities(layer: nnx.Module) -> list[int]:
    """What tells a layer's own parameters from those of others."""
    return [id(v) for v in vars(layer).values() if isinstance(v, nnx.Param)]


def _parameters_of(layer: nnx.Module) -> dict[str, Any]:
    """The arrays of a layer's own parameters by name."""
    return {
        name: variable.get_value()
        for name, variable in vars(layer).items()
        if isinstance(variable, nnx.Param)
    }


@functools.cache
def _tagging(kind: type[nnx.Module]) -> type[nnx.Module]:
    """A subclass of a layer that shows its calls to a discovery or to `tag.tag`."""

    def shown(method: str) -> Callable:
        original = getattr(kind, method)

        _, first, *_ = inspect.signature(original).parameters  # self, inputs

        @functools.wraps(original)
        def run(self, *args: Any, **kwargs: Any) -> jax.Array:
            inputs, *rest = args or (kwargs.pop(first),)
            output = original(self, inputs, *rest, **kwargs)
            own = _parameters_of(self)
            call = nnx_kinds.describe(self, method, inputs, tuple(rest), kwargs)
            if hasattr(self, _DISCOVERY):
                number, path = getattr(self, _DISCOVERY)
                kernel = own[call.kernel_name] if call else None
                return _open[number](path, call, inputs, output, kernel)
            if call is None or getattr(self, _KIND) != call.kind:
                return output  # a lookup of an embedding that is also an output layer
            entry = {name: own[_PREFIX + name] for name in getattr(self, _FIELDS)}
            return tag(call.geometry, output, inputs, entry)

        return run

    return type(kind.__name__, (kind,), {name: shown(name) for name in nnx_kinds.methods(kind)})
