"""Statistics of parts of a batch made into those of the whole: microbatches, and devices.

What a pass is reduced to are means (`statistics`), and means of parts do not add up. So each part's
numbers are turned back into sums over its examples or rows (`sums`), these are added, over turns
of a loop or over the devices of an axis, and the total is divided again (`means`). A part counts by
its number of examples, in means over rows by its rows; a layer that it did not reach has none.
"""

import functools
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfqn_optax.axes import vary, varying
from kfqn_optax.statistics import CurvatureFn, LayerStatistics, Statistics

AxisName = str | tuple[str, ...]


class Sums(NamedTuple):
    """Statistics of which every number may be added to that of other examples.

    Attributes:
        loss: times ``weight``.
        weight: the number of examples, scalar.
        layers: by layer path, as `LayerStatistics`: means over examples times the examples, means
            over rows times the rows, the noise times the rows and squared, sketches times the
            square root of the examples.
        gradient: times ``weight``; None where it was not asked for.
    """

    loss: jax.Array
    weight: jax.Array
    layers: dict[str, LayerStatistics]
    gradient: Any


def sums(statistics: Statistics) -> Sums:
    """Statistics of a part as sums over its examples and rows."""

    def of_layer(s: LayerStatistics) -> LayerStatistics:
        return s._replace(
            input_moment=_times(s.input_moment, s.examples),
            input_product=_times(s.input_product, s.examples),
            input_mean=_times(s.input_mean, s.rows),
            cotangent_mean=_times(s.cotangent_mean, s.rows),
            cotangent_noise=(s.cotangent_noise * s.rows) ** 2,
            output_moment=_times(s.output_moment, s.rows),
            joint_moments=_times(s.joint_moments, s.examples),
            sketches=_times(s.sketches, jnp.sqrt(s.examples)),
        )

    dtype = jnp.promote_types(statistics.loss.dtype, jnp.float32)
    examples = [jnp.max(s.examples) for s in statistics.layers.values()]
    weight = functools.reduce(jnp.maximum, examples) if examples else jnp.ones(())
    weight = weight.astype(dtype)
    return Sums(
        loss=statistics.loss * weight,
        weight=weight,
        layers={path: of_layer(s) for path, s in statistics.layers.items()},
        gradient=_times(statistics.gradient, weight),
    )


def means(total: Sums) -> Statistics:
    """The statistics of all the examples whose sums were added up."""

    def of_layer(s: LayerStatistics) -> LayerStatistics:
        per_example, per_row = 1 / s.examples, 1 / jnp.maximum(s.rows, 1)
        return s._replace(
            input_moment=_times(s.input_moment, per_example),
            input_product=_times(s.input_product, per_example),
            input_mean=_times(s.input_mean, per_row),
            cotangent_mean=_times(s.cotangent_mean, per_row),
            cotangent_noise=jnp.sqrt(s.cotangent_noise) * per_row,
            output_moment=_times(s.output_moment, per_row),
            joint_moments=_times(s.joint_moments, per_example),
            sketches=_times(s.sketches, jnp.sqrt(per_example)),
        )

    return Statistics(
        loss=total.loss / total.weight,
        layers={path: of_layer(s) for path, s in total.layers.items()},
        gradient=_times(total.gradient, 1 / total.weight),
    )


def _times(arrays: Any, numbers: jax.Array) -> Any:
    """A tree of arrays [*blocks, ...], or None, times numbers [*blocks]."""
    return jax.tree.map(
        lambda array: array * numbers.reshape(numbers.shape + (1,) * (array.ndim - numbers.ndim)),
        arrays,
    )


# --- devices --------------------------------------------------------------------------------------


def over_axis(curvature_fn: Callable[..., Statistics], axis_name: AxisName) -> CurvatureFn:
    """The curvature of the whole batch, where each device measures its own part of it.

    For ``jax.shard_map``, ``jax.pmap`` and ``jax.vmap(..., axis_name=...)``. (Under ``jax.jit``
    with a sharded batch nothing is needed: there a loss sees the whole batch.) All devices get the
    same statistics and so keep the same factors. The gradient is averaged by the user, as for any
    other optimizer.

    Args:
        curvature_fn: made from the loss of the local part of the batch: its mean over the examples
            that this device has.
        axis_name: the mapped axis, or several.

    Returns:
        A function like `curvature_fn`'s, for ``tx.update(..., curvature_fn=...)``.

    Raises:
        ValueError: when it is called where there is no such axis, or, as far as JAX lets us see it,
            with a loss that takes the mean over the axis itself.

    Examples:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, kfqn_optax as kfqn
        >>> model = nn.Dense(2)
        >>> x = jax.random.normal(jax.random.key(0), (4, 8, 3))  # four devices, eight examples each
        >>> params = model.init(jax.random.key(1), x[0])
        >>> def loss_fn(params, x):
        ...     return jnp.mean(jnp.sum(model.apply(params, x) ** 2, axis=-1))
        >>> def measure(x):
        ...     fn = kfqn.over_axis(kfqn.curvature_fn(loss_fn, params, x), "data")
        ...     return fn(params).layers["params"]
        >>> of_each = jax.vmap(measure, axis_name="data")(x)
        >>> of_all = kfqn.curvature_fn(loss_fn, params, x.reshape(32, 3))(params).layers["params"]
        >>> bool(jnp.allclose(of_each.input_moment[3], of_all.input_moment, rtol=1e-5))
        True
    """
    names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)

    @functools.wraps(curvature_fn, updated=())
    def measure(params: Any, /, **asked: Any) -> Statistics:
        _check_axes(names)
        # Marked as different on each device, the parameters get no sum over devices for a gradient:
        # all sums are taken here, together.
        measured = curvature_fn(vary(params, names), **asked)
        return means(jax.lax.psum(sums(measured), names))

    return measure


def _check_axes(names: Collection[str]) -> None:
    for name in names:
        try:
            jax.lax.axis_size(name)
        except NameError as error:
            raise ValueError(
                f"over_axis: there is no axis named {name!r} here. Call it inside jax.shard_map "
                "over a mesh that has an axis of this name, or inside jax.pmap or jax.vmap with "
                "this axis_name; under jax.jit with a sharded batch it is not needed."
            ) from error


# --- microbatches ---------------------------------------------------------------------------------


def microbatches(batch: Any, count: int) -> Any:
    """Splits a batch into microbatches of equal size, for `over_microbatches` and ``lax.scan``.

    Args:
        batch: a tree of arrays with the same number of examples along the first axis of each.
        count: how many microbatches, a divisor of the number of examples.

    Returns:
        The tree with arrays [count, examples / count, ...]. Neighbouring examples go to different
        microbatches, so that a device that holds a part of the batch holds a part of each.

    Raises:
        ValueError: if the batch cannot be split so.

    Examples:
        >>> import jax.numpy as jnp, kfqn_optax as kfqn
        >>> kfqn.microbatches(jnp.arange(6), 2).tolist()
        [[0, 2, 4], [1, 3, 5]]
    """
    size = _first_axis(batch, "microbatches")
    if count < 1 or size % count:
        raise ValueError(
            f"microbatches: {size} examples cannot be split into {count} microbatches of equal "
            f"size; give a divisor of {size}."
        )
    return jax.tree.map(
        lambda a: jnp.swapaxes(a.reshape(size // count, count, *a.shape[1:]), 0, 1), batch
    )


def over_microbatches(
    make: Callable[..., Callable[..., Statistics]], batches: tuple[Any, ...]
) -> CurvatureFn:
    """The curvature of a large batch, measured one microbatch at a time.

    It is that of the large batch up to rounding, at the parameters and at the probe; at any time
    only one microbatch is in memory. A loop over microbatches belongs here, not into the loss:
    there it would be taken for one over the positions of an example.

    Args:
        make: from the arrays of one microbatch to its curvature function, as in
            ``lambda x, y: kfqn.curvature_fn(loss_fn, params, x, y)``.
        batches: a tuple of trees, the arguments of ``make``, arrays [count, ...] with one entry for
            each microbatch; see `microbatches`. Random keys are arrays too: one for each.

    Returns:
        A function like `curvature_fn`'s, for ``tx.update(..., curvature_fn=...)``.

    Raises:
        TypeError: if ``batches`` is not a tuple.
        ValueError: if the arrays do not have the same number of microbatches.

    Examples:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, kfqn_optax as kfqn
        >>> model = nn.Dense(2)
        >>> x = jax.random.normal(jax.random.key(0), (32, 3))
        >>> params = model.init(jax.random.key(1), x)
        >>> def loss_fn(params, x):
        ...     return jnp.mean(jnp.sum(model.apply(params, x) ** 2, axis=-1))
        >>> fn = kfqn.over_microbatches(
        ...     lambda x: kfqn.curvature_fn(loss_fn, params, x), kfqn.microbatches((x,), 4))
        >>> of_parts, of_all = fn(params), kfqn.curvature_fn(loss_fn, params, x)(params)
        >>> a, b = of_parts.layers["params"], of_all.layers["params"]
        >>> bool(jnp.allclose(a.cotangent_mean, b.cotangent_mean, rtol=1e-5))
        True
    """
    if not isinstance(batches, tuple):
        raise TypeError(
            "over_microbatches needs a tuple of the arguments of make, got "
            f"{type(batches).__name__}: write (batches,) for a make(batch)."
        )
    _first_axis(batches, "over_microbatches")

    def measure(params: Any, /, **asked: Any) -> Statistics:
        def one(batch: tuple[Any, ...]) -> Sums:
            return sums(make(*batch)(params, **asked))

        first = jax.eval_shape(one, jax.tree.map(lambda a: a[0], batches))
        zeros = jax.tree.map(lambda a: vary(jnp.zeros(a.shape, a.dtype), varying(a)), first)
        total, _ = jax.lax.scan(
            lambda total, batch: (jax.tree.map(jnp.add, total, one(batch)), None), zeros, batches
        )
        return means(total)

    return measure


def _first_axis(tree: Any, who: str) -> int:
    """The length of the first axis of all arrays of a tree."""
    leaves = jax.tree.leaves(tree)
    shapes = [jnp.shape(leaf) for leaf in leaves]
    if not shapes or not all(shapes) or len({shape[0] for shape in shapes}) > 1:
        found = ", ".join(map(str, dict.fromkeys(shapes))) or "none"
        raise ValueError(
            f"{who}: all arrays must have a first axis of the same length, got shapes {found}. "
            "What is no part of a batch belongs into the loss by another way, as in "
            "lambda x: kfqn.curvature_fn(loss_fn, params, x, weight)."
        )
    return shapes[0][0]
