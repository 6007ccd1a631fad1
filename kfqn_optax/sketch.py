"""Sketches: sums over the examples of a batch with random signs.

One mean over a batch tells how the examples move together. ``v = m^-1/2 sum of e_i v_i``, with
signs e_i drawn at random, has the second moment of the examples for its expected ``v v^T``: a few
such sums tell in which directions the examples differ.

The signs are constants, the same in every step, since batches are drawn anew anyway. So they need
no random key, and all layers, all passes and all devices agree on them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np


@functools.lru_cache(maxsize=64)
def signs(examples: int, count: int) -> np.ndarray:
    """Signs over the square root of m, [m, q], float64: columns of length 1, nearly orthogonal.

    Args:
        examples: m.
        count: q, the number of sketches.
    """
    drawn = np.random.default_rng(20_2006).choice([-1.0, 1.0], (examples, count))
    return drawn / np.sqrt(examples)


def sketch(rows: jax.Array, examples: int, count: int) -> jax.Array:
    """Sketches of sums over positions, [q, d] or [G, q, d].

    Args:
        rows: [m T, d] or [m T, G, d], the rows of an example side by side.
        examples: m.
        count: q.
    """
    totals = jnp.sum(rows.reshape(examples, -1, *rows.shape[1:]), axis=1)
    weights = jnp.asarray(signs(examples, count), rows.dtype)
    return jnp.einsum("m...d,mq->...qd", totals, weights, precision=jax.lax.Precision.HIGHEST)
