"""Dense layers and convolutions with the weight initialisation of all networks here."""

import functools
import math

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Key

from diffusion_jax.models.layers.conv import Conv3x3
from diffusion_jax.models.pure import uniform


@uniform
def glorot(key: Key[Array, ""], shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """The half-width of Glorot's uniform distribution: sqrt(6 / (fan in + fan out))."""
    del key
    receptive, c_in, c_out = math.prod(shape[:-2]), *shape[-2:]
    return jnp.full(shape, math.sqrt(6 / (receptive * (c_in + c_out))), dtype)


# A half-width of 0. ``pure`` multiplies it by its draw, so these zeros have random signs.
ZERO = uniform(nnx.initializers.zeros_init())
linear = functools.partial(nnx.Linear, kernel_init=glorot)  # on the last axis: a 1x1 convolution
conv = functools.partial(nnx.Conv, kernel_size=(3, 3), kernel_init=glorot)
conv3x3 = functools.partial(Conv3x3, kernel_size=(3, 3), kernel_init=glorot)  # the fast forms
