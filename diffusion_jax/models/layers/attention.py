"""Self-attention over the pixels of an image."""

import math
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from diffusion_jax.models.layers.linear import ZERO, linear
from diffusion_jax.models.layers.norm import GroupNorm


class Attention(nnx.Module):
    """Multi-head self-attention over the pixels of an image, with a residual connection.

    x + proj(softmax(q k' / sqrt(d)) v), where q, k and v are linear in the GroupNorm of x and d is
    the number of channels of a head.
    """

    def __init__(self, channels: int, heads: int, **options: Any) -> None:
        self.heads = heads
        self.norm = GroupNorm(channels)
        self.qkv = linear(channels, 3 * channels, **options)
        self.proj = linear(channels, channels, **options | {"kernel_init": ZERO})

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """Every pixel attends to all pixels of its image."""
        batch, height, width, channels = x.shape
        d = channels // self.heads
        qkv = self.qkv(self.norm(x)).reshape(batch, height * width, 3, self.heads, d)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
        weights = nnx.softmax(logits / math.sqrt(d)).astype(v.dtype)
        return x + self.proj(jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape))
