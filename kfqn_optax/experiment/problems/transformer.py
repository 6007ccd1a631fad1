"""A small transformer that predicts the next character at every place, in linen and in NNX.

Blocks of causal self-attention and of a network four times as wide, each behind a layer norm and
added to what came in; sinusoidal positions. The head is a dense layer of its own, or the embedding
again (tied).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from kfqn_optax.experiment.datasets import text
from kfqn_optax.experiment.problems.classifier import LinenClassifier, NnxClassifier


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of the network, the same in both frameworks.

    Attributes:
        symbols: the number of different characters.
        depth: the number of blocks.
        width: the length of the vector that stands for a character.
        heads: the number of attention heads.
        tied: whether the head is the embedding's transpose.
        dropout: the share of a block's outputs set to zero in training.
    """

    symbols: int = len(text.ALPHABET)
    depth: int = 4
    width: int = 128
    heads: int = 4
    tied: bool = False
    dropout: float = 0.1

    def describe(self) -> str:
        """Returns the network in a few words."""
        head = "tied" if self.tied else "untied"
        return f"transformer of depth {self.depth} and width {self.width}, {head} head"


def sinusoids(length: int, width: int) -> np.ndarray:
    """Sines and cosines of the position, at wavelengths from 2 pi to 20,000 pi.

    Args:
        length: the number of positions.
        width: an even number.

    Returns:
        float32 [1, length, width], the sines first.
    """
    rates = 10_000.0 ** (-np.arange(0, width, 2) / width)
    angles = np.arange(length)[:, None] * rates
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1).astype(np.float32)[None]


class LinenBlock(nn.Module):
    """One block in linen."""

    sizes: Sizes

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, train: bool) -> jax.Array:
        """Maps [batch, length, width] to the same shape."""
        width, heads = self.sizes.width, self.sizes.heads
        dropout = nn.Dropout(self.sizes.dropout, deterministic=not train)
        y = nn.LayerNorm(name="attention_norm")(x)
        y = nn.MultiHeadDotProductAttention(heads, qkv_features=width, name="attention")(
            y, mask=mask
        )
        x = x + dropout(y)
        y = nn.LayerNorm(name="mlp_norm")(x)
        y = nn.gelu(nn.Dense(4 * width, name="mlp_in")(y))
        return x + dropout(nn.Dense(width, name="mlp_out")(y))


class LinenTransformer(nn.Module):
    """The network in linen."""

    sizes: Sizes

    @nn.compact
    def __call__(self, characters: jax.Array, train: bool = False) -> jax.Array:
        """Maps characters [batch, length] to logits [batch, length, symbols]."""
        sizes = self.sizes
        embed = nn.Embed(sizes.symbols, sizes.width, name="embed")
        x = embed(characters) * sizes.width**0.5 + sinusoids(characters.shape[1], sizes.width)
        mask = nn.make_causal_mask(characters[:1])
        for number in range(sizes.depth):
            x = LinenBlock(sizes, name=f"blocks_{number}")(x, mask, train)
        x = nn.LayerNorm(name="norm")(x)
        return embed.attend(x) if sizes.tied else nn.Dense(sizes.symbols, name="head")(x)


class NnxBlock(nnx.Module):
    """One block in NNX."""

    def __init__(self, sizes: Sizes, rngs: nnx.Rngs):
        width = sizes.width
        self.attention_norm = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            sizes.heads, width, decode=False, rngs=rngs, keep_rngs=False
        )
        self.mlp_norm = nnx.LayerNorm(width, rngs=rngs)
        self.mlp_in = nnx.Linear(width, 4 * width, rngs=rngs)
        self.mlp_out = nnx.Linear(4 * width, width, rngs=rngs)
        self.dropout = nnx.Dropout(sizes.dropout, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Maps [batch, length, width] to the same shape."""
        x = x + self.dropout(self.attention(self.attention_norm(x), mask=mask))
        return x + self.dropout(self.mlp_out(nnx.gelu(self.mlp_in(self.mlp_norm(x)))))


class NnxTransformer(nnx.Module):
    """The network in NNX."""

    def __init__(self, rngs: nnx.Rngs, sizes: Sizes):
        self.sizes = sizes
        self.embed = nnx.Embed(sizes.symbols, sizes.width, rngs=rngs)
        self.blocks = nnx.List([NnxBlock(sizes, rngs) for _ in range(sizes.depth)])
        self.norm = nnx.LayerNorm(sizes.width, rngs=rngs)
        if not sizes.tied:
            self.head = nnx.Linear(sizes.width, sizes.symbols, rngs=rngs)

    def __call__(self, characters: jax.Array) -> jax.Array:
        """Maps characters [batch, length] to logits [batch, length, symbols]."""
        width = self.sizes.width
        x = self.embed(characters) * width**0.5 + sinusoids(characters.shape[1], width)
        mask = nnx.make_causal_mask(characters[:1])
        for block in self.blocks:
            x = block(x, mask)
        x = self.norm(x)
        return self.embed.attend(x) if self.sizes.tied else self.head(x)


def linen_problem(sizes: Sizes) -> LinenClassifier:
    """Returns the problem in linen."""
    inputs = jax.ShapeDtypeStruct((text.CONTEXT,), jnp.int32)
    return LinenClassifier(LinenTransformer(sizes), inputs, f"{sizes.describe()}, linen")


def nnx_problem(sizes: Sizes) -> NnxClassifier:
    """Returns the problem in NNX."""
    make = functools.partial(NnxTransformer, sizes=sizes)
    return NnxClassifier(make, f"{sizes.describe()}, NNX")
