"""Tiny linen models and losses for the tests."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn


class Mlp(nn.Module):
    """Dense layers, relu after the named ones.

    Attributes:
        widths: output width of each layer.
        activations: "relu" or "linear" for each layer; relu on all but the last by default.
        dtype: of parameters and computation.
        bias: whether layers have one.
    """

    widths: Sequence[int]
    activations: Sequence[str] | None = None
    dtype: jnp.dtype = jnp.float64
    bias: bool = True

    @nn.compact
    def __call__(self, x):
        activations = self.activations or ["relu"] * (len(self.widths) - 1) + ["linear"]
        for width, activation in zip(self.widths, activations, strict=True):
            x = nn.Dense(width, use_bias=self.bias, param_dtype=self.dtype, dtype=self.dtype)(x)
            x = nn.relu(x) if activation == "relu" else x
        return x


def loss_of(model, name="half_mse"):
    """A mean loss ``(params, x, targets)`` over the first axis, summed over all others."""

    def loss_fn(params, x, targets):
        out = model.apply(params, x)
        if name == "bce":
            losses = optax.sigmoid_binary_cross_entropy(out, targets)
        else:
            losses = 0.5 * (out - targets) ** 2
        return jnp.mean(jnp.sum(losses.reshape(len(losses), -1), axis=-1))

    return loss_fn


def problem(widths=(4, 3), d_in=5, batch=8, dtype=jnp.float64, seed=0, **model_options):
    """A small regression: loss_fn, params, x, targets."""
    model = Mlp(widths, dtype=dtype, **model_options)
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(batch, d_in)), dtype)
    targets = jnp.asarray(rng.normal(size=(batch, widths[-1])), dtype)
    params = model.init(jax.random.key(seed), x)
    return loss_of(model), params, x, targets


def relative(actual, expected):
    """Largest difference relative to the largest entry expected."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-300)
