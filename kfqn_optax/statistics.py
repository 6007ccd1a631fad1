"""Statistics: what one pass over a batch is reduced to, layer by layer.

The scale is undone here, and only here. A layer's input is a (with a trailing 1 if it has a bias),
on m examples of T positions each (a dense layer on vectors: T = 1; on sequences: their length; a
module called K times: K times as many). The user's loss is a mean over the examples, so what
backpropagation brings to the layer's output is ``g / m``, with ``g = d f_n / d h`` the gradient of
one example's loss. From sums over all rows (examples and positions) we make

    input_moment    A = (1/m)   sum of a a^T     mean over examples, sum over positions
    input_mean      a = (1/(mT)) sum of a        mean over both
    cotangent_mean  g = (1/(mT)) sum of g        mean over both

(arXiv 2006.08877; arXiv 2102.06737 for the positions.)
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfqn_optax.layers import Layer


class LayerStatistics(NamedTuple):
    """One layer on one batch, in the dtype of the factors.

    Attributes:
        input_moment: A, [d_in, d_in].
        input_mean: mean input with a trailing 1 if there is a bias, [d_in].
        cotangent_mean: mean gradient of an example's loss at the layer's output, [d_out].
        rows: number of rows, m times T; 0 if the loss does not depend on this layer.
        examples: m.
    """

    input_moment: jax.Array
    input_mean: jax.Array
    cotangent_mean: jax.Array
    rows: jax.Array
    examples: jax.Array


class Statistics(NamedTuple):
    """What ``curvature_fn`` returns.

    Attributes:
        loss: the loss on the examples measured, scalar.
        layers: statistics by layer path.
    """

    loss: jax.Array
    layers: dict[str, LayerStatistics]


class Sums(NamedTuple):
    """Sums over the rows that pass through a layer, as capture collects them.

    Attributes:
        moment: sum of x x^T, [d, d], x the input without the constant 1.
        inputs: sum of x, [d].
        cotangents: sum of the gradient of the (mean) loss at the output, [d_out].
        rows: number of rows, [1].
    """

    moment: jax.Array
    inputs: jax.Array
    cotangents: jax.Array
    rows: jax.Array


def zero_sums(layer: Layer, dtype: jnp.dtype) -> Sums:
    """Sums over no rows at all."""
    d = layer.d_in - layer.bias
    return Sums(
        moment=jnp.zeros((d, d), dtype),
        inputs=jnp.zeros((d,), dtype),
        cotangents=jnp.zeros((layer.d_out,), dtype),
        rows=jnp.zeros((1,), dtype),
    )


def reduce(layer: Layer, sums: Sums, examples: int) -> LayerStatistics:
    """Sums to statistics.

    Args:
        layer: whose sums they are.
        sums: over all rows of the batch.
        examples: m, the number of examples.
    """
    rows = sums.rows[0]
    some_rows = jnp.maximum(rows, 1)
    moment, inputs = sums.moment, sums.inputs
    if layer.bias:
        moment = jnp.block([[moment, inputs[:, None]], [inputs[None, :], rows]])
        inputs = jnp.append(inputs, rows)
    return LayerStatistics(
        input_moment=moment / examples,
        input_mean=inputs / some_rows,
        cotangent_mean=sums.cotangents * (examples / some_rows),
        rows=rows,
        examples=jnp.full_like(rows, examples),
    )


def running_average(old: jax.Array, new: jax.Array, decay: Any) -> jax.Array:
    """``decay old + (1 - decay) new`` in the dtype of ``old``; not bias-corrected."""
    return (decay * old + (1 - decay) * new).astype(old.dtype)
