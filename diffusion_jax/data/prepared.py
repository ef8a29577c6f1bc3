"""Data sets in the format of TFDS: finding, describing, preparing, decoding and reading them."""

import contextlib
import fcntl
import hashlib
import io
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_jax.data.arrays import read_array
from diffusion_jax.data.dataset import DatasetChoice, DatasetInfo, Records, Split
from diffusion_jax.data.sources import DATASETS, archives
from diffusion_jax.data.sources.source import VERSION, Arrays, Source
from diffusion_jax.data.tfds import import_tfds
from diffusion_jax.errors import ConfigError, require

CHANNELS = (1, 3)  # numbers of channels that can be drawn: grey, RGB
MAX_BYTES_IN_MEMORY = 2 * 2**30  # of a decoded set; a larger set stays on disk


def data_dir_of(choice: DatasetChoice) -> Path:
    """The folder of prepared sets: config.dataset.data_dir, or the default of TFDS.

    Raises:
        ConfigError: the default is in the home directory, which is unknown.
    """
    if choice.data_dir is not None:
        return Path(choice.data_dir)
    try:
        default = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")  # as in TFDS
        return Path(default).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"config.dataset.data_dir = None: must be a folder: {error}") from error


def find_prepared(choice: DatasetChoice) -> Path | None:
    """The folder of a prepared set, or None if it is not prepared.

    A set of sources.DATASETS must have version VERSION. Of any other set the newest version counts;
    its name may be in TFDS's longer forms: "name:1.0.0", "name/config", "name/config:1.0.0".
    """
    folder = data_dir_of(choice) / choice.name.replace(":", "/")
    if choice.name in DATASETS:
        return folder / VERSION if (folder / VERSION).is_dir() else None
    versions = {
        tuple(map(int, path.parent.name.split("."))): path.parent
        for path in (*folder.glob("dataset_info.json"), *folder.glob("*/dataset_info.json"))
        if re.fullmatch(r"\d+\.\d+\.\d+", path.parent.name)
    }
    return versions[max(versions)] if versions else None


def describe_prepared(name: str, folder: Path) -> DatasetInfo:
    """The properties of a prepared set, from the metadata that TFDS wrote to its folder.

    Raises:
        ConfigError: the images are not uint8 of one shape with 1 or 3 channels, there is no split
            "train", or the file format needs tensorflow.
    """
    tfds = import_tfds()

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
    if image is None or not is_image or None in image.shape:
        raise ConfigError(f"{prefix} has no feature 'image' of uint8 and a fixed shape: {image}")
    if image.shape[-1] not in CHANNELS:
        raise ConfigError(
            f"{prefix} has images of {image.shape[-1]} channels: must be 1 (grey) or 3 (RGB), "
            "which can be drawn"
        )
    if "train" not in info.splits:
        raise ConfigError(f"{prefix} has no split 'train' ({', '.join(info.splits)})")
    num_classes = label.num_classes if isinstance(label, tfds.features.ClassLabel) else None
    return DatasetInfo(name=name, shape=tuple(image.shape), levels=256, num_classes=num_classes)


def prepare(name: str, source: Source, archives_given: str | None, folder: Path) -> None:
    """Check the archives of a source, then write it with TFDS, which renames the finished folder.

    Raises:
        ConfigError: an archive cannot be downloaded or read, or the folder is not writable.
    """
    data_dir = folder.parent.parent
    existing = next(path for path in folder.parents if path.exists())
    writable = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    require(writable, "config.dataset.data_dir", str(data_dir), "a folder that can be written")
    splits = _read_archives(name, source, archives_given, data_dir)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock(folder.parent / ".lock"), _quiet_tfds():
        if folder.is_dir():
            return  # another process prepared it meanwhile
        for incomplete in folder.parent.glob(f"incomplete.*_{folder.name}"):
            shutil.rmtree(incomplete)  # left by a killed process
        print(f"preparing {name} in {data_dir} ...", file=sys.stderr, flush=True)
        from diffusion_jax.data.sources.builder import ImageBuilder

        ImageBuilder(name, data_dir, source.num_classes, splits).download_and_prepare()


def _read_archives(name: str, source: Source, folder: str | None, data_dir: Path) -> Arrays:
    if folder is not None or not source.urls:
        try:
            return source.read(Path(folder or "."))
        except ConfigError as error:
            raise ConfigError(f"config.dataset.archives = {folder!r}: {error}") from error
    with tempfile.TemporaryDirectory() as downloads:
        try:
            archives.download(source.urls, Path(downloads))
            return source.read(Path(downloads))
        except ConfigError as error:
            raise ConfigError(
                f"config.dataset.name = {name!r}: not prepared in {data_dir}, and {error}; put "
                f"{', '.join(source.archives)} into a folder and give "
                "--config.dataset.archives=FOLDER"
            ) from error


def read_prepared(info: DatasetInfo, folder: Path) -> tuple[Split, Split | None]:
    """The train and test splits of a prepared set, in memory unless they are too large.

    Decoding MNIST takes ten seconds, so the decoded arrays are saved beside the set. The name of
    their folder has a fingerprint of the set's files, so a set that changes is decoded again.
    """
    decoded = folder / f"decoded-{_fingerprint(folder)}"
    if decoded.is_dir():
        try:
            return _load(decoded, info)
        except ValueError as error:
            print(f"{decoded}: {error}; decoding again", file=sys.stderr, flush=True)
    with _quiet_tfds():
        splits = _open(info, folder)
        if sum(split.images.nbytes for split in splits if split is not None) > MAX_BYTES_IN_MEMORY:
            return splits
        if not os.access(folder, os.W_OK):
            print(f"{folder} is not writable: decoding at every start", file=sys.stderr)
            return _decode(splits)
        with _lock(folder / ".lock"):
            if not _is_intact(decoded, info):  # otherwise another process decoded it
                print(f"decoding {info.name} ...", file=sys.stderr, flush=True)
                _save(_decode(splits), decoded)
    return _load(decoded, info)


def _open(info: DatasetInfo, folder: Path) -> tuple[Split, Split | None]:
    tfds = import_tfds()

    builder = tfds.builder_from_directory(folder)
    pictures = [
        name
        for name, feature in builder.info.features.items()
        if isinstance(feature, tfds.features.Image)
    ]

    def column(split: str, name: str, shape: tuple[int, ...], dtype: type) -> Records:
        # Decoding pictures takes most of the time, so other pictures are not decoded.
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

    train, test = splits
    return decode(train), None if test is None else decode(test)


def _save(splits: tuple[Split, Split | None], decoded: Path) -> None:
    """Write the arrays to a temporary folder, and rename it to ``decoded`` when it is complete."""
    for old in decoded.parent.glob("decod*-*"):
        shutil.rmtree(old)  # of an earlier version of the set, or left by a killed process
    unfinished = decoded.with_name(f"decoding-{os.getpid()}")
    unfinished.mkdir()
    for name, split in zip(("train", "test"), splits):
        arrays: dict[str, Any] = {}
        if split is not None:
            arrays = {"images": split.images, "labels": split.labels}
        for kind, array in arrays.items():
            if array is not None:
                with open(unfinished / f"{name}_{kind}.npy", "wb") as file:
                    np.save(file, array)
                    file.flush()
                    os.fsync(file.fileno())
    unfinished.rename(decoded)


def _load(decoded: Path, info: DatasetInfo) -> tuple[Split, Split | None]:
    """Read the arrays that ``_save`` wrote.

    Raises:
        ValueError: a file is missing or damaged, or an array has another shape or dtype.
    """

    def array(name: str) -> np.ndarray | None:
        path = decoded / f"{name}.npy"
        return read_array(path, name) if path.exists() else None

    def split(name: str) -> Split:
        images, labels = array(f"{name}_images"), array(f"{name}_labels")
        if images is None or images.shape[1:] != info.shape or images.dtype != np.uint8:
            raise ValueError(f"the {name} images are missing, or of another shape or dtype")
        if (labels is None) != (info.num_classes is None):
            raise ValueError(f"the {name} labels are missing, or the set has none")
        if labels is not None and labels.shape != (len(images),):
            raise ValueError(f"the {name} split does not have one label per image")
        return Split(images, labels)

    has_test = any((decoded / f"test_{kind}.npy").exists() for kind in ("images", "labels"))
    return split("train"), split("test") if has_test else None


def _is_intact(decoded: Path, info: DatasetInfo) -> bool:
    try:
        _load(decoded, info)
    except ValueError:
        return False
    return True


def _fingerprint(folder: Path) -> str:
    """A hash of the names, sizes and modification times of the files of a prepared set."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name[0] != ".")
    states = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(states).encode()).hexdigest()[:16]


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # the kernel releases it when the process ends
        yield


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[None]:
    """Silence TFDS: its log below errors, its progress bars and what it prints."""
    tfds = import_tfds()
    from absl import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except ImportError as error:  # TFDS imports some packages only when it uses them
        raise ConfigError(f"tensorflow_datasets cannot be used: {error}") from error
    finally:
        logging.set_verbosity(verbosity)
