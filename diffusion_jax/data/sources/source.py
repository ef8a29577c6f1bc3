"""A source of images or points: the properties of a data set and the reader of its archives."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Integer, UInt8

# The version of every set that is prepared here; it must change when the builder's output changes.
VERSION = "1.0.0"
Images = UInt8[np.ndarray, "n height width channel"]
Points = Float32[np.ndarray, "n dimension"]
Labels = Integer[np.ndarray, "n"]
Arrays = Mapping[str, tuple[Images | Points, Labels]]  # "train" and "test"


class Source(NamedTuple):
    """The properties of a data set before it is prepared, and the reader of its archives.

    A pixel is one of 0 .. levels - 1. If levels is None, the set holds points; it is read directly
    and not prepared. ``read`` takes the folder of the archives and returns "train" and "test". The
    names of the archives are the last parts of ``urls``, which is empty if the set needs none.
    """

    shape: tuple[int, ...]  # (height, width, channels) of an image, (dimension,) of a point
    levels: int | None
    num_classes: int
    urls: tuple[str, ...]
    read: Callable[[Path], Arrays]

    @property
    def archives(self) -> list[str]:
        """The names of the archives."""
        return [url.rsplit("/", 1)[1] for url in self.urls]
