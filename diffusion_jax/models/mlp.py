"""A residual network for points, and what the U-Net shares with it: dense layers, the embedding."""

import functools
import math

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from diffusion_jax.errors import require
from diffusion_jax.models.pure import uniform


@uniform
def glorot(key: Key[Array, ""], shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """The half-width of Glorot's uniform distribution: sqrt(6 / (fan in + fan out))."""
    del key
    receptive, c_in, c_out = math.prod(shape[:-2]), *shape[-2:]
    return jnp.full(shape, math.sqrt(6 / (receptive * (c_in + c_out))), dtype)


ZERO = nnx.initializers.zeros_init()
linear = functools.partial(nnx.Linear, kernel_init=glorot)  # of the last axis: a 1x1 convolution


class MLP(nnx.Module):
    """The network eps(x_t, t) for points: residual layers, each told the timestep.

    Args:
        shape: of a point, (dimensions,).
        num_classes: of the data set, None if it has no labels.
        learned_variance: a second output follows the first along the last axis.
        width: units of a layer; the embedding has four times as many.
        num_layers: residual layers.
        class_conditional: add an embedding of the label, or of "no class", to the timestep's.

    Raises:
        ConfigError: a field has a value that no network can be built from.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        num_classes: int | None,
        learned_variance: bool,
        *,
        width: int,
        num_layers: int,
        class_conditional: bool,
        rngs: nnx.Rngs,
    ) -> None:
        require(len(shape) == 1, "config.model.name", "mlp", f"'unet' for data of shape {shape}")
        allowed = "even and at least 2"
        require(width > 0 and width % 2 == 0, "config.model.width", width, allowed)
        require(num_layers > 0, "config.model.num_layers", num_layers, "at least 1")
        self.embedding = Embedding(width, num_classes if class_conditional else None, rngs=rngs)
        self.stem = linear(shape[0], width, rngs=rngs)
        self.layers = nnx.List(Layer(width, rngs=rngs) for _ in range(num_layers))
        self.out = linear(width, shape[0] * (1 + learned_variance), kernel_init=ZERO, rngs=rngs)

    def __call__(
        self,
        x_t: Float[Array, "B D"],
        timestep: Float[Array, " B"],
        label: Int[Array, " B"] | None,
        keys: Key[Array, " B"] | None,
    ) -> Float[Array, "B D_out"]:
        """The output; there is no dropout, so the keys have no effect."""
        embedding = nnx.silu(self.embedding(timestep, label))
        h = self.stem(x_t)
        for layer in self.layers:
            h = layer(h, embedding)
        return self.out(nnx.silu(h))


class Layer(nnx.Module):
    """h + W_2 silu(W_1 silu(h) + W_e embedding)."""

    def __init__(self, width: int, *, rngs: nnx.Rngs) -> None:
        self.linear_1 = linear(width, width, rngs=rngs)
        self.embedding = linear(4 * width, width, rngs=rngs)
        self.linear_2 = linear(width, width, rngs=rngs)

    def __call__(
        self, h: Float[Array, "B W"], embedding: Float[Array, "B E"]
    ) -> Float[Array, "B W"]:
        """The next h; E is the length of the embedding."""
        hidden = self.linear_1(nnx.silu(h)) + self.embedding(embedding)
        return h + self.linear_2(nnx.silu(hidden))


class Embedding(nnx.Module):
    """Sinusoids of the timestep through two layers, plus a vector per class; in float32.

    The vector after those of the classes, number ``num_classes``, is that of no class.
    """

    def __init__(self, width: int, num_classes: int | None, *, rngs: nnx.Rngs) -> None:
        self.width = width
        self.linear_1 = linear(width, 4 * width, rngs=rngs)
        self.linear_2 = linear(4 * width, 4 * width, rngs=rngs)
        unit = uniform(
            nnx.initializers.constant(math.sqrt(3))
        )  # of unit variance, as in iDDPM's code
        embed = functools.partial(nnx.Embed, embedding_init=unit, rngs=rngs)
        self.label = None if num_classes is None else embed(num_classes + 1, 4 * width)

    def __call__(
        self, timestep: Float[Array, " B"], label: Int[Array, " B"] | None
    ) -> Float[Array, "B E"]:
        """The sum of the two, of length E = 4 width."""
        # cos(w t) and sin(w t) for w from 1 down to 1/10000 (Vaswani et al. 2017)
        half = self.width // 2
        w = jnp.exp(-math.log(10_000) / half * jnp.arange(half))
        angle = timestep.astype(jnp.float32)[:, None] * w[None]
        waves = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
        h = self.linear_2(nnx.silu(self.linear_1(waves)))
        if self.label is None:
            return h
        if label is None:
            raise ValueError("label = None: a class-conditional model needs a label per example")
        return h + self.label(label)
