"""Data sets: prepared once through TFDS, decoded once, and read in batches through Grain.

Batch k is a pure function of (seed, k), so that the step number restores the place in the data.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import io
import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
from jaxtyping import Array, Float, Float32, Integer, UInt8
from ml_collections import ConfigDict

from diffusion_jax.config import ConfigError, choose, require
from diffusion_jax.datasets import VERSION, Arrays, Source, archives, cifar10, digits, idx, toy2d

Image = UInt8[np.ndarray, "..."] | UInt8[Array, "..."]
X_0 = Float[np.ndarray, "..."] | Float[Array, "..."]

# TFDS takes 1.4 s to import and Grain 1.8 s. A second start needs no TFDS and naming a set needs
# neither, so they are imported where they are used.

MAX_BYTES_IN_MEMORY = 2 * 2**30  # of a set when decoded; a larger one stays on the disk


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


def describe(config: ConfigDict) -> DatasetInfo:
    """What is known of the set that config.dataset names; writes nothing.

    Raises:
        ConfigError: there is no such set, or a field does not fit it.
    """
    found = config.archives is None or Path(config.archives).expanduser().is_dir()
    require(found, "config.dataset.archives", config.archives, "a folder that exists")
    folder = _find_prepared(config)
    if config.name in DATASETS or folder is None:
        noun = (
            "data set, and no TFDS image set of that name is prepared as array_record in "
            f"{_data_dir(config)} (config.dataset.data_dir)"
        )
        source = choose("config.dataset.name", config.name, DATASETS, noun)
        info = DatasetInfo(config.name, source.shape, source.levels, source.num_classes)
    else:
        info = _describe_prepared(config.name, folder)
    if config.flip and info.levels is None:
        raise ConfigError(f"config.dataset.flip = True: {config.name} has points, not images")
    return info


def load(config: ConfigDict) -> Dataset:
    """The set that config.dataset names, prepared first where that has not been done yet.

    Raises:
        ConfigError: as describe; an archive is missing or is not what it should be; there is no
            network; nothing can be written to the folder of prepared sets.
    """
    info = describe(config)
    source = DATASETS.get(info.name)
    if info.levels is None:
        arrays = source.read(Path())
        return Dataset(*info, *(_split(*arrays[name]) for name in ("train", "test")))
    folder = _find_prepared(config)
    if folder is None:
        folder = _data_dir(config) / info.name / VERSION
        _prepare(info.name, source, config.archives, folder)
    return Dataset(*info, *_read(info, folder))


def batches(
    split: Split,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    flip: bool = False,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict[str, np.ndarray | None]]:
    """The batches of steps start_step, start_step + 1, ... without end.

    Every epoch is another permutation of the split; the last batch of one goes on into the next.
    A process gets its contiguous share of the global batch of batch_size examples. flip mirrors
    each image left to right with probability 1/2. "label" is None where the split has none.

    Raises:
        ValueError: a batch_size that cannot be shared evenly, or points to be flipped.
    """
    if batch_size < 1 or batch_size % process_count:
        allowed = f"a positive multiple of the {process_count} processes"
        raise ValueError(f"batch_size = {batch_size}: must be {allowed}")
    if flip and split.images.ndim != 4:
        raise ValueError("flip = True: the examples are points, not images")
    import grain

    share = batch_size // process_count
    offset = process_index * share
    # Grain shuffles epoch e with seed + e: of seeds that follow each other, the one would see
    # next what the other has seen before. A hash keeps them apart.
    shuffle_seed = int(np.random.SeedSequence(seed % 2**64).generate_state(1)[0])

    def gather(step: int, indices: Integer[np.ndarray, " n"]) -> dict[str, np.ndarray | None]:
        images = split.images[indices]
        if flip:
            coins = np.random.default_rng((seed % 2**64, step)).random(batch_size) < 0.5
            mirrored = coins[offset : offset + share, None, None, None]
            images = np.where(mirrored, images[:, :, ::-1], images)
        labels = None if split.labels is None else split.labels[indices].astype(np.int32)
        return {"image": images, "label": labels}

    indices = grain.MapDataset.range(len(split)).shuffle(shuffle_seed).repeat()
    shares = indices.batch(share, batch_fn=np.asarray)[process_index::process_count]
    # Elements are whole batches here: the defaults would keep 500 of them, on 16 threads.
    num_threads = (os.cpu_count() or 1) if isinstance(split.images, Records) else 1
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
    return iter(shares.map_with_index(gather)[start_step:].to_iter_dataset(options))


def to_x_0(image: Image | X_0, levels: int | None) -> X_0:
    """Images as the network sees them: 2 image / (levels - 1) - 1, in [-1, 1] (DDPM section 3.3).

    Points (levels None) stay as they are.
    """
    if levels is None:
        return image
    return np.float32(2) * image.astype(np.float32) / np.float32(levels - 1) - np.float32(1)


def from_uint8(image: Image, levels: int) -> X_0:
    """What ``to_uint8`` made images of: 0 .. 255 to the nearest of the set's levels, in [-1, 1]."""
    top = np.float32(levels - 1)
    return to_x_0((image.astype(np.float32) * (top / 255)).round(), levels)


def to_uint8(x_0: X_0, levels: int | None) -> Image:
    """The images that x_0 stand for: the nearest of the set's levels, then scaled to 0 .. 255.

    Raises:
        ValueError: points (levels None) are no images.
    """
    if levels is None:
        raise ValueError("levels = None: points are not images")
    top = np.float32(levels - 1)
    level = ((x_0.astype(np.float32) + np.float32(1)) * (top / 2)).round().clip(0, top)
    return (level * np.float32(255) / top).round().astype(np.uint8)


def read_images(path: str, shape: tuple[int, ...]) -> UInt8[np.ndarray, "n height width channel"]:
    """The images of a PNG (one) or of an .npz as samples.npz is (``images``), 0 .. 255.

    Raises:
        ValueError: they cannot be read or are of another shape.
    """
    try:
        if path.endswith(".npz"):
            with np.load(path, allow_pickle=False) as arrays:
                images = arrays["images"]
        else:
            with PIL.Image.open(path) as picture:
                images = np.asarray(picture.convert("L" if shape[-1] == 1 else "RGB"))[None]
        if images.ndim == 3:
            images = images[..., None]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"must be a PNG, or an .npz with `images`: {error}") from error
    if images.dtype != np.uint8 or images.shape[1:] != shape or not len(images):
        found = f"{images.dtype} {list(images.shape)}"
        raise ValueError(f"must hold uint8 images of shape {list(shape)}, not {found}")
    return images


def _data_dir(config: ConfigDict) -> Path:
    default = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")  # as TFDS has it
    return Path(config.data_dir or default).expanduser()


def _find_prepared(config: ConfigDict) -> Path | None:
    """The folder of a prepared set: of ours, our version; of any other, the newest version.

    The name of another may go on as TFDS's do: "name:1.0.0", "name/config", "name/config:1.0.0".
    """
    folder = _data_dir(config) / config.name.replace(":", "/")
    if config.name in DATASETS:
        return folder / VERSION if (folder / VERSION).is_dir() else None
    versions = {
        tuple(map(int, path.parent.name.split("."))): path.parent
        for path in (*folder.glob("dataset_info.json"), *folder.glob("*/dataset_info.json"))
        if re.fullmatch(r"\d+\.\d+\.\d+", path.parent.name)
    }
    return versions[max(versions)] if versions else None


def _describe_prepared(name: str, folder: Path) -> DatasetInfo:
    import tensorflow_datasets as tfds

    info = tfds.builder_from_directory(folder).info
    prefix = f"config.dataset.name = {name!r}: the set in {folder}"
    if info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise ConfigError(
            f"{prefix} is in files that need tensorflow; prepare it with "
            'builder_kwargs={"file_format": "array_record"}'
        )
    features = dict(info.features.items())
    image, label = features.get("image"), features.get("label")
    is_image = isinstance(image, tfds.features.Image) and image.np_dtype == np.uint8
    if not is_image or None in image.shape:
        raise ConfigError(f"{prefix} has no feature 'image' of uint8 and a fixed shape: {image}")
    if "train" not in info.splits:
        raise ConfigError(f"{prefix} has no split 'train' ({', '.join(info.splits)})")
    num_classes = label.num_classes if isinstance(label, tfds.features.ClassLabel) else None
    return DatasetInfo(name, tuple(image.shape), 256, num_classes)


def _prepare(name: str, source: Source, archives_given: str | None, folder: Path) -> None:
    """Write a set of ours, once its archives are checked; TFDS renames the finished folder."""
    data_dir = folder.parent.parent
    existing = next(path for path in folder.parents if path.exists())
    writable = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    require(writable, "config.dataset.data_dir", str(data_dir), "a folder that can be written")
    splits = _read_archives(name, source, archives_given, data_dir)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock(folder.parent / ".lock"), _quiet_tfds():
        if folder.is_dir():
            return  # another process was first
        for remains in folder.parent.glob(f"incomplete.*_{folder.name}"):
            shutil.rmtree(remains)  # of a process that was killed
        print(f"preparing {name} in {data_dir} ...", file=sys.stderr, flush=True)
        from diffusion_jax.datasets.builder import ImageBuilder

        ImageBuilder(name, data_dir, source.num_classes, splits).download_and_prepare()


def _read_archives(name: str, source: Source, given: str | None, data_dir: Path) -> Arrays:
    if given is not None or not source.urls:
        try:
            return source.read(Path(given or ".").expanduser())
        except ConfigError as error:
            raise ConfigError(f"config.dataset.archives = {given!r}: {error}") from error
    with tempfile.TemporaryDirectory() as folder:
        try:
            archives.download(source.urls, Path(folder))
            return source.read(Path(folder))
        except ConfigError as error:
            raise ConfigError(
                f"config.dataset.name = {name!r}: not prepared in {data_dir}, and {error}; put "
                f"{', '.join(source.archives)} into a folder and give "
                "--config.dataset.archives=FOLDER"
            ) from error


def _read(info: DatasetInfo, folder: Path) -> tuple[Split, Split | None]:
    """The train and test splits of a prepared set, in memory unless they are too large.

    Decoding MNIST takes ten seconds, so the arrays are kept beside the set, under a name that
    stands for its files as they are now: a set that is prepared anew is decoded anew.
    """
    decoded = folder / f"decoded-{_fingerprint(folder)}"
    if decoded.is_dir():
        return _load(decoded)
    with _quiet_tfds():
        splits = _open(info, folder)
        if sum(split.images.nbytes for split in splits if split is not None) > MAX_BYTES_IN_MEMORY:
            return splits
        if not os.access(folder, os.W_OK):
            print(f"{folder} cannot be written: decoded at every start", file=sys.stderr)
            return _decode(splits)
        with _lock(folder / ".lock"):
            if not decoded.is_dir():  # else another process was first
                print(f"decoding {info.name} ...", file=sys.stderr, flush=True)
                _save(_decode(splits), decoded)
    return _load(decoded)


def _open(info: DatasetInfo, folder: Path) -> tuple[Split, Split | None]:
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(folder)
    pictures = [
        name
        for name, feature in builder.info.features.items()
        if isinstance(feature, tfds.features.Image)
    ]

    def column(split: str, name: str, shape: tuple[int, ...], dtype: type) -> Records:
        # Decoding pictures takes nearly all of the time, so no others than those asked for.
        skip = {other: tfds.decode.SkipDecoding() for other in pictures if other != name}
        return Records(builder.as_data_source(split, decoders=skip), name, shape, dtype)

    def open_split(split: str) -> Split:
        labelled = info.num_classes is not None
        labels = column(split, "label", (), np.int32) if labelled else None
        return Split(column(split, "image", info.shape, np.uint8), labels)

    held_out = [name for name in ("test", "validation") if name in builder.info.splits]
    return open_split("train"), open_split(held_out[0]) if held_out else None


def _decode(splits: tuple[Split, Split | None]) -> tuple[Split, Split | None]:
    def decode(split: Split) -> Split:
        return Split(split.images[:], None if split.labels is None else split.labels[:])

    return tuple(None if split is None else decode(split) for split in splits)


def _save(splits: tuple[Split, Split | None], decoded: Path) -> None:
    """Write the arrays to a folder that has its name only once they are all on the disk."""
    for old in decoded.parent.glob("decod*-*"):
        shutil.rmtree(old)  # of files that are no more, or of a process that was killed
    unfinished = decoded.with_name(f"decoding-{os.getpid()}")
    unfinished.mkdir()
    for name, split in zip(("train", "test"), splits):
        arrays = {} if split is None else {"images": split.images, "labels": split.labels}
        for kind, array in arrays.items():
            if array is not None:
                with open(unfinished / f"{name}_{kind}.npy", "wb") as file:
                    np.save(file, array)
                    file.flush()
                    os.fsync(file.fileno())
    unfinished.rename(decoded)


def _load(decoded: Path) -> tuple[Split, Split | None]:
    def array(name: str) -> np.ndarray | None:
        path = decoded / f"{name}.npy"
        return np.load(path) if path.exists() else None

    test_images = array("test_images")
    test = None if test_images is None else Split(test_images, array("test_labels"))
    return Split(array("train_images"), array("train_labels")), test


def _fingerprint(folder: Path) -> str:
    """A digest of the names, sizes and dates of the files of a prepared set."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name[0] != ".")
    states = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(states).encode()).hexdigest()[:16]


def _split(images: np.ndarray, labels: np.ndarray) -> Split:
    return Split(images, labels.astype(np.int32))


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # the kernel frees it, however the process ends
        yield


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[None]:
    """Keeps back TFDS's announcements, its progress bars and its advice to install OpenCV."""
    import tensorflow_datasets as tfds
    from absl import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)


# To add a set: a Source in a file of datasets/, and its line here.
DATASETS = {
    "digits": digits.DIGITS,
    "mnist": idx.MNIST,
    "fashion_mnist": idx.FASHION_MNIST,
    "kmnist": idx.KMNIST,
    "cifar10": cifar10.CIFAR10,
    "toy2d": toy2d.TOY2D,
}
