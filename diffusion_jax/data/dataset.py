"""What a data set is: what is known of it, and the examples of its splits."""

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Integer, UInt8


class DatasetChoice(NamedTuple):
    """Which set a run uses, and where its files are."""

    name: str  # of sources.DATASETS, or of a set that TFDS has prepared
    archives: str | None = None  # folder of the original archives; None: they are downloaded
    data_dir: str | None = None  # folder of the prepared sets; None: that of TFDS
    flip: bool = False  # mirror half of the training images left to right


class DatasetInfo(NamedTuple):
    """What models, decoders and plots need to know of a set."""

    name: str
    shape: tuple[int, ...]  # height, width, channels; of points, (dimension,)
    levels: int | None  # pixels are 0 .. levels - 1; None: points
    num_classes: int | None  # None: without labels


class Records:
    """A column of a set that stays on the disk; indexing it reads and decodes those records."""

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
        for start in range(0, len(index), 1024):  # not all the records at once
            some = self._source.__getitems__(index[start : start + 1024].tolist())
            for row, record in enumerate(some, start):
                values[row] = record[self._feature]
        return values


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """The examples of one split: images 0 .. levels - 1, or points, and their labels."""

    images: UInt8[np.ndarray, "n height width channel"] | Float32[np.ndarray, "n d"] | Records
    labels: Integer[np.ndarray, " n"] | Records | None

    def __len__(self) -> int:
        return len(self.images)


class Dataset(NamedTuple):
    """A set that is ready to be read: its ``DatasetInfo`` and its splits."""

    name: str
    shape: tuple[int, ...]
    levels: int | None
    num_classes: int | None
    train: Split
    test: Split | None  # None: it has neither a test nor a validation split
