"""Nearest-neighbour upsampling by 2 and the 3x3 convolution after it, as one function.

A 3x3 window of the large image covers only 2x2 pixels of the small image, some more than once. For
the four outputs of a pixel, ``plain`` needs 36 products, ``phases`` 16 and ``nine_products`` 9.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion_jax.models.layers import conv
from diffusion_jax.models.layers.conv import Images, Kernel

Large = Float[Array, "B 2*H 2*W D"]


def plain(x: Images, kernel: Kernel) -> Large:
    """Repeat each pixel twice along both axes, then apply ``conv.plain``."""
    return conv.plain(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2), kernel)


def phases(x: Images, kernel: Kernel) -> Large:
    """``plain`` as four 2x2 convolutions of the small image, one per phase of the output."""
    # fold[phase, small, large] is 1 if row ``large`` of the 3x3 window lies in small row ``small``.
    fold = jnp.array([[[1.0, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])
    kernels = jnp.einsum("apr,bqs,rsio->abpqio", fold, fold, kernel)

    # Four convolutions, because on XLA:CPU the weight gradient of a single convolution with four
    # times the channels takes 70 times as long.
    def phase(a: int, b: int) -> Array:
        pad = ((1 - a, a), (1 - b, b))
        w = kernels[a, b].astype(x.dtype)
        return jax.lax.conv_general_dilated(x, w, (1, 1), pad, dimension_numbers=conv.LAYOUT)

    return _interleave([[phase(a, b) for b in (0, 1)] for a in (0, 1)])


def nine_products(x: Images, kernel: Kernel) -> Large:
    """``plain`` with three products per axis instead of four, so nine per pixel.

    Along one axis, a pixel q has neighbours p and r and two outputs. With weights k, l, m these are
    kp + (l + m)q = k(p - q) + (k + l + m)q and (k + l)q + mr = (k + l + m)q + m(r - q).
    """
    batch, height, width, channels = x.shape
    take = jnp.array([[1.0, 0, 0], [1, 1, 1], [0, 0, 1]])
    weights = jnp.einsum("pr,qs,rsio->pqio", take, take, kernel)
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))

    def differences(x: Array, axis: int, size: int) -> list[Array]:
        p, q, r = (jax.lax.slice_in_dim(x, i, i + size, axis=axis) for i in range(3))
        return [p - q, q, r - q]

    def sums(products: list[Array]) -> list[Array]:
        return [products[0] + products[1], products[1] + products[2]]

    def multiply(image: Array, weight: Array) -> Array:
        return (image.reshape(-1, channels) @ weight).reshape(batch, height, width, -1)

    rows = []
    for along_rows, of_rows in zip(differences(x, 1, height), weights):
        along_both = differences(along_rows, 2, width)
        rows.append(sums([multiply(image, weight) for image, weight in zip(along_both, of_rows)]))
    columns = [sums(list(column)) for column in zip(*rows)]
    return _interleave(list(zip(*columns)))


def _interleave(outputs: Sequence[Sequence[Array]]) -> Array:
    """Combine the phases outputs[row][column] to one image of twice the size."""
    rows = [jnp.stack(of_row, axis=3) for of_row in outputs]
    h = jnp.stack(rows, axis=2)
    batch, height, _, width, _, channels = h.shape
    return h.reshape(batch, 2 * height, 2 * width, channels)


def upsample(x: Images, kernel: Kernel, is_training: bool) -> Large:
    """``plain`` by the algorithm that is fastest on the platform."""
    fewest = conv.MIN_CHANNELS_IN_TRAINING if is_training else conv.MIN_CHANNELS
    if min(kernel.shape[2:]) < fewest or x.dtype != jnp.float32:
        return phases(x, kernel)
    return jax.lax.platform_dependent(x, kernel, cpu=nine_products, default=phases)
