"""The U-Net of DDPM (Ho et al. 2020, appendix B), with the label and the variance of iDDPM.

Per level of resolution `num_blocks` residual blocks, each told the timestep, with self-attention at
chosen heights; then the same levels upwards with one block more, each consuming a skip connection.
As in DDPM the embedding is added (iDDPM can also scale by it), so that the number of parameters is
that of the paper: 35,746,307 for its CIFAR-10 model.
"""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from diffusion_jax.errors import choose, require
from diffusion_jax.models.layers.conv import Conv3x3
from diffusion_jax.models.layers.norm import GroupNorm
from diffusion_jax.models.layers.upsample import upsample
from diffusion_jax.models.mlp import ZERO, Embedding, glorot, linear

Keys = Key[Array, " B"] | None  # of dropout, one per example; None: no dropout
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
conv = functools.partial(nnx.Conv, kernel_size=(3, 3), kernel_init=glorot)
conv3x3 = functools.partial(Conv3x3, kernel_size=(3, 3), kernel_init=glorot)


class UNet(nnx.Module):
    """The network eps(x_t, t): one output per input, or two with a learned variance.

    Args:
        shape: of an image, (height, width, channels).
        num_classes: of the data set, None if it has no labels.
        learned_variance: a second output follows the first along the last axis.
        width: channels of the first level; the embedding has four times as many.
        channel_multipliers: channels of each level, in widths.
        num_blocks: residual blocks per level; on the way up one more.
        attention_resolutions: image heights with self-attention; the lowest, in the middle, always.
        head_channels: channels of an attention head.
        dropout: rate, before the second convolution of each residual block.
        class_conditional: add an embedding of the label, or of "no class", to the timestep's.
        dtype: of the computation; parameters, norms, softmax and the output are float32.

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
        multipliers = "config.model.channel_multipliers", channel_multipliers
        levels = len(channel_multipliers)
        require(levels > 0, *multipliers, "of length 1 at least")
        require(min(channel_multipliers) > 0, *multipliers, "integers of at least 1")
        # The power of two in the height and the width says how often they can be halved.
        factor = math.gcd(*shape[:2]) & -math.gcd(*shape[:2])
        allowed = f"of length {factor.bit_length()} or less for images of shape {shape}"
        require(levels <= factor.bit_length(), *multipliers, allowed)
        require(num_blocks > 0, "config.model.num_blocks", num_blocks, "at least 1")
        require(0 <= dropout < 1, "config.model.dropout", dropout, "at least 0 and less than 1")
        self.dtype = choose("config.model.dtype", dtype, DTYPES, "dtype")

        channels = [width * multiplier for multiplier in channel_multipliers]
        heights = [shape[0] >> level for level in range(levels)]
        attends = [height in attention_resolutions for height in heights]
        resolutions = "config.model.attention_resolutions", attention_resolutions
        allowed = f"among the image heights that occur, {heights}"
        require(set(attention_resolutions) <= set(heights), *resolutions, allowed)
        for c in {channels[-1], *itertools.compress(channels, attends)}:
            fits = head_channels > 0 and c % head_channels == 0
            allowed = f"a divisor of the {c} channels where there is attention"
            require(fits, "config.model.head_channels", head_channels, allowed)

        options = {"dtype": self.dtype, "rngs": rngs}
        numbers = itertools.count()  # every dropout layer has its own

        def block(c_in: int, c_out: int, attention: bool) -> Block:
            heads = c_out // head_channels if attention else 0
            return Block(c_in, c_out, 4 * width, heads, dropout, next(numbers), **options)

        self.embedding = Embedding(width, num_classes if class_conditional else None, rngs=rngs)
        self.stem = conv(shape[2], width, **options)

        self.down, self.downsample = nnx.List(), nnx.List()
        c, skips = width, [width]
        for level in range(levels):
            if level > 0:
                self.downsample.append(conv(c, c, strides=2, **options))
                skips.append(c)
            self.down.append(nnx.List())
            for _ in range(num_blocks):
                self.down[-1].append(block(c, channels[level], attends[level]))
                c = channels[level]
                skips.append(c)

        self.middle = nnx.List([block(c, c, True), block(c, c, False)])

        self.up, self.upsample = nnx.List(), nnx.List()
        for level in reversed(range(levels)):
            self.up.append(nnx.List())
            for _ in range(num_blocks + 1):
                self.up[-1].append(block(c + skips.pop(), channels[level], attends[level]))
                c = channels[level]
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
        """The output, float32; the keys, one per example, switch dropout on."""
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


class Block(nnx.Module):
    """A residual block and, with heads > 0, the self-attention after it."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        c_emb: int,
        heads: int,
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
        trains = keys is not None  # then there is reverse mode only
        h = self.conv_1(self.norm_1.silu(x, trains), trains)
        h = h + self.embedding(embedding)[:, None, None]
        h = self.conv_2(dropout(self.norm_2.silu(h, trains), self.rate, self.number, keys), trains)
        h = h + (x if self.skip is None else self.skip(x))
        return h if self.attention is None else self.attention(h)


class Attention(nnx.Module):
    """x + proj(softmax(q k' / sqrt(d)) v) over all pixels, d the channels of a head."""

    def __init__(self, channels: int, heads: int, **options: Any) -> None:
        self.heads = heads
        self.norm = GroupNorm(channels)
        self.qkv = linear(channels, 3 * channels, **options)
        self.proj = linear(channels, channels, **options | {"kernel_init": ZERO})

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """Every pixel attends to every pixel of its image."""
        batch, height, width, channels = x.shape
        d = channels // self.heads
        qkv = self.qkv(self.norm(x)).reshape(batch, height * width, 3, self.heads, d)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
        weights = nnx.softmax(logits / math.sqrt(d)).astype(v.dtype)
        return x + self.proj(jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape))


class Upsample(nnx.Module):
    """Nearest-neighbour upsampling by 2, then a 3x3 convolution, in one."""

    def __init__(self, channels: int, **options: Any) -> None:
        self.conv = conv(channels, channels, **options)

    def __call__(
        self, x: Float[Array, "B H W C"], is_training: bool
    ) -> Float[Array, "B 2*H 2*W C"]:
        """Twice the height and the width, the same channels."""
        h = upsample(x, self.conv.kernel[...], is_training)
        return h + self.conv.bias[...][None, None, None].astype(x.dtype)


def dropout(
    h: Float[Array, " B *dims"], rate: float, number: int, keys: Keys
) -> Float[Array, " B *dims"]:
    """Zero a share `rate` of each example by its own key, the same in whatever batch it is."""
    if keys is None or rate == 0:
        return h

    def keep(key: Key[Array, ""]) -> Array:
        return jax.random.bernoulli(jax.random.fold_in(key, number), 1 - rate, h.shape[1:])

    return jnp.where(jax.vmap(keep)(keys), h / (1 - rate), 0).astype(h.dtype)
