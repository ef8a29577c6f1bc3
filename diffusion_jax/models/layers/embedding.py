"""The embedding of the timestep and of the label."""

import functools
import math

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from diffusion_jax.errors import require
from diffusion_jax.models.layers.linear import linear
from diffusion_jax.models.pure import uniform


class Embedding(nnx.Module):
    """Sinusoids of the timestep through two layers, plus a vector per class; in float32.

    Label ``num_classes``, with the last vector, means "no class".
    """

    def __init__(self, width: int, num_classes: int | None, *, rngs: nnx.Rngs) -> None:
        self.width = width
        self.linear_1 = linear(width, 4 * width, rngs=rngs)
        self.linear_2 = linear(4 * width, 4 * width, rngs=rngs)
        # of unit variance, as in iDDPM's code
        unit = uniform(nnx.initializers.constant(math.sqrt(3)))
        embed = functools.partial(nnx.Embed, embedding_init=unit, rngs=rngs)
        self.label = None if num_classes is None else embed(num_classes + 1, 4 * width)

    def __call__(
        self, timestep: Float[Array, " B"], label: Int[Array, " B"] | None
    ) -> Float[Array, "B E"]:
        """The sum of the two embeddings, of length E = 4 width."""
        # cos(w t) and sin(w t) for w from 1 down to 1/10000 (Vaswani et al. 2017)
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
