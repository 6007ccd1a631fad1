"""Statistics: what one pass over a batch is reduced to, layer by layer.

The scale is undone here, and only here. A layer's input is a (with a trailing 1 if it has a bias),
on m examples of T positions each (a dense layer on vectors: T = 1; on sequences: their length; a
convolution: its output pixels; a module called K times: K times as many). The user's loss is a mean
over the examples, so what backpropagation brings to the layer's output is ``g / m``, with
``g = d f_n / d h`` the gradient of one example's loss. From sums over all rows (examples and
positions) we make

    input_moment    A = (1/m)   sum of a a^T     mean over examples, sum over positions
    input_product   A v         without forming A, for a given vector v
    input_mean      a = (1/(mT)) sum of a        mean over both
    cotangent_mean  g = (1/(mT)) sum of g        mean over both
    cotangent_noise     the size below which that mean is nothing but rounding: where all g cancel,
                        as for the keys of an attention (softmax does not see a shift of them)

and, where a natural gradient asks for them (K-FAC, trace-restricted K-FAC),

    output_moment   G = (1/(mT)) sum of g g^T    mean over both
    joint_moments   (1/m) sum of |g|^2 a a^T  and  (1/m) sum of |a|^2 g g^T, of equal traces

(arXiv 2006.08877; arXiv 2102.06737 for the positions; arXiv 2011.10741 for the joint moments.)
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from kfqn_optax.layers import Layer


class CurvatureFn(Protocol):
    """What `curvature_fn` returns: a function from parameters to `Statistics`."""

    def __call__(
        self,
        params: Any,
        /,
        *,
        moments: Collection[str] | None = None,
        vectors: Mapping[str, jax.Array] | None = None,
        output_moments: Collection[str] = (),
        joint_moments: Collection[str] = (),
        sketches: int = 0,
        gradient: bool = False,
    ) -> "Statistics":
        """The statistics at some parameters.

        Args:
            params: where to measure; of the same structure as those that the function was made
                with.
            moments: paths of the layers whose second moments are wanted; None for all.
            vectors: by layer path, [*blocks, d_in]: A times this vector is wanted.
            output_moments: paths of the layers whose second moment of the cotangents is wanted.
            joint_moments: paths of the layers whose joint moments are wanted; no lookups.
            sketches: how many sketches of each layer's inputs and cotangents are wanted; lookups
                have none.
            gradient: whether the gradient of the loss is wanted.
        """
        ...


class JointMoments(NamedTuple):
    """Second moments of one side weighted by the squared length on the other side, of equal traces.

    Attributes:
        input: mean over examples of the sum over positions of |g|^2 a a^T, [d_in, d_in].
        output: the same of |a|^2 g g^T, [d_out, d_out].
    """

    input: jax.Array
    output: jax.Array


class Sketches(NamedTuple):
    """Sums over the examples with signs (`sketch`), of means over positions.

    Attributes:
        input: of the input with a trailing 1 if there is a bias, [q, d_in].
        cotangent: of the gradient of an example's loss at the layer's output, [q, d_out].
    """

    input: jax.Array
    cotangent: jax.Array


class LayerStatistics(NamedTuple):
    """One layer on one batch, in the dtype of the factors.

    Where a kernel holds several matrices (`Layer.blocks`), every array has one more axis in front.

    Attributes:
        input_moment: A, [d_in, d_in]; of an embedding's lookups the diagonal of A, [d_in]; None if
            it was not asked for.
        input_product: A times the vector that was given, [d_in]; None without one.
        input_mean: mean input with a trailing 1 if there is a bias, [d_in].
        cotangent_mean: mean gradient of an example's loss at the layer's output, [d_out].
        cotangent_noise: the size below which cotangent_mean is taken for rounding, []: what a mean
            of so many g with random signs has, times the square root of their relative rounding
            error (3e-4 in float32).
        rows: number of rows, m times T; 0 if the loss does not depend on this layer.
        examples: m.
        output_moment: G, second moment of the gradients of an example's loss at the layer's output,
            [d_out, d_out]; None unless it was asked for.
        joint_moments: None unless they were asked for.
        sketches: None unless they were asked for.
    """

    input_moment: jax.Array | None
    input_product: jax.Array | None
    input_mean: jax.Array
    cotangent_mean: jax.Array
    cotangent_noise: jax.Array
    rows: jax.Array
    examples: jax.Array
    output_moment: jax.Array | None = None
    joint_moments: JointMoments | None = None
    sketches: Sketches | None = None


class Statistics(NamedTuple):
    """What ``curvature_fn`` returns.

    Attributes:
        loss: the loss on the examples measured, scalar.
        layers: statistics by layer path.
        gradient: of the loss on the examples measured, like the parameters; None unless it was
            asked for.
    """

    loss: jax.Array
    layers: dict[str, LayerStatistics]
    gradient: Any = None


def reduce(
    layer: Layer,
    sums: Mapping[str, jax.Array],
    examples: int,
    vector: jax.Array | None = None,
) -> LayerStatistics:
    """Sums to statistics.

    Args:
        layer: whose sums they are.
        sums: over all rows of the batch, x the input without the constant 1 and d its length, each
            with an axis of blocks in front if the layer has blocks: ``inputs``, of x, [d];
            ``cotangents``, of the gradient of the (mean) loss at the output, [d_out];
            ``roundings``, of its squared length times its relative rounding error, [1]; ``rows``,
            their number, []; and, if wanted, ``moment``, of x x^T, [d, d] ([d], its diagonal, for a
            lookup), and ``product``, of x (x . v) for the vector v without its last entry, [d];
            ``output_moment``, of g g^T for g the gradient of the mean loss, [d_out, d_out];
            ``joint_input`` and ``joint_output``, of |g|^2 a a^T and |a|^2 g g^T;
            ``input_sketches``, [q, d], ``cotangent_sketches``, [q, d_out], and ``sketched_rows``,
            [q, 1], of x, g and 1 with signs.
        examples: m, the number of examples.
        vector: v, [*blocks, d_in].
    """

    def of_one(sums: Mapping[str, jax.Array], vector: jax.Array | None) -> LayerStatistics:
        rows, inputs = sums["rows"], sums["inputs"]
        moment, product = sums.get("moment"), sums.get("product")
        output, joint = sums.get("output_moment"), sums.get("joint_input")
        some_rows = jnp.maximum(rows, 1)
        sketches = sums.get("input_sketches")
        if sketches is not None and layer.bias is not None:
            sketches = jnp.concatenate([sketches, sums["sketched_rows"]], axis=-1)
        per_position = examples / some_rows
        moment = None if moment is None else moment / examples
        mean = inputs / some_rows
        if layer.bias is not None:
            mean = jnp.append(mean, rows / some_rows)
            if moment is not None:
                moment = _bordered(moment, mean * (some_rows / examples))
            if product is not None and vector is not None:
                last = jnp.dot(inputs, vector[:-1]) + rows * vector[-1]
                product = jnp.append(product + inputs * vector[-1], last)
        return LayerStatistics(
            input_moment=moment,
            input_product=None if product is None else product / examples,
            input_mean=mean,
            cotangent_mean=sums["cotangents"] * per_position,
            cotangent_noise=jnp.sqrt(sums["roundings"][0]) * per_position,
            rows=rows,
            examples=jnp.full_like(rows, examples),
            output_moment=None if output is None else output * (examples**2 / some_rows),
            joint_moments=None
            if joint is None
            else JointMoments(joint * examples, sums["joint_output"] * examples),
            sketches=None
            if sketches is None
            else Sketches(
                sketches * per_position, sums["cotangent_sketches"] * (examples * per_position)
            ),
        )

    return layer.over_blocks(of_one)(dict(sums), vector)


def _bordered(matrix: jax.Array, border: jax.Array) -> jax.Array:
    """A symmetric matrix with one more row and column, [d, d] and [d + 1] to [d + 1, d + 1].

    Written so that XLA does it on the way to what comes next; `jnp.block` costs two copies.
    """
    is_last = jnp.arange(len(border)) == len(matrix)
    bordered = jnp.where(is_last[None, :], border[:, None], jnp.pad(matrix, (0, 1)))
    return jnp.where(is_last[:, None], border[None, :], bordered)


def is_usable(vector: jax.Array) -> jax.Array:
    """Whether all numbers of a vector [d] are finite and may be squared and summed.

    In float32 that is up to 1e19 or so. What the factors form next of a larger one overflows, in
    this step and, where it has entered an average, in hundreds of steps to come.
    """
    return jnp.isfinite(jnp.sum(vector * vector))


def running_average(old: jax.Array, new: jax.Array, decay: Any) -> jax.Array:
    """``decay old + (1 - decay) new`` in the dtype of ``old``; not bias-corrected."""
    return (decay * old + (1 - decay) * new).astype(old.dtype)
