"""The embedding of the timestep and the label."""

import functools
import math

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from diffusion_jax.errors import require
from diffusion_jax.models.layers.linear import linear
from diffusion_jax.models.pure import uniform


class Embedding(nnx.Module):
    """Sinusoidal embedding of the timestep with two dense layers, plus a vector for the label.

    It is computed in float32. The label ``num_classes`` means "no class".
    """

    def __init__(self, width: int, num_classes: int | None, *, rngs: nnx.Rngs) -> None:
        self.width = width
        self.linear_1 = linear(width, 4 * width, rngs=rngs)
        self.linear_2 = linear(4 * width, 4 * width, rngs=rngs)
        # U(-sqrt(3), sqrt(3)) has unit variance, as the embedding of iDDPM's code.
        unit = uniform(nnx.initializers.constant(math.sqrt(3)))
        embed = functools.partial(nnx.Embed, embedding_init=unit, rngs=rngs)
        self.label = None if num_classes is None else embed(num_classes + 1, 4 * width)

    def __call__(
        self, timestep: Float[Array, " B"], label: Int[Array, " B"] | None
    ) -> Float[Array, "B E"]:
        """The sum of both embeddings, of length E = 4 width."""
        # cos(w t) and sin(w t), w = 10000^(-i / half) for i < half (Vaswani et al. 2017)
        half = self.width // 2
        w = jnp.exp(-math.log(10_000) / half * jnp.arange(half))
        angle = timestep.astype(jnp.float32)[:, None] * w[None]
        waves = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
        h = self.linear_2(nnx.silu(self.linear_1(waves)))
        if self.label is None:
            return h
        if label is None:
            require(False, "label", label, "one per example of a class-conditional model")
        return h + self.label(label)
