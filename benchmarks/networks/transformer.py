"""A transformer for text by characters."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from benchmarks.networks.small import Norm

_NORMS = ("none", "layer")


class CharTransformer(nn.Module):
    """Decoder-only causal transformer with pre-norm blocks.

    Each block adds causal attention and a GELU network of four times the width to the residual
    stream. Layer normalization is that of each token alone, over its features; positions are
    learned. Without normalization, the kernels that write to the stream start with a variance
    1 / (2 depth) times the usual, so that the stream's variance does not grow with the depth.

    Attributes:
      vocabulary: Number of characters.
      width: Of the residual stream.
      depth: Number of blocks.
      heads: Number of attention heads; divides `width`.
      context: Largest length of a text.
      norm: `'none'` or `'layer'`.
    """

    vocabulary: int
    width: int = 64
    depth: int = 2
    heads: int = 4
    context: int = 128
    norm: Norm = "none"

    @nn.compact
    def __call__(self, x: Int[Array, "n t"], train: bool = False) -> Float[Array, "n t vocabulary"]:
        """Logits of the character after each of `x`; the same in training and evaluation.

        Raises:
          ValueError: For other normalizations, or a text longer than the context.
        """
        if self.norm not in _NORMS:
            msg = (
                f"`norm` must be one of {_NORMS} in a transformer, got {self.norm!r}: moments over "
                "batch or positions would let a token see later ones"
            )
            raise ValueError(msg)
        length = x.shape[1]
        if length > self.context:
            msg = (
                f"`x` must be no longer than `context` = {self.context}, got length {length}; "
                "shorten the texts or choose a larger context"
            )
            raise ValueError(msg)

        mask = nn.make_causal_mask(x)
        stream = nn.Embed(self.vocabulary, self.width)(x)
        stream = stream + nn.Embed(self.context, self.width)(jnp.arange(length))[None]
        share = 1.0 if self.norm == "layer" else 1 / (2 * self.depth)
        out_init = nn.initializers.variance_scaling(share, "fan_in", "truncated_normal")
        for _ in range(self.depth):
            attention = nn.MultiHeadDotProductAttention(self.heads, out_kernel_init=out_init)
            stream = stream + attention(self._normalize(stream), mask=mask)
            hidden = nn.gelu(nn.Dense(4 * self.width)(self._normalize(stream)))
            stream = stream + nn.Dense(self.width, kernel_init=out_init)(hidden)
        return nn.Dense(self.vocabulary)(self._normalize(stream))

    def _normalize(self, x: Float[Array, "n t width"]) -> Float[Array, "n t width"]:
        return nn.LayerNorm()(x) if self.norm == "layer" else x
