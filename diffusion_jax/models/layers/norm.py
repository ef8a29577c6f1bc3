"""Group normalisation, alone and fused with the SiLU after it.

JAX's own gradient of ``norm_silu`` stores five arrays of the size of the input for the backward
pass. ``lean_norm_silu`` is the same function with its own gradient, which stores only the input and
a few numbers per channel. A training step then needs two fifths less temporary memory
(docs/BENCHMARKS.md). ``lean_norm_silu`` does not support ``jax.jvp``.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

EPSILON = 1e-5
Images = Float[Array, "B H W C"]
OfChannels = Float[Array, "B C"]
Weights = Float[Array, " C"]
Residuals = tuple[Images, OfChannels, OfChannels, Weights, Weights]


def group_mean(groups: int, values: OfChannels) -> OfChannels:
    """The mean over each group of adjacent channels, repeated for each channel of the group."""
    split = values.reshape(values.shape[0], groups, -1)
    mean = split.mean(2, keepdims=True)
    return jnp.broadcast_to(mean, split.shape).reshape(values.shape)


def moments(groups: int, x: Images) -> tuple[OfChannels, OfChannels]:
    """For each channel, the mean of its group and 1 / sqrt(variance + epsilon), in float32.

    They are computed from the mean and variance of each channel. So the large sums read memory in
    order, and the variance is no difference of large numbers.
    """
    x = x.astype(jnp.float32)
    mean_c = x.mean((1, 2))
    var_c = jnp.square(x - mean_c[:, None, None]).mean((1, 2))
    mean = group_mean(groups, mean_c)
    var = group_mean(groups, var_c + jnp.square(mean_c - mean))
    return mean, jax.lax.rsqrt(var + EPSILON)


def normalize(x: Images, mean: OfChannels, gain: OfChannels, bias: Weights) -> Images:
    """The affine map (x - mean) gain + bias of every channel, in float32."""
    centred = x.astype(jnp.float32) - mean[:, None, None]
    return centred * gain[:, None, None] + bias[None, None, None]


def norm_silu(groups: int, x: Images, scale: Weights, bias: Weights) -> Images:
    """silu(group_norm(x)), computed in float32 and returned in x's dtype."""
    return _forward(groups, x, scale, bias)[0]


def _forward(groups: int, x: Images, scale: Weights, bias: Weights) -> tuple[Images, Residuals]:
    mean, inverse = moments(groups, x)
    y = nnx.silu(normalize(x, mean, scale[None] * inverse, bias)).astype(x.dtype)
    return y, (x, mean, inverse, scale, bias)


def _backward(groups: int, residuals: Residuals, dy: Images) -> tuple[Images, Weights, Weights]:
    """The gradients for x, scale and bias of y = silu(z), z = scale x^ + bias.

    dz = dy s (1 + z (1 - s)), s = sigmoid(z), and
    dx = (scale dz - mean(scale dz) - x^ mean(scale dz x^)) / deviation. x^ is the normalised input,
    and the means are over the pixels and channels of a group (Wu & He 2018; compare Ioffe & Szegedy
    2015, section 3).
    """
    x, mean, inverse, scale, bias = residuals
    normalized = (x.astype(jnp.float32) - mean[:, None, None]) * inverse[:, None, None]
    z = normalized * scale[None, None, None] + bias[None, None, None]
    s = nnx.sigmoid(z)
    dz = dy.astype(jnp.float32) * s * (1 + z * (1 - s))
    sum_dz, sum_along = dz.sum((1, 2)), (dz * normalized).sum((1, 2))
    num_pixels = x.shape[1] * x.shape[2]
    constant = group_mean(groups, scale[None] * sum_dz)[:, None, None] / num_pixels
    along = group_mean(groups, scale[None] * sum_along)[:, None, None] / num_pixels
    dx = dz * scale[None, None, None] - constant - normalized * along
    dx = (dx * inverse[:, None, None]).astype(x.dtype)
    return dx, sum_along.sum(0), sum_dz.sum(0)


lean_norm_silu = jax.custom_vjp(norm_silu, nondiff_argnums=(0,))
lean_norm_silu.defvjp(_forward, _backward)


class GroupNorm(nnx.Module):
    """Group normalisation: zero mean, unit variance over a group's pixels and channels.

    (Wu & He 2018.) There are at most 32 groups, and more than one only if each has at least 4
    channels; DDPM has 32 groups of 4 at its width of 128. With one channel per group the norm would
    remove the timestep embedding that was added before it.
    """

    def __init__(self, channels: int) -> None:
        most = max(1, min(32, channels // 4))
        self.groups = max(g for g in range(1, most + 1) if channels % g == 0)
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x: Images) -> Images:
        """Normalise each image separately; the computation is in float32."""
        mean, inverse = moments(self.groups, x)
        gain = self.scale[...][None] * inverse
        return normalize(x, mean, gain, self.bias[...]).astype(x.dtype)

    def silu(self, x: Images, lean: bool) -> Images:
        """Normalise, then apply SiLU; ``lean`` saves memory for the gradient, without jax.jvp."""
        function = lean_norm_silu if lean else norm_silu
        return function(self.groups, x, self.scale[...], self.bias[...])
