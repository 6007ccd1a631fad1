"""Capture for Flax linen: one pass of the user's loss, seen layer by layer.

Neither model nor loss is changed. Next to each kernel in the parameter tree we put an entry of
zeros, the layer's `Sums`. Flax's lifted transforms slice and carry it exactly as they do the kernel.
An interceptor reads it through the module's own scope and passes the layer's output through `tag`,
an identity whose backward pass returns the sums as the "gradient" of those zeros. One ordinary
``jax.value_and_grad`` with respect to the zeros then yields every sum over calls, positions, scanned
and vmapped examples; nothing leaks out of a trace, and jit caches cannot go stale, because the tree
has a new structure.

Under one ``jit``, XLA merges this pass with the user's own gradient pass over the same batch, and
drops what nobody reads (the second moments at the probe).
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from kfqn_optax import layers as layers_lib
from kfqn_optax.layers import Layer
from kfqn_optax.statistics import Statistics, Sums, reduce, zero_sums

ENTRY = "kfqn_optax_sums"  # name of the extra entry next to a kernel
LossFn = Callable[..., Any]
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
        ``params``.

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
    seen = _discover(loss_fn, params, args, kwargs)
    return jax.tree_util.Partial(
        functools.partial(_measure, loss_fn, tuple(s for s in seen if not s.stacked)),
        params, args, kwargs,
    )  # fmt: skip


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
    found = []
    for seen in _discover(loss_fn, params, args, kwargs):
        if seen.stacked:
            raise ValueError(
                f"layer {seen.layer.path!r} has stacked parameters: its kernel is "
                f"{seen.kernel_shape} in the tree and {seen.stacked} in the layer, as nn.scan and "
                "nn.vmap with variable_axes={'params': axis} make it. K-BFGS does not support "
                "stacked layers yet; give these parameters to another optimizer with "
                "optax.partition, and K-BFGS sees the others."
            )
        found.append(seen.layer)
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class _Seen:
    """A layer as it was met during discovery."""

    layer: Layer
    examples: int  # the length of the first axis of its input, vmapped axes counted
    kernel_shape: tuple[int, ...]
    stacked: tuple[int, ...] | None  # the kernel's shape inside the layer where it differs


# --- discovery: one abstract evaluation ---------------------------------------------------------


def _discover(loss_fn: LossFn, params: Any, args: tuple, kwargs: dict) -> tuple[_Seen, ...]:
    """Finds the dense layers of a loss by abstract evaluation.

    ``module.path`` does not tell where a module's parameters are in the user's tree. So the extra
    entry of each candidate is a dictionary whose one key is that path, for the interceptor to read.
    The key makes every entry's structure unique, so that no cached trace of an inner ``jit``,
    ``scan`` or ``remat`` can hide a layer.
    """
    candidates = {
        path: {ENTRY: {path: module["kernel"]}} for path, module in _modules_with_kernel(params)
    }
    outer_shapes = {path: jnp.shape(_unbox(m["kernel"])) for path, m in _modules_with_kernel(params)}
    seen: dict[str, _Seen] = {}
    vmapped: dict[str, list[int]] = {}

    def see(module: nn.Module, inputs: jax.Array, output: jax.Array) -> jax.Array:
        (path,) = module.get_variable("params", ENTRY)
        kernel = _unbox(module.get_variable("params", "kernel"))
        if path not in seen:
            shape = outer_shapes[path]
            seen[path] = _Seen(
                layer=layers_lib.dense(path, kernel.shape, module.has_variable("params", "bias")),
                examples=output.shape[0] if output.ndim > 1 else 1,
                kernel_shape=shape,
                stacked=None if kernel.shape == shape else kernel.shape,
            )
        return _watch_vmap(vmapped.setdefault(path, []), output, kernel)

    call, arrays, _ = split_arrays(loss_fn, args, kwargs)

    def run(params: Any, arrays: list) -> jax.Array:
        with nn.intercept_methods(_interceptor(see)):
            return _scalar(loss_fn, call(_insert(params, candidates), arrays))

    _explain(lambda: jax.eval_shape(run, params, arrays), loss_fn,
             lambda: jax.eval_shape(call, params, arrays))  # fmt: skip
    return tuple(
        dataclasses.replace(s, examples=vmapped[path][-1]) if vmapped[path] else s
        for path, s in ((path, seen[path]) for path in candidates if path in seen)
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


# --- measuring: one pass forward and backward ---------------------------------------------------


def _measure(
    loss_fn: LossFn, seen: tuple[_Seen, ...], full: Any, args: tuple, kwargs: dict, params: Any
) -> Statistics:
    """The statistics at ``params``; ``full`` fills the holes in it."""
    params = _fill_holes(full, params)
    leaves = layers_lib.named_leaves(params)
    zeros = {}
    for s in seen:
        dtype = layers_lib.factor_dtype(leaves[s.layer.kernel_path].dtype)
        zeros[s.layer.path] = zero_sums(s.layer, dtype)._asdict()

    def see(module: nn.Module, inputs: jax.Array, output: jax.Array) -> jax.Array:
        return tag(output, inputs, module.get_variable("params", ENTRY))

    def run(zeros: dict) -> jax.Array:
        entries = {path: {ENTRY: sums} for path, sums in zeros.items()}
        with nn.intercept_methods(_interceptor(see)):
            return _scalar(loss_fn, loss_fn(_insert(params, entries), *args, **kwargs))

    loss, sums = _explain(lambda: jax.value_and_grad(run)(zeros), loss_fn)
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


# --- shared -------------------------------------------------------------------------------------


def _interceptor(see: Callable[[nn.Module, jax.Array, jax.Array], jax.Array]) -> Callable:
    """A linen interceptor that passes the output of each dense layer with an extra entry to ``see``.

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


def _modules_with_kernel(tree: Any, path: str = "") -> list[tuple[str, Mapping[str, Any]]]:
    """Path and contents of every dictionary that holds a ``kernel``, in the order of the tree."""
    found = []

    def visit(node: Mapping[str, Any], path: str) -> Mapping[str, Any]:
        if "kernel" in node and not isinstance(node["kernel"], Mapping):
            found.append((path, node))
        return node

    _map_dictionaries(visit, tree, path)
    return found


def _insert(tree: Any, entries: Mapping[str, Mapping[str, Any]]) -> Any:
    """A copy of the tree with more entries in some of its dictionaries, given by path."""
    return _map_dictionaries(
        lambda node, path: type(node)({**node, **entries[path]}) if path in entries else node, tree
    )


def _map_dictionaries(fn: Callable[[Any, str], Any], tree: Any, path: str = "") -> Any:
    """Applies ``fn(dictionary, path)`` to every dictionary of a tree, from the leaves up."""
    if isinstance(tree, Mapping):
        children = {
            key: _map_dictionaries(fn, child, layers_lib.join(path, str(key)))
            for key, child in tree.items()
        }
        return fn(type(tree)(children), path)
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
        raise ValueError(
            "the parameters given to the update differ in structure from those given to "
            f"curvature_fn; only in the update: {layers_lib.some(sorted(others.keys() - names.keys()))}; "
            f"only in curvature_fn: {layers_lib.some(sorted(names.keys() - others.keys()))}. Pass both the "
            "same parameters."
        ) from error


def _unbox(leaf: Any) -> Any:
    """The array in a box such as ``nn.Partitioned``; an array itself."""
    return nn.meta.unbox(leaf)


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


def _scalar(loss_fn: LossFn, result: Any) -> jax.Array:
    """The loss in what ``loss_fn`` returned: a scalar, or the first of a pair."""
    loss = result[0] if isinstance(result, tuple) and len(result) == 2 else result
    if jax.tree.structure(loss) != jax.tree.structure(0) or jnp.shape(loss) != ():
        shapes = jax.tree.map(jnp.shape, loss)
        raise TypeError(
            f"{_name(loss_fn)} must return the mean loss of the batch, a scalar (or a pair of a "
            f"scalar and auxiliary output); it returned shape {shapes}. Take the mean over the "
            "examples."
        )
    return loss


def _explain(run: Callable, loss_fn: LossFn, plain: Callable | None = None) -> Any:
    """Runs, and turns what can go wrong through our own doing into a sentence.

    Args:
        run: the pass with the extra entries.
        loss_fn: for its name.
        plain: the same pass without them, to see whether they are to blame.
    """
    try:
        return run()
    except Exception as error:
        message = str(error)
        if "custom_lin" in message or "forward-mode" in message:
            raise ValueError(
                f"{_name(loss_fn)} takes a forward-mode derivative (jax.jvp, jax.jacfwd, "
                "jax.linearize or jax.hessian) through a layer. The layers' cotangents cannot be "
                "collected through that: use reverse mode (jax.grad, jax.vjp) inside the loss, or "
                "give curvature_fn a loss without that term."
            ) from error
        if plain is None or isinstance(error, TypeError) and "mean loss of the batch" in message:
            raise
        plain()  # raises the user's own error, where that is what it is
        raise ValueError(
            f"{_name(loss_fn)} runs on the parameters but not with an extra entry {ENTRY!r} next "
            f"to each kernel, which curvature_fn needs: {type(error).__name__}: {message[:300]} "
            "Does it compare or combine the whole tree of parameters with another tree? Give "
            "curvature_fn the loss without that term (a penalty on the weights is not wanted there)."
        ) from error


def _name(fn: Callable) -> str:
    return getattr(fn, "__name__", None) or repr(fn)
