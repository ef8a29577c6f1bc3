"""Conversions between x_0 in [-1, 1], the grey levels of a data set, and uint8 pixels."""

from typing import overload

import numpy as np
from jaxtyping import Array, Float, UInt8

Image = UInt8[np.ndarray, "..."] | UInt8[Array, "..."]
OnHost = UInt8[np.ndarray, "..."] | Float[np.ndarray, "..."]
OnDevice = UInt8[Array, "..."] | Float[Array, "..."]
X_0 = Float[np.ndarray, "..."] | Float[Array, "..."]


@overload
def to_x_0(image: OnDevice, levels: int | None) -> Float[Array, "..."]: ...
@overload
def to_x_0(image: OnHost, levels: int | None) -> Float[np.ndarray, "..."]: ...
def to_x_0(image: Image | X_0, levels: int | None) -> X_0:
    """Scale grey levels to the network's input: 2 image / (levels - 1) - 1 (DDPM section 3.3).

    The result is in [-1, 1]. Points (levels None) stay as they are.
    """
    if levels is None:
        return image
    return np.float32(2) * image.astype(np.float32) / np.float32(levels - 1) - np.float32(1)


@overload
def from_uint8(image: UInt8[np.ndarray, "..."], levels: int) -> Float[np.ndarray, "..."]: ...
@overload
def from_uint8(image: UInt8[Array, "..."], levels: int) -> Float[Array, "..."]: ...
def from_uint8(image: Image, levels: int) -> X_0:
    """Inverse of ``to_uint8``: rounds 0 .. 255 to the data set's levels, scaled to [-1, 1]."""
    top = np.float32(levels - 1)
    return to_x_0((image.astype(np.float32) * (top / 255)).round(), levels)


@overload
def to_uint8(x_0: Float[np.ndarray, "..."], levels: int | None) -> UInt8[np.ndarray, "..."]: ...
@overload
def to_uint8(x_0: Float[Array, "..."], levels: int | None) -> UInt8[Array, "..."]: ...
def to_uint8(x_0: X_0, levels: int | None) -> Image:
    """Round x_0 in [-1, 1] to the nearest of the data set's levels, scaled to 0 .. 255.

    Raises:
        ValueError: levels is None: points are not images.
    """
    if levels is None:
        raise ValueError("levels = None: points are not images")
    top = np.float32(levels - 1)
    level = ((x_0.astype(np.float32) + np.float32(1)) * (top / 2)).round().clip(0, top)
    return (level * np.float32(255) / top).round().astype(np.uint8)
