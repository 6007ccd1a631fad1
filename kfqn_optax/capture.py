"""Capture for Flax linen: one pass of the user's loss, seen layer by layer.

Neither model nor loss is changed. Next to each kernel in the parameter tree we put an entry of
zeros, for sums over the layer's rows. Flax's lifted transforms slice and carry it exactly as they
do the kernel. An interceptor reads it through the module's own scope and passes the layer's output
through `tag.tag`, whose backward pass returns the sums as the "gradient" of those zeros. Sums over
calls, positions, scanned and vmapped examples come out by themselves; nothing leaks out of a trace,
and jit caches cannot go stale, because the tree has a new structure.

Under one ``jit``, XLA merges this pass with the user's own gradient pass over the same batch, and
drops what nobody reads (the second moments at the probe).
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import linen as nn

from kfqn_optax import layers as layers_lib
from kfqn_optax import linen_kinds, loss
from kfqn_optax.calls import Call
from kfqn_optax.discovery import Discovery, Seen
from kfqn_optax.layers import Layer
from kfqn_optax.loss import LossFn
from kfqn_optax.statistics import CurvatureFn, Statistics
from kfqn_optax.tag import check_precision, measure, tag

ENTRY = "kfqn_optax_sums"  # name of the extra entry next to a kernel
_KERNELS = ("kernel", "embedding")
_discoveries = itertools.count()


def curvature_fn(loss_fn: LossFn, params: Any, /, *args: Any, **kwargs: Any) -> CurvatureFn:
    """The curvature of a loss on a batch, as the extra argument of a K-BFGS update.

    The arguments mirror those of ``jax.value_and_grad(loss_fn)(params, *args, **kwargs)``. The
    batch need not be the one that the gradient was taken on: fewer examples make it cheaper.

    Args:
        loss_fn: ``loss_fn(params, *args, **kwargs)``, the user's own, unchanged: the mean loss of a
            batch (a scalar, or a pair of a scalar and anything else), with linen's ``model.apply``
            anywhere inside. Examples are counted along the first axis of what a layer is given, or
            along the outermost axis that ``jax.vmap`` or ``nn.vmap`` hides from it; turns of a loop
            (``lax.scan``, ``lax.map``) and further calls of a layer count as positions.
        params: all the parameters, in any nesting of dictionaries and other containers.
        *args: whatever else the loss takes: the batch, random keys, other collections.
        **kwargs: the same, by name.

    Returns:
        A function ``(params, *, moments=None, vectors=None, output_moments=(), joint_moments=(),
        sketches=0, gradient=False) -> Statistics`` which measures at any parameters of the same
        structure. ``moments`` holds the paths of the layers whose second moments are wanted, None
        for all; ``vectors`` gives by layer path a vector v, [*blocks, d_in], and A v is measured
        without forming A; ``output_moments`` and ``joint_moments`` hold the paths of layers for
        which `kfac` and `tkfac` want more, and `block_kbfgs` asks for ``sketches`` and the
        ``gradient``. Holes that ``optax.masked`` or ``optax.partition`` left in its argument are
        filled from ``params``. It is a pytree (a ``jax.tree_util.Partial``) and may be an argument
        of a jitted function.

    Raises:
        TypeError: if the loss does not return a scalar.
        ValueError: if the loss cannot run with an extra entry next to each kernel, takes a
            derivative through a layer, or casts the parameters to less than float32.

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
    seen = _discover(loss_fn, params, args, kwargs)
    return jax.tree_util.Partial(_Measure(loss_fn, seen), params, args, kwargs)


def find_layers(loss_fn: LossFn, params: Any, /, *args: Any, **kwargs: Any) -> tuple[Layer, ...]:
    """The layers that K-BFGS can precondition, found by running the loss on shapes alone.

    Args:
        loss_fn: as in `curvature_fn`.
        params: all the parameters.
        *args: the rest of the loss's arguments; ``jax.ShapeDtypeStruct`` will do for arrays.
        **kwargs: the same, by name.

    Returns:
        One `Layer` for each ``nn.Dense``, ``nn.Conv``, ``nn.DenseGeneral``, ``nn.Einsum`` and
        ``nn.Embed`` that the loss calls and whose parameters are in ``params``, in the order of
        their paths. For ``kbfgs(..., layers=...)``.

    Raises:
        TypeError: if the loss does not return a scalar.
    """
    return tuple(s.layer for s in _discover(loss_fn, params, args, kwargs))


# --- discovery: one abstract evaluation ---------------------------------------------------------


def _discover(loss_fn: LossFn, params: Any, args: tuple, kwargs: dict) -> tuple[Seen, ...]:
    """Finds the layers of a loss by abstract evaluation.

    ``module.path`` does not tell where a module's parameters are in the user's tree. So the extra
    entry of each candidate is a dictionary whose one key is that path, for the interceptor to read.
    The key is made unique to this discovery, so that no cached trace of an inner ``jit``, ``scan``
    or ``remat``, ours of before included, can hide a layer.
    """
    modules = dict(_modules_with_kernel(params))
    discovery = Discovery(
        {
            path: {k: nn.meta.unbox(v) for k, v in module.items() if not isinstance(v, Mapping)}
            for path, module in modules.items()
        }
    )
    call, arrays, _ = loss.split_arrays(loss_fn, args, kwargs)

    def evaluate(see: Callable, extra: Mapping[str, Mapping[str, jax.Array]]) -> Any:
        token = f"#{next(_discoveries)}"
        entries = {
            path: {ENTRY: {path + token: _kernel(module), **extra.get(path, {})}}
            for path, module in modules.items()
        }

        def see_path(module: nn.Module, *seen: Any) -> jax.Array:
            entry = module.get_variable("params", ENTRY)
            (path,) = (key.removesuffix(token) for key in entry if key.endswith(token))
            return see(path, *seen)

        def run(params: Any, arrays: list) -> jax.Array:
            with nn.intercept_methods(_interceptor(see_path)):
                return loss.scalar(loss_fn, call(_insert(params, entries), arrays))

        return jax.eval_shape(run, params, arrays)

    loss.explain(
        lambda: evaluate(discovery.see, {}),
        loss_fn,
        plain=lambda: jax.eval_shape(call, params, arrays),
        needs=f"an extra entry {ENTRY!r} next to each kernel",
    )
    return discovery.result(evaluate)


# --- measuring: one pass forward and backward ---------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Measure:
    """One pass; compares by what it does, so that a new one does not compile a step again."""

    loss_fn: LossFn
    seen: tuple[Seen, ...]

    def __call__(
        self, full: Any, args: tuple, kwargs: dict, params: Any, /, **asked: Any
    ) -> Statistics:
        """The statistics at ``params``, see `measure`; ``full`` fills the holes in it."""
        kinds = {s.layer.path: s.layer.kind for s in self.seen}

        def see(module: nn.Module, call: Call | None, inputs, output, kernel) -> jax.Array:
            # By kind: the lookups of an embedding that is also an output layer are not measured.
            entry = module.get_variable("params", ENTRY).get(call.kind) if call else None
            if not call or not entry:
                return output
            check_precision("/".join(module.path), entry)
            return tag(call.geometry, output, inputs, dict(entry))

        def run(sums: dict[str, dict[str, jax.Array]], params: Any) -> jax.Array:
            entries = {path: {ENTRY: {kinds[path]: entry}} for path, entry in sums.items()}
            filled = layers_lib.fill_holes(full, params)
            with nn.intercept_methods(_interceptor(see)):
                result = self.loss_fn(_insert(filled, entries), *args, **kwargs)
            return loss.scalar(self.loss_fn, result)

        return measure(run, self.seen, self.loss_fn, params, **asked)


# --- shared -------------------------------------------------------------------------------------


def _interceptor(see: Callable[..., jax.Array]) -> Callable:
    """A linen interceptor that passes each call of a layer with an extra entry to ``see``.

    ``see(module, call, inputs, output, kernel)`` returns what the layer returns. Only the calls of
    Flax's own layers count: in a subclass that wraps one, the inner call. ``call`` is None where
    it cannot be read as rows times the parameter: inside ``nn.WeightNorm`` and ``nn.SpectralNorm``,
    for one, whose layers multiply with another kernel.
    """
    inside: list[type] = []

    def intercept(next_fun, args, kwargs, context):
        module = context.module
        inside.append(type(module))
        try:
            output = next_fun(*args, **kwargs)
        finally:
            inside.pop()
        method = context.orig_method
        if not linen_kinds.is_layer_call(module, method) or not module.has_variable(
            "params", ENTRY
        ):
            return output
        call, inputs = linen_kinds.describe(module, method, args, kwargs)
        if call is None or any(issubclass(t, (nn.WeightNorm, nn.SpectralNorm)) for t in inside):
            return see(module, None, inputs, output, None)
        kernel = nn.meta.unbox(module.get_variable("params", call.kernel_name))
        return see(module, call, inputs, output, kernel)

    return intercept


def _modules_with_kernel(tree: Any) -> list[tuple[str, Mapping[str, Any]]]:
    """Path and contents of every dictionary that may be a layer's, in the order of their paths.

    Not in that of the dictionaries, which are the same to JAX in any order.
    """
    found = []

    def visit(node: Mapping[str, Any], path: str) -> Mapping[str, Any]:
        if any(name in node and not isinstance(node[name], Mapping) for name in _KERNELS):
            found.append((path, node))
        return node

    _map_dictionaries(visit, tree)
    return sorted(found, key=lambda module: module[0].split("/"))


def _kernel(module: Mapping[str, Any]) -> Any:
    """The kernel of a layer, boxed or bare."""
    return next(module[name] for name in _KERNELS if name in module)


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
        _map_dictionaries(fn, leaf, layers_lib.join(path, _written(keys)))
        if isinstance(leaf, Mapping)
        else leaf
        for keys, leaf in leaves
    ]
    return jax.tree_util.tree_unflatten(treedef, mapped)


def _written(keys: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def _dictionary(like: Mapping[str, Any], items: dict[str, Any]) -> Mapping[str, Any]:
    """A dictionary of the same type as another: ``dict``, ``FrozenDict``, or the like."""
    kind: Any = type(like)
    return kind(items)
