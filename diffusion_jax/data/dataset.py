"""The types of a data set: its choice in a config, its properties and its splits."""

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Integer, UInt8


class DatasetChoice(NamedTuple):
    """The data set of a run, and where its files are."""

    name: str  # in sources.DATASETS, or of a set that TFDS has prepared
    archives: str | None = None  # folder of the original archives; None: download them
    data_dir: str | None = None  # folder of the prepared sets; None: the folder of TFDS
    flip: bool = False  # mirror each training image left to right with probability 1/2


class DatasetInfo(NamedTuple):
    """The properties of a data set that models, decoders and plots need."""

    name: str
    shape: tuple[int, ...]  # (height, width, channels) of an image, (dimension,) of a point
    levels: int | None  # pixels are 0 .. levels - 1; None: the data are points
    num_classes: int | None  # None: no labels


class Records:
    """A column of a set that stays on disk; indexing reads and decodes the chosen records."""

    def __init__(self, source: Any, feature: str, shape: tuple[int, ...], dtype: type) -> None:
        self._source, self._feature = source, feature
        self.shape = (len(source), *shape)
        self.ndim = len(self.shape)
        self.dtype = np.dtype(dtype)
        self.nbytes = math.prod(self.shape) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int | slice | Integer[np.ndarray, " n"]) -> np.ndarray:
        if isinstance(index, int | np.integer):
            return self[np.array([index])][0]
        if isinstance(index, slice):
            index = np.arange(*index.indices(len(self)))
        values = np.empty((len(index), *self.shape[1:]), self.dtype)
        for start in range(0, len(index), 1024):  # bounds the memory of undecoded records
            records = self._source.__getitems__(index[start : start + 1024].tolist())
            for row, record in enumerate(records, start):
                values[row] = record[self._feature]
        return values


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """The examples of one split: images with pixels 0 .. levels - 1, or points; and labels."""

    images: UInt8[np.ndarray, "n height width channel"] | Float32[np.ndarray, "n d"] | Records
    labels: Integer[np.ndarray, " n"] | Records | None

    def __len__(self) -> int:
        return len(self.images)


class Dataset(NamedTuple):
    """A loaded data set: the fields of ``DatasetInfo`` and the splits."""

    name: str
    shape: tuple[int, ...]
    levels: int | None
    num_classes: int | None
    train: Split
    test: Split | None  # the validation split if there is no test split; None: neither
