"""Tag: how a layer's output carries statistics out of a pass; shared by linen and NNX.

`tag` is an identity on a layer's output. Its backward pass returns sums over the rows that went
through the layer as the "gradient" of some zeros that were handed in beside the output, so one
ordinary ``jax.value_and_grad`` with respect to those zeros collects them, however the layer is
called.

The zeros of a layer lie next to its kernel, and Flax's lifted transforms slice them as they do the
kernel. So each has as many axes as the kernel (padded with axes of length 1), and where layers are
stacked, the stack's axes are at the same places.
"""

import functools
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, auto_axes

from kfqn_optax.axes import vary, varying
from kfqn_optax.discovery import Seen
from kfqn_optax.geometry import second_moment
from kfqn_optax.loss import LossFn, check_local, explain
from kfqn_optax.sketch import sketch
from kfqn_optax.statistics import Statistics, reduce

Entry = dict[str, jax.Array]  # of one layer: zeros (or their sums) by field, and perhaps a vector
VECTOR = "vector"


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def tag(geometry: Any, output: jax.Array, inputs: jax.Array, entry: Entry) -> jax.Array:
    """The output of a layer, unchanged; its backward pass collects sums over the layer's rows.

    Args:
        geometry: how the layer's call makes rows of its input and output.
        output: of the layer.
        inputs: what the layer was given.
        entry: zeros by field, whose "gradient" is the sum over all rows of

            ``moment``: x x^T, x the row without the constant 1 of the bias;
            ``inputs``: x;  ``cotangents``: the cotangent g of the output row;  ``rows``: 1;
            ``roundings``: e |g|^2, e the relative rounding error of g;
            ``product``: x (x . v), for the vector v under ``vector``;
            ``output_moment``: g g^T;
            ``joint_input``: |g|^2 a a^T, a the row with a 1 if the zeros have room for it;
            ``joint_output``: |a|^2 g g^T, for the same a;
            ``input_sketches``, ``cotangent_sketches``, ``sketched_rows``: x, g and 1 times the
            signs of their examples (see `sketch`).

    Returns:
        ``output``, to the last bit, forward and backward.
    """
    del geometry, inputs, entry
    return output


def _tag_forward(geometry, output, inputs, entry):
    return output, (inputs, entry)


def _tag_backward(geometry, residuals, cotangent):
    inputs, entry = residuals
    sums = _replicated(functools.partial(_sums, geometry), entry, inputs, cotangent)
    sums = {name: vary(total, varying(entry[name])) for name, total in sums.items()}
    return cotangent, None, sums


def _sums(geometry: Any, entry: Entry, inputs: jax.Array, cotangent: jax.Array) -> Entry:
    dtype = entry["rows"].dtype
    g = geometry.output_rows(cotangent, dtype)
    # A plain constant would not be summed over an axis that vmap hides; this depends on g, and XLA
    # sees all the same that it is one.
    first = g[(slice(None), *[0] * (g.ndim - 1))]
    total = geometry.input_sum(inputs, dtype)

    def a() -> jax.Array:
        x = geometry.input_rows(inputs, dtype)
        ones = entry["joint_input"].shape[x.ndim - 2] - x.shape[-1]
        return jnp.pad(x, [*[(0, 0)] * (x.ndim - 1), (0, ones)], constant_values=1)

    examples, blocks = geometry.examples(inputs), total.shape[:-1]

    def sketches(rows: jax.Array, name: str) -> jax.Array:
        count = entry[name].size // math.prod((*blocks, rows.shape[-1]))
        return sketch(rows, examples, count)

    eps = max(jnp.finfo(cotangent.dtype).eps, jnp.finfo(dtype).eps)
    sums = {
        "inputs": lambda: total,
        "moment": lambda: geometry.moment(inputs, dtype),
        "product": lambda: geometry.product(inputs, entry[VECTOR].reshape(total.shape), dtype),
        "cotangents": lambda: jnp.sum(g, axis=0),
        "roundings": lambda: jnp.sum(g**2, axis=(0, -1)) * eps,
        "output_moment": lambda: second_moment(g),
        "joint_input": lambda: second_moment(a(), weights=g),
        "joint_output": lambda: second_moment(g, weights=a()),
        "input_sketches": lambda: sketches(geometry.input_rows(inputs, dtype), "input_sketches"),
        "cotangent_sketches": lambda: sketches(g, "cotangent_sketches"),
        "sketched_rows": lambda: sketches(
            jnp.broadcast_to(
                ((first == 0) | True).astype(dtype).reshape(-1, *[1] * len(blocks), 1),
                (len(first), *blocks, 1),
            ),
            "sketched_rows",
        ),
        "rows": lambda: jnp.sum((first == 0) | True, dtype=dtype),
        VECTOR: lambda: jnp.zeros_like(entry[VECTOR]),
    }
    return {name: sums[name]().reshape(zeros.shape) for name, zeros in entry.items()}


def check_precision(path: str, entry: Entry) -> None:
    """Raises if the loss has cast the parameters, and the zeros with them, to low precision."""
    dtype = entry["rows"].dtype
    if jnp.finfo(dtype).bits < 32:
        raise ValueError(
            f"the loss casts all parameters to {dtype}, and with them the sums that curvature_fn "
            f"puts next to the kernel of layer {path!r}; they would lose their digits. Compute in "
            "low precision by the model's own dtype=, or give curvature_fn a loss without the cast."
        )


def _replicated(fn: Callable[..., Any], *args: Any) -> Any:
    """``fn(*args)``, its results on every device, where the batch is sharded explicitly.

    Along axes of a mesh that are ``AxisType.Explicit`` JAX wants to be told how the result of each
    reshape and contraction is sharded; inside, they are ``Auto`` axes. Without such axes nothing is
    changed.
    """
    for arg in jax.tree.leaves(args):
        mesh = jax.typeof(arg).sharding.mesh
        if mesh.explicit_axes:
            everywhere = NamedSharding(mesh, PartitionSpec())
            return auto_axes(fn, axes=mesh.explicit_axes, out_sharding=everywhere)(*args)
    return fn(*args)


tag.defvjp(_tag_forward, _tag_backward)


def measure(
    loss_of_entries: Callable[[dict[str, Entry], Any], jax.Array],
    seen: tuple[Seen, ...],
    loss_fn: LossFn,
    params: Any,
    moments: Collection[str] | None = None,
    vectors: Mapping[str, jax.Array] | None = None,
    output_moments: Collection[str] = (),
    joint_moments: Collection[str] = (),
    sketches: int = 0,
    gradient: bool = False,
) -> Statistics:
    """One pass forward and backward, reduced to statistics.

    Args:
        loss_of_entries: the loss as a function of the entries that `tag` is given, by layer path,
            and of the parameters.
        seen: the layers.
        loss_fn: the user's function, for messages.
        params: the parameters; inside ``jax.shard_map``, the sums are of the devices along whose
            axes these are marked as varying, each device its own.
        moments: paths of the layers whose second moment is wanted; None for all.
        vectors: by layer path, [*blocks, d_in]: A times this vector is wanted.
        output_moments: paths of the layers whose second moment of the cotangents is wanted.
        joint_moments: paths of the layers whose joint moments are wanted.
        sketches: how many sketches of inputs and cotangents are wanted.
        gradient: whether the gradient is.
    """
    vectors = vectors or {}
    axes = varying(params)
    zeros, given = {}, {}
    for s in seen:
        path = s.layer.path
        wanted = ["inputs", "cotangents", "roundings", "rows"]
        if s.layer.lookup or moments is None or path in moments:
            wanted.append("moment")
        if path in vectors and not s.layer.lookup:
            wanted.append("product")
            given[path] = vary({VECTOR: _scatter(s, vectors[path])}, axes)
        if path in output_moments:
            wanted.append("output_moment")
        if path in joint_moments and not s.layer.lookup:
            wanted += ["joint_input", "joint_output"]
        if sketches and not s.layer.lookup:
            if s.hidden:
                raise ValueError(
                    f"the examples of layer {path!r} lie along an axis that vmap hides from it, "
                    "where they cannot be told apart for sketches. Call the model on the whole "
                    "batch, and let vmap go over something else."
                )
            wanted += ["input_sketches", "cotangent_sketches", "sketched_rows"]
        zeros[path] = {
            name: vary(jnp.zeros(_outer_shape(s, _inner_shape(s, name, sketches)), s.dtype), axes)
            for name in wanted
        }

    def loss_of_zeros(zeros: dict[str, Entry], params: Any) -> jax.Array:
        entries = {path: {**zeros[path], **given.get(path, {})} for path in zeros}
        return loss_of_entries(entries, params)

    wrt = (0, 1) if gradient else (0,)
    derive = jax.value_and_grad(loss_of_zeros, wrt, allow_int=gradient)
    loss, (sums, *gradients) = explain(lambda: derive(zeros, params), loss_fn)
    check_local(loss_fn, axes, varying(loss))
    return Statistics(
        loss=loss,
        layers={
            s.layer.path: reduce(
                s.layer,
                {
                    name: _gather(s, name, array, sketches)
                    for name, array in sums[s.layer.path].items()
                },
                s.examples,
                vectors.get(s.layer.path),
            )
            for s in seen
        },
        gradient=gradients[0] if gradients else None,
    )


# --- where a layer's sums lie -------------------------------------------------------------------


def _inner_shape(seen: Seen, name: str, sketches: int = 0) -> tuple[int, ...]:
    """Shape of a field for one of the stacked layers: [*groups, ...]."""
    *groups, d, d_out = seen.kernel.matrix_shape
    if name == "rows":
        return (1,)
    moment = (d,) if seen.layer.lookup else (d, d)
    shapes = {"moment": moment, "cotangents": (d_out,), "roundings": (1,)}
    shapes |= dict.fromkeys(("output_moment", "joint_output"), (d_out, d_out))
    shapes |= {"input_sketches": (sketches, d), "cotangent_sketches": (sketches, d_out)}
    shapes["sketched_rows"] = (sketches, 1)
    shapes["joint_input"] = (d + (seen.layer.bias is not None),) * 2
    return (*groups, *shapes.get(name, (d,)))


def _outer_shape(seen: Seen, inner: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the entry: padded to the kernel's number of axes, the axes of the stack inserted."""
    shape = [*inner, *[1] * (len(seen.kernel.shape) - len(inner))]
    for axis in seen.stack:
        shape.insert(axis, seen.layer.kernel.shape[axis])
    return tuple(shape)


def _gather(seen: Seen, name: str, array: jax.Array, sketches: int) -> jax.Array:
    """An entry as [*blocks, ...]: the stack's axes in front, then the groups."""
    layer, inner = seen.layer, _inner_shape(seen, name, sketches)
    sizes = tuple(array.shape[axis] for axis in seen.stack)
    array = jnp.moveaxis(array, seen.stack, range(len(seen.stack))).reshape(*sizes, *inner)
    groups = seen.kernel.matrix_shape[:-2]
    if name == "rows":
        array = jnp.broadcast_to(array, (*sizes, *(groups or (1,)))).reshape(layer.blocks or ())
        return array
    if layer.blocks is None:
        return array
    return array.reshape(layer.blocks, *inner[len(groups) :])


def _scatter(seen: Seen, vector: jax.Array) -> jax.Array:
    """A vector [*blocks, d_in] as an entry, without the constant 1 of the bias."""
    if seen.layer.bias is not None:
        vector = vector[..., :-1]
    inner = _inner_shape(seen, VECTOR)
    sizes = tuple(seen.layer.kernel.shape[axis] for axis in seen.stack)
    padding = [1] * (len(seen.kernel.shape) - len(inner))
    array = vector.astype(seen.dtype).reshape(*sizes, *inner, *padding)
    return jnp.moveaxis(array, range(len(seen.stack)), seen.stack)
