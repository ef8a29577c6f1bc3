"""The one reader of pictures: files of any kind that Pillow knows, as grey or RGB of 8 bits."""

import pathlib

import numpy as np
import PIL.Image
from jaxtyping import UInt8

from diffusion_jax.data.arrays import read_array

MODES = {1: "L", 3: "RGB"}  # of Pillow, by the number of channels
LARGEST_16_BITS = 2**16 - 1


def read_picture(path: str | pathlib.Path, channels: int) -> UInt8[np.ndarray, "height width c"]:
    """A picture of 1 (grey) or 3 (RGB) channels, 0 .. 255; grey of 16 bits is scaled to that.

    Raises:
        ValueError: in one line: no such file, not a picture, damaged, transparent in places, or of
            pixels that are no grey levels or colours.
    """
    try:
        with PIL.Image.open(path) as file:
            file.load()
    except FileNotFoundError as error:
        raise ValueError("no such file") from error
    except Exception as error:  # damage shows as any exception of Pillow
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"no intact picture: {reason[:200]}") from error
    picture: PIL.Image.Image = file
    if picture.has_transparency_data:
        if np.asarray(picture.convert("RGBA"))[..., 3].min() < 255:
            raise ValueError("has transparent pixels: must be opaque")
        picture = picture.convert("RGBA").convert("RGB")
    if picture.mode == "F":
        raise ValueError("has pixels of floating point: must be grey levels or colours")
    if picture.mode.startswith("I"):
        grey = np.asarray(picture).astype(np.int64)
        if grey.min() < 0 or grey.max() > LARGEST_16_BITS:
            raise ValueError("has grey levels of more than 16 bits")
        grey = np.round(grey * (255 / LARGEST_16_BITS)).astype(np.uint8)
        return np.repeat(grey[..., None], channels, axis=-1)
    return np.atleast_3d(np.asarray(picture.convert(MODES[channels])))


def read_images(path: str, shape: tuple[int, ...]) -> UInt8[np.ndarray, "n height width channel"]:
    """The images of a picture (one) or of an .npz as samples.npz is (``images``), 0 .. 255.

    Raises:
        ValueError: they cannot be read or are of another shape.
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
