"""Reads pictures in any format of Pillow, as grey or RGB images of 8 bits."""

import pathlib

import numpy as np
import PIL.Image
from jaxtyping import UInt8

from diffusion_jax.data.arrays import read_array

MODES = {1: "L", 3: "RGB"}  # number of channels -> Pillow's mode
LARGEST_16_BITS = 2**16 - 1


def read_picture(path: str | pathlib.Path, channels: int) -> UInt8[np.ndarray, "height width c"]:
    """Read a picture with 1 (grey) or 3 (RGB) channels, 0 .. 255; 16-bit grey is scaled to that.

    Raises:
        ValueError: the file does not exist, is no picture, is damaged, has transparent pixels, has
            floating-point pixels, or has grey levels outside 0 .. 65,535; the message has one line.
    """
    try:
        with PIL.Image.open(path) as file:
            file.load()
    except FileNotFoundError as error:
        raise ValueError("no such file") from error
    except Exception as error:  # Pillow raises many types for damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"not an intact picture: {reason[:200]}") from error
    picture: PIL.Image.Image = file
    if picture.has_transparency_data:
        if np.asarray(picture.convert("RGBA"))[..., 3].min() < 255:
            raise ValueError("has transparent pixels: must be opaque")
        picture = picture.convert("RGBA").convert("RGB")
    if picture.mode == "F":
        raise ValueError("has floating-point pixels: must be grey levels or colours")
    if picture.mode.startswith("I"):
        grey = np.asarray(picture).astype(np.int64)
        if grey.min() < 0 or grey.max() > LARGEST_16_BITS:
            raise ValueError("has grey levels of more than 16 bits")
        grey = np.round(grey * (255 / LARGEST_16_BITS)).astype(np.uint8)
        return np.repeat(grey[..., None], channels, axis=-1)
    return np.atleast_3d(np.asarray(picture.convert(MODES[channels])))


def read_images(path: str, shape: tuple[int, ...]) -> UInt8[np.ndarray, "n height width channel"]:
    """Read one image from a picture, or several from an .npy, or an .npz such as samples.npz.

    Pixels are 0 .. 255. An .npz holds them in its array ``images``.

    Raises:
        ValueError: the file cannot be read, or the images have another shape or dtype.
    """
    if path.endswith((".npz", ".npy")):
        images = read_array(path, "images")
    else:
        images = read_picture(path, shape[-1])[None]
    if images.ndim == 3:
        images = images[..., None]
    if images.dtype != np.uint8 or images.shape[1:] != shape or not len(images):
        actual = f"{images.dtype} {list(images.shape)}"
        raise ValueError(f"must hold uint8 images of shape {list(shape)}, not {actual}")
    return images
