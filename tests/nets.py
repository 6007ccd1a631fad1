"""A small net of dense layers and convolutions, and its rows by hand."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import kfqn_optax as kfqn


class Net(nn.Module):
    """A strided convolution, a grouped one without a bias, two dense layers; [12, 7, 5, 3]."""

    @nn.compact
    def __call__(self, x):
        kind = {"dtype": jnp.float64, "param_dtype": jnp.float64}
        x = nn.tanh(nn.Conv(4, (3, 2), strides=2, name="conv", **kind)(x))
        x = nn.tanh(
            nn.Conv(4, (2, 2), feature_group_count=2, use_bias=False, name="groups", **kind)(x)
        )
        x = nn.tanh(nn.Dense(5, name="wide", **kind)(x.reshape(len(x), -1)))
        return nn.Dense(3, name="out", **kind)(x)


NET = Net()


def net_loss(params, x, targets):
    return 0.5 * jnp.mean(jnp.sum((NET.apply(params, x) - targets) ** 2, axis=-1))


def batch_of(seed, examples=4):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(examples, 6, 5, 2))), jnp.asarray(
        rng.normal(size=(examples, 3))
    )


SHAPES = {"conv": (1, 3, 3, 4), "groups": (1, 3, 3, 4), "wide": (1, 5), "out": (1, 3)}


def _example_loss(zeros, params, x, t):
    """The loss of one example, zeros added to the layers' outputs; the layers' inputs."""
    p = params["params"]

    def conv(x, name, groups, strides):
        kernel, axes = p[name]["kernel"], ("NHWC", "HWIO", "NHWC")
        return zeros[name] + jax.lax.conv_general_dilated(
            x, kernel, strides, "SAME", dimension_numbers=axes, feature_group_count=groups
        )

    seen = {"conv": x[None]}
    x = jnp.tanh(conv(seen["conv"], "conv", 1, (2, 2)) + p["conv"]["bias"].reshape(1, 1, 1, -1))
    seen["groups"] = x
    seen["wide"] = jnp.tanh(conv(x, "groups", 2, (1, 1))).reshape(1, -1)
    wide, out = p["wide"], p["out"]
    x = jnp.tanh(seen["wide"] @ wide["kernel"] + wide["bias"][None] + zeros["wide"])
    seen["out"] = x
    x = x @ out["kernel"] + out["bias"][None] + zeros["out"]
    return 0.5 * jnp.sum((x - t[None]) ** 2), seen


_of_each = jax.jit(jax.vmap(jax.grad(_example_loss, has_aux=True), in_axes=(None, None, 0, 0)))


def rows_of(params, x, targets):
    """By layer, blocks of (a, g): rows [examples, positions, d], from one example after the other.

    The cotangents are gradients with respect to zeros added to the layers' outputs, the patches of
    the convolutions are cut out by hand.
    """
    zeros = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
    cotangents, seen = jax.tree.map(np.asarray, _of_each(zeros, params, x, targets))

    def patches(images, window, strides):
        n, _, height, width, _ = images.shape
        sizes = [-(-size // stride) for size, stride in zip((height, width), strides, strict=True)]
        pads = [
            max((out - 1) * stride + k - size, 0)
            for out, stride, k, size in zip(sizes, strides, window, (height, width), strict=True)
        ]
        images = np.pad(images[:, 0], [(0, 0), *[(p // 2, p - p // 2) for p in pads], (0, 0)])
        rows = [
            images[:, i * strides[0] :][:, : window[0], j * strides[1] :][:, :, : window[1]]
            for i in range(sizes[0])
            for j in range(sizes[1])
        ]
        return np.stack(rows, axis=1)  # [n, positions, *window, channels]

    def ones(rows):
        return np.concatenate([rows, np.ones((*rows.shape[:-1], 1))], axis=-1)

    n = len(x)
    of_conv = patches(seen["conv"], (3, 2), (2, 2)).reshape(n, 9, -1)
    of_groups = patches(seen["groups"], (2, 2), (1, 1))
    g = cotangents["groups"].reshape(n, 9, 4)
    return {
        "params/conv": [(ones(of_conv), cotangents["conv"].reshape(n, 9, 4))],
        "params/groups": [
            (of_groups[..., :2].reshape(n, 9, -1), g[..., :2]),
            (of_groups[..., 2:].reshape(n, 9, -1), g[..., 2:]),
        ],
        "params/wide": [(ones(seen["wide"]), cotangents["wide"])],
        "params/out": [(ones(seen["out"]), cotangents["out"])],
    }


def embedding_layer():
    model = nn.Embed(6, 3, param_dtype=jnp.float64, dtype=jnp.float64)
    tokens = jnp.asarray([[0, 1], [1, 5], [1, 1]])
    params = model.init(jax.random.key(0), tokens)

    def loss_fn(params, tokens):
        return jnp.mean(jnp.sum(model.apply(params, tokens) ** 2, axis=(1, 2)))

    return loss_fn, params, tokens, kfqn.find_layers(loss_fn, params, tokens)
