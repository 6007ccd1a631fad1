"""Capture for Flax linen: one pass of the user's loss, seen layer by layer.

Neither model nor loss is changed. Next to each kernel in the parameter tree we put an entry of
zeros, the layer's `Sums`. Flax's lifted transforms slice and carry it exactly as they do the
kernel. An interceptor reads it through the module's own scope and passes the layer's output through
`tag.tag`, whose backward pass returns the sums as the "gradient" of those zeros. Sums over calls,
positions, scanned and vmapped examples come out by themselves; nothing leaks out of a trace, and
jit caches cannot go stale, because the tree has a new structure.

Under one ``jit``, XLA merges this pass with the user's own gradient pass over the same batch, and
drops what nobody reads (the second moments at the probe).
"""

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from kfqn_optax import layers as layers_lib
from kfqn_optax import tag
from kfqn_optax.layers import Layer
from kfqn_optax.statistics import Statistics
from kfqn_optax.tag import LossFn, Seen

ENTRY = "kfqn_optax_sums"  # name of the extra entry next to a kernel
_discoveries = itertools.count()
_DENSE_CALL = inspect.unwrap(nn.Dense.__call__)


def curvature_fn(
    loss_fn: LossFn, params: Any, /, *args: Any, **kwargs: Any
) -> Callable[[Any], Statistics]:
    """The curvature of a loss on a batch, as the extra argument of a K-BFGS update.

    The arguments mirror those of ``jax.value_and_grad(loss_fn)(params, *args, **kwargs)``. The
    batch need not be the one that the gradient was taken on: fewer examples make it cheaper.

    Args:
        loss_fn: ``loss_fn(params, *args, **kwargs)``, the user's own, unchanged: the mean loss of a
            batch (a scalar, or a pair of a scalar and anything else), with linen's ``model.apply``
            anywhere inside. Examples are counted along the first axis of what a layer is given.
        params: all the parameters, in any nesting of dictionaries and other containers.
        *args: whatever else the loss takes: the batch, random keys, other collections.
        **kwargs: the same, by name.

    Returns:
        A function ``params -> Statistics`` which measures at any parameters of the same structure.
        Holes that ``optax.masked`` or ``optax.partition`` left in its argument are filled from
        ``params``. It is a pytree (a ``jax.tree_util.Partial``) and may be an argument of a jitted
        function.

    Raises:
        TypeError: if the loss does not return a scalar.
        ValueError: if the loss cannot run with an extra entry next to each kernel.

    Examples:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, kfqn_optax
        >>> model = nn.Dense(2)
        >>> x = jnp.ones((8, 3))
        >>> params = model.init(jax.random.key(0), x)
        >>> def loss_fn(params, x):
        ...     return jnp.mean(jnp.sum(model.apply(params, x) ** 2, axis=-1))
        >>> statistics = kfqn_optax.curvature_fn(loss_fn, params, x)(params)
        >>> statistics.layers["params"].input_moment.shape
        (4, 4)
    """
    seen = tuple(s for s in _discover(loss_fn, params, args, kwargs) if not s.stacked)
    return jax.tree_util.Partial(_Measure(loss_fn, seen), params, args, kwargs)


def find_layers(loss_fn: LossFn, params: Any, /, *args: Any, **kwargs: Any) -> tuple[Layer, ...]:
    """The layers that K-BFGS can precondition, found by running the loss on shapes alone.

    Args:
        loss_fn: as in `curvature_fn`.
        params: all the parameters.
        *args: the rest of the loss's arguments; ``jax.ShapeDtypeStruct`` will do for arrays.
        **kwargs: the same, by name.

    Returns:
        One `Layer` for each ``nn.Dense`` whose parameters are in ``params``, in the order of the
        tree. For ``kbfgs(..., layers=...)``.

    Raises:
        TypeError: if the loss does not return a scalar.
        ValueError: for a layer whose parameters are stacked by ``nn.scan`` or ``nn.vmap``, which is
            not supported yet.
    """
    return tag.find(_discover(loss_fn, params, args, kwargs))


# --- discovery: one abstract evaluation ---------------------------------------------------------


def _discover(loss_fn: LossFn, params: Any, args: tuple, kwargs: dict) -> tuple[Seen, ...]:
    """Finds the dense layers of a loss by abstract evaluation.

    ``module.path`` does not tell where a module's parameters are in the user's tree. So the extra
    entry of each candidate is a dictionary whose one key is that path, for the interceptor to read.
    The key is made unique to this discovery, so that no cached trace of an inner ``jit``, ``scan``
    or ``remat``, ours of before included, can hide a layer.
    """
    token = f"#{next(_discoveries)}"
    kernels = {path: module["kernel"] for path, module in _modules_with_kernel(params)}
    candidates = {path: {ENTRY: {path + token: kernel}} for path, kernel in kernels.items()}
    discovery = tag.Discovery({path: nn.meta.unbox(kernel) for path, kernel in kernels.items()})

    def see(module: nn.Module, inputs: jax.Array, output: jax.Array) -> jax.Array:
        (key,) = module.get_variable("params", ENTRY)
        kernel = nn.meta.unbox(module.get_variable("params", "kernel"))
        bias = module.has_variable("params", "bias")
        return discovery.see(key.removesuffix(token), kernel, bias, output)

    call, arrays, _ = tag.split_arrays(loss_fn, args, kwargs)

    def run(params: Any, arrays: list) -> jax.Array:
        with nn.intercept_methods(_interceptor(see)):
            return tag.scalar(loss_fn, call(_insert(params, candidates), arrays))

    tag.explain(
        lambda: jax.eval_shape(run, params, arrays),
        loss_fn,
        plain=lambda: jax.eval_shape(call, params, arrays),
        needs=f"an extra entry {ENTRY!r} next to each kernel",
    )
    return discovery.result()


# --- measuring: one pass forward and backward ---------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Measure:
    """One pass; compares by what it does, so that a new one does not compile a step again."""

    loss_fn: LossFn
    seen: tuple[Seen, ...]

    def __call__(self, full: Any, args: tuple, kwargs: dict, params: Any) -> Statistics:
        """The statistics at ``params``; ``full`` fills the holes in it."""
        params = _fill_holes(full, params)

        def see(module: nn.Module, inputs: jax.Array, output: jax.Array) -> jax.Array:
            return tag.tag(output, inputs, module.get_variable("params", ENTRY))

        def run(sums: dict[str, dict[str, jax.Array]]) -> jax.Array:
            entries = {path: {ENTRY: of_layer} for path, of_layer in sums.items()}
            with nn.intercept_methods(_interceptor(see)):
                loss = self.loss_fn(_insert(params, entries), *args, **kwargs)
            return tag.scalar(self.loss_fn, loss)

        return tag.measure(run, self.seen, self.loss_fn)


# --- shared -------------------------------------------------------------------------------------


def _interceptor(see: Callable[[nn.Module, jax.Array, jax.Array], jax.Array]) -> Callable:
    """A linen interceptor that passes the output of each layer with an extra entry to ``see``.

    Only the call of ``nn.Dense`` itself counts: in a subclass that wraps it, the inner call. Layers
    inside ``nn.WeightNorm`` and ``nn.SpectralNorm`` are passed over: the kernel they multiply with
    is not the parameter.
    """
    inside: list[type] = []

    def intercept(next_fun, args, kwargs, context):
        module = context.module
        inside.append(type(module))
        try:
            output = next_fun(*args, **kwargs)
        finally:
            inside.pop()
        if (
            getattr(context.orig_method, "func", None) is _DENSE_CALL
            and not any(issubclass(t, (nn.WeightNorm, nn.SpectralNorm)) for t in inside)
            and module.has_variable("params", ENTRY)
        ):
            inputs = args[0] if args else kwargs["inputs"]
            return see(module, jnp.asarray(inputs), output)
        return output

    return intercept


def _modules_with_kernel(tree: Any) -> list[tuple[str, Mapping[str, Any]]]:
    """Path and contents of every dictionary that holds a ``kernel``, in the order of the tree."""
    found = []

    def visit(node: Mapping[str, Any], path: str) -> Mapping[str, Any]:
        if "kernel" in node and not isinstance(node["kernel"], Mapping):
            found.append((path, node))
        return node

    _map_dictionaries(visit, tree)
    return found


def _insert(tree: Any, entries: Mapping[str, Mapping[str, Any]]) -> Any:
    """A copy of the tree with more entries in some of its dictionaries, given by path."""
    return _map_dictionaries(
        lambda node, path: (
            _dictionary(node, {**node, **entries[path]}) if path in entries else node
        ),
        tree,
    )


def _map_dictionaries(fn: Callable[[Any, str], Any], tree: Any, path: str = "") -> Any:
    """Applies ``fn(dictionary, path)`` to every dictionary of a tree, from the leaves up."""
    if isinstance(tree, Mapping):
        children = {
            key: _map_dictionaries(fn, child, layers_lib.join(path, str(key)))
            for key, child in tree.items()
        }
        return fn(_dictionary(tree, children), path)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: isinstance(node, Mapping)
    )
    mapped = [
        _map_dictionaries(fn, leaf, layers_lib.join(path, layers_lib.path_name(keys)))
        if isinstance(leaf, Mapping)
        else leaf
        for keys, leaf in leaves
    ]
    return jax.tree_util.tree_unflatten(treedef, mapped)


def _fill_holes(full: Any, given: Any) -> Any:
    """``given`` with every hole (a node without leaves, where ``full`` has a leaf) filled."""

    def fill(leaf: Any, given: Any) -> Any:
        return given if jax.tree.leaves(given) else leaf

    try:
        return jax.tree.map(fill, full, given)
    except ValueError as error:
        names, others = layers_lib.named_leaves(full), layers_lib.named_leaves(given)
        here = layers_lib.some(sorted(others.keys() - names.keys()))
        there = layers_lib.some(sorted(names.keys() - others.keys()))
        raise ValueError(
            "the parameters given to the update differ in structure from those given to "
            f"curvature_fn; only in the update: {here}; only in curvature_fn: {there}. Pass both "
            "the same parameters."
        ) from error


def _dictionary(like: Mapping[str, Any], items: dict[str, Any]) -> Mapping[str, Any]:
    """A dictionary of the same type as another: ``dict``, ``FrozenDict``, or the like."""
    kind: Any = type(like)
    return kind(items)
