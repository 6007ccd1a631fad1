"""An optimizer's state spread over devices: each keeps a part of every large array.

Under ``jax.jit`` every device computes the same step, and needs the same state for it; without more
each keeps all of it. Here each matrix of a state is cut into as many equal parts as an axis of a
mesh has devices, along its rows. The number of rows seldom divides: the row of a bias makes 785 of
784. So they are filled up with zeros, and taken away again before a step.

Where such an array is used, JAX's compiler decides what is computed on which device and what is
sent, from where the arrays of the state lie.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

SMALLEST = 1024  # entries; a smaller array is on all devices


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shards:
    """One array of a state, cut along an axis into equal parts.

    Attributes:
        array: filled up with zeros along that axis.
        axis: which, counted from the end.
        length: its length without the zeros.
    """

    array: jax.Array
    axis: int = dataclasses.field(metadata={"static": True})
    length: int = dataclasses.field(metadata={"static": True})


def shard_state(state: Any, mesh: Mesh, axis_name: str) -> Any:
    """Spreads a state over the devices of an axis of a mesh.

    Args:
        state: of any Optax transformation; whole, or spread before.
        mesh: of devices; its axes are of type ``AxisType.Auto``.
        axis_name: one of them.

    Returns:
        The state with `Shards` in the place of every array of two or more axes and at least 1024
        entries; the other arrays are on all devices.

    Raises:
        ValueError: if the mesh has no such axis, or one of another type.
    """
    if axis_name not in mesh.shape:
        raise ValueError(
            f"the mesh has no axis {axis_name!r} to spread a state over; its axes are "
            f"{', '.join(map(repr, mesh.axis_names)) or 'none'}."
        )
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise ValueError(
            "a state can be spread over axes of type Auto only, and the mesh has axes of type "
            f"{', '.join(kind.name for kind in mesh.axis_types)}: make it with "
            "jax.make_mesh(shape, names, axis_types=(jax.sharding.AxisType.Auto,) * len(names))."
        )
    parts = mesh.shape[axis_name]

    def put(array: jax.Array, *spec: str | None) -> jax.Array:
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        if isinstance(array, Tracer):
            return jax.lax.with_sharding_constraint(array, sharding)
        return jax.device_put(array, sharding)

    def cut(array: jax.Array) -> Any:
        if array.ndim < 2 or array.size < SMALLEST:
            return put(array)
        axis = -2
        length = array.shape[axis]
        padding = [(0, 0)] * array.ndim
        padding[axis] = (0, -length % parts)
        spec = [axis_name if at == array.ndim + axis else None for at in range(array.ndim)]
        return Shards(put(jnp.pad(array, padding), *spec), axis, length)

    return jax.tree.map(cut, whole_state(state))


def whole_state(state: Any) -> Any:
    """The state of the transformation itself, from what `shard_state` made of it."""
    return jax.tree.map(
        lambda node: (
            jax.lax.slice_in_dim(node.array, 0, node.length, axis=node.axis)
            if isinstance(node, Shards)
            else node
        ),
        state,
        is_leaf=lambda node: isinstance(node, Shards),
    )


def sharded(
    tx: optax.GradientTransformation, mesh: Mesh, axis_name: str
) -> optax.GradientTransformationExtraArgs:
    """A transformation of which each device keeps only a part of the state.

    The state is what `shard_state` makes of that of ``tx``; the steps are those of ``tx``. Where a
    state is wanted whole, as by `summary`, give it what `whole_state` returns; `warm_start` takes
    the state as it is, and `shard_state` spreads what it returns.

    Args:
        tx: any Optax transformation.
        mesh: of devices; its axes are of type ``AxisType.Auto``.
        axis_name: one of them.

    Returns:
        The transformation, for steps under ``jax.jit``.

    Raises:
        ValueError: from ``init``, if the mesh has no such axis, or one of another type.

    Examples:
        >>> import jax, jax.numpy as jnp, kfqn_optax as kfqn
        >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> tx = kfqn.sharded(kfqn.kbfgs(0.1), mesh, "data")
        >>> params = {"kernel": jnp.ones((40, 40)), "bias": jnp.ones(40)}
        >>> state = tx.init(params)
        >>> len(jax.tree.leaves(kfqn.whole_state(state))) == len(jax.tree.leaves(state))
        True
    """
    inner = optax.with_extra_args_support(tx)

    def init(params: Any) -> Any:
        return shard_state(inner.init(params), mesh, axis_name)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        updates, state = inner.update(updates, whole_state(state), params, **extra_args)
        return updates, shard_state(state, mesh, axis_name)

    return optax.GradientTransformationExtraArgs(init, update)
