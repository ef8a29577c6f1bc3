"""The U-Net of DDPM (Ho et al. 2020, appendix B), with the label and the variance of iDDPM.

On the way down each level has `num_blocks` residual blocks, with self-attention at some heights.
On the way up it has `num_blocks` + 1, and each reads a skip connection. A block adds the embedding
of the timestep, as in DDPM (iDDPM can also scale by it). The number of parameters is that of the
paper: 35,746,307 for its CIFAR-10 model.
"""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from diffusion_jax.errors import choose, require
from diffusion_jax.models.layers.attention import Attention
from diffusion_jax.models.layers.conv import bias_of
from diffusion_jax.models.layers.embedding import Embedding
from diffusion_jax.models.layers.linear import ZERO, conv, conv3x3, linear
from diffusion_jax.models.layers.norm import GroupNorm
from diffusion_jax.models.layers.upsample import upsample

Keys = Key[Array, " B"] | None  # for dropout, one per example; None: no dropout
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class UNet(nnx.Module):
    """The denoising network for images: its output has the shape of x_t, or twice the channels.

    Args:
        shape: (height, width, channels) of an image.
        num_classes: number of classes of the data set; None if it has no labels.
        learned_variance: whether the output for the variance follows along the last axis.
        width: channels of the first convolution; the embedding has 4 width.
        channel_multipliers: channels of each level, as multiples of width.
        num_blocks: residual blocks of a level on the way down; one more on the way up.
        attention_resolutions: image heights with self-attention; the middle always has it.
        head_channels: channels of an attention head.
        dropout: rate, before the second convolution of each residual block.
        class_conditional: add an embedding of the label, or of "no class", to the timestep's.
        dtype: of the computation; parameters, norms, softmax and the output are float32.

    Raises:
        ConfigError: the value of an argument does not fit the network or the shape.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        num_classes: int | None,
        learned_variance: bool,
        *,
        width: int,
        channel_multipliers: tuple[int, ...],
        num_blocks: int,
        attention_resolutions: tuple[int, ...],
        head_channels: int,
        dropout: float,
        class_conditional: bool,
        dtype: str,
        rngs: nnx.Rngs,
    ) -> None:
        require(len(shape) == 3, "config.model.name", "unet", f"'mlp' for data of shape {shape}")
        require(width > 0 and width % 2 == 0, "config.model.width", width, "even and at least 2")
        require(num_blocks > 0, "config.model.num_blocks", num_blocks, "at least 1")
        require(0 <= dropout < 1, "config.model.dropout", dropout, "at least 0 and less than 1")
        self.dtype = choose("config.model.dtype", dtype, DTYPES, "dtype")
        _check_levels(channel_multipliers, shape)
        channels = [width * multiplier for multiplier in channel_multipliers]
        attends = _attention(channels, shape[0], attention_resolutions, head_channels)

        options = {"dtype": self.dtype, "rngs": rngs}
        count = itertools.count()  # numbers of the dropout layers

        def block(c_in: int, c_out: int, attention: bool) -> Block:
            heads = c_out // head_channels if attention else 0
            return Block(c_in, c_out, 4 * width, heads, rate=dropout, number=next(count), **options)

        self.embedding = Embedding(width, num_classes if class_conditional else None, rngs=rngs)
        self.stem = conv(shape[2], width, **options)

        self.down: nnx.List[nnx.List[Block]] = nnx.List()
        self.downsample: nnx.List[nnx.Conv] = nnx.List()
        c, skips = width, [width]
        for level, c_out in enumerate(channels):
            if level > 0:
                self.downsample.append(conv(c, c, strides=2, **options))
                skips.append(c)
            self.down.append(nnx.List())
            for _ in range(num_blocks):
                self.down[-1].append(block(c, c_out, attends[level]))
                c = c_out
                skips.append(c)

        self.middle = nnx.List([block(c, c, True), block(c, c, False)])

        self.up: nnx.List[nnx.List[Block]] = nnx.List()
        self.upsample: nnx.List[Upsample] = nnx.List()
        for level, c_out in reversed(list(enumerate(channels))):
            self.up.append(nnx.List())
            for _ in range(num_blocks + 1):
                self.up[-1].append(block(c + skips.pop(), c_out, attends[level]))
                c = c_out
            if level > 0:
                self.upsample.append(Upsample(c, **options))

        self.norm = GroupNorm(c)
        self.out = conv(c, shape[2] * (1 + learned_variance), kernel_init=ZERO, rngs=rngs)

    def __call__(
        self,
        x_t: Float[Array, "B H W C"],
        timestep: Float[Array, " B"],
        label: Int[Array, " B"] | None,
        keys: Keys,
    ) -> Float[Array, "B H W C_out"]:
        """The network's output in float32; dropout is applied if there are keys."""
        embedding = nnx.silu(self.embedding(timestep, label))
        h = self.stem(x_t)
        skips = [h]
        for level, blocks in enumerate(self.down):
            if level > 0:
                h = self.downsample[level - 1](h)
                skips.append(h)
            for block in blocks:
                h = block(h, embedding, keys)
                skips.append(h)
        for block in self.middle:
            h = block(h, embedding, keys)
        for level, blocks in enumerate(self.up):
            if level > 0:
                h = self.upsample[level - 1](h, keys is not None)
            for block in blocks:
                h = block(jnp.concatenate([h, skips.pop()], axis=-1), embedding, keys)
        return self.out(self.norm.silu(h.astype(jnp.float32), keys is not None))


def _check_levels(multipliers: tuple[int, ...], shape: tuple[int, ...]) -> None:
    named = "config.model.channel_multipliers", multipliers
    require(len(multipliers) > 0, *named, "of length 1 at least")
    require(min(multipliers) > 0, *named, "integers of at least 1")
    # Every level but the first halves height and width, which must be even each time.
    power = math.gcd(*shape[:2]) & -math.gcd(*shape[:2])
    allowed = f"of length {power.bit_length()} or less for images of shape {shape}"
    require(len(multipliers) <= power.bit_length(), *named, allowed)


def _attention(
    channels: list[int], height: int, resolutions: tuple[int, ...], head_channels: int
) -> list[bool]:
    """Whether the blocks of each level have attention; the middle always has it."""
    heights = [height >> level for level in range(len(channels))]
    allowed = f"among the image heights that occur, {heights}"
    named = "config.model.attention_resolutions", resolutions
    require(set(resolutions) <= set(heights), *named, allowed)
    attends = [height in resolutions for height in heights]
    for c in {channels[-1], *itertools.compress(channels, attends)}:
        fits = head_channels > 0 and c % head_channels == 0
        allowed = f"a divisor of the {c} channels where there is attention"
        require(fits, "config.model.head_channels", head_channels, allowed)
    return attends


class Block(nnx.Module):
    """A residual block, followed by self-attention if heads > 0."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        c_emb: int,
        heads: int,
        *,
        rate: float,
        number: int,
        **options: Any,
    ) -> None:
        self.rate, self.number = rate, number
        self.norm_1 = GroupNorm(c_in)
        self.conv_1 = conv3x3(c_in, c_out, **options)
        self.embedding = linear(c_emb, c_out, **options)
        self.norm_2 = GroupNorm(c_out)
        self.conv_2 = conv3x3(c_out, c_out, **options | {"kernel_init": ZERO})
        self.skip = linear(c_in, c_out, **options) if c_in != c_out else None
        self.attention = Attention(c_out, heads, **options) if heads > 0 else None

    def __call__(
        self, x: Float[Array, "B H W D"], embedding: Float[Array, "B E"], keys: Keys
    ) -> Float[Array, "B H W C"]:
        """The block's output; E is the length of the embedding."""
        trains = keys is not None  # then layers with a lean gradient, without jax.jvp
        h = self.conv_1(self.norm_1.silu(x, trains), trains)
        h = h + self.embedding(embedding)[:, None, None]
        h = self.conv_2(dropout(self.norm_2.silu(h, trains), self.rate, self.number, keys), trains)
        h = h + (x if self.skip is None else self.skip(x))
        return h if self.attention is None else self.attention(h)


class Upsample(nnx.Module):
    """Nearest-neighbour upsampling by 2 and a 3x3 convolution, as one operation."""

    def __init__(self, channels: int, **options: Any) -> None:
        self.conv = conv(channels, channels, **options)

    def __call__(
        self, x: Float[Array, "B H W C"], is_training: bool
    ) -> Float[Array, "B 2*H 2*W C"]:
        """The upsampled images, with twice the height and width and the same channels."""
        h = upsample(x, self.conv.kernel[...], is_training)
        return h + bias_of(self.conv, x.dtype)


def dropout(
    h: Float[Array, " B *dims"], rate: float, number: int, keys: Keys
) -> Float[Array, " B *dims"]:
    """Inverted dropout; a mask depends on the example's key and the layer's number alone."""
    if keys is None or rate == 0:
        return h

    def keep(key: Key[Array, ""]) -> Array:
        return jax.random.bernoulli(jax.random.fold_in(key, number), 1 - rate, h.shape[1:])

    return jnp.where(jax.vmap(keep)(keys), h / (1 - rate), 0).astype(h.dtype)
