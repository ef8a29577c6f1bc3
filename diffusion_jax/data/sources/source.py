"""A source of images or points: what is known of a set, and how its archives are read."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Integer, UInt8

# Of every set prepared here: change it when what a builder writes changes.
VERSION = "1.0.0"
Images = UInt8[np.ndarray, "n height width channel"]
Points = Float32[np.ndarray, "n dimension"]
Labels = Integer[np.ndarray, "n"]
Arrays = Mapping[str, tuple[Images | Points, Labels]]  # "train" and "test"


class Source(NamedTuple):
    """What is known of a set before it is prepared, and how its archives are read.

    A pixel is one of 0 .. levels - 1. A set whose levels are None holds points: it is used as
    read gives it, and nothing is prepared. read takes the folder of the archives, which are the
    last parts of the urls (none: the set needs no archives), and gives "train" and "test".
    """

    shape: tuple[int, ...]  # height, width, channels; of points, (dimension,)
    levels: int | None
    num_classes: int
    urls: tuple[str, ...]
    read: Callable[[Path], Arrays]

    @property
    def archives(self) -> list[str]:
        """The names of the archives."""
        return [url.rsplit("/", 1)[1] for url in self.urls]
