"""CIFAR-10: 60,000 colour photographs of 32 x 32 in ten classes (Krizhevsky 2009)."""

import io
import pickle
import tarfile
from pathlib import Path

import numpy as np

from diffusion_jax.data.sources import archives
from diffusion_jax.data.sources.source import Arrays, Source
from diffusion_jax.errors import ConfigError

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
PYTHON, PYTHON_FOLDER = "cifar-10-python.tar.gz", "cifar-10-batches-py"
BINARY, BINARY_FOLDER = "cifar-10-binary.tar.gz", "cifar-10-batches-bin"
BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}

# md5 of the files inside the python version (as in torchvision).
MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}

# sha256 of the compressed binary version (TFDS, url_checksums/cifar10.txt). No checksums of the
# files inside it are published, so only the original .tar.gz can be checked.
BINARY_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"


def read(folder: Path) -> Arrays:
    """Read the photographs from the python version or from the binary .tar.gz.

    The python version may be a .tar.gz, a .tar or an unpacked folder.

    Raises:
        ConfigError: a file is missing, truncated or damaged, or has another checksum.
    """
    names = [name for batches in BATCHES.values() for name in batches]
    if (folder / PYTHON_FOLDER).is_dir():
        paths = archives.locate(folder / PYTHON_FOLDER, names)
        files = {name: paths[name].read_bytes() for name in names}
    elif (folder / BINARY).is_file() and not (folder / PYTHON).is_file():
        archives.check(BINARY, (folder / BINARY).read_bytes(), BINARY_SHA256)
        files = _members(folder / BINARY, [f"{BINARY_FOLDER}/{name}.bin" for name in names])
        return _splits({name: _parse(files[f"{name}.bin"]) for name in names})
    else:
        path = archives.locate(folder, [PYTHON])[PYTHON]
        files = _members(path, [f"{PYTHON_FOLDER}/{name}" for name in names])
    for name in names:
        archives.check(name, files[name], MD5[name], "md5")
    return _splits({name: _unpickle(files[name]) for name in names})


def _splits(
    batches: dict[str, tuple[np.ndarray, np.ndarray]],
) -> Arrays:
    splits = {}
    for split, names in BATCHES.items():
        pixels = np.concatenate([batches[name][0] for name in names])
        # A row holds the red, green and blue planes of a picture, each in row-major order.
        images = np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        splits[split] = (images, np.concatenate([batches[name][1] for name in names]))
    return splits


def _members(path: Path, names: list[str]) -> dict[str, bytes]:
    """Read files of a tar archive without unpacking it; the keys are their base names."""

    def extract() -> dict[str, bytes]:
        contents = {}
        with tarfile.open(path) as archive:
            for name in names:
                file = archive.extractfile(name)
                if file is None:
                    raise tarfile.TarError(f"{name} is not a file")
                contents[name.rsplit("/", 1)[1]] = file.read()
        return contents

    try:
        return archives.intact(path, extract)
    except (tarfile.TarError, KeyError) as error:
        raise ConfigError(f"{path.name} is damaged ({error})") from error


def _parse(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The pixels and labels of a binary batch: rows of one label byte and 3,072 pixel bytes."""
    rows = np.frombuffer(content, np.uint8).reshape(-1, 3073)
    return rows[:, 1:], rows[:, 0].astype(np.int64)


class _Unpickler(pickle.Unpickler):
    """An unpickler that can create numpy arrays and call nothing else."""

    def find_class(self, module: str, name: str) -> object:
        allowed = {
            "_reconstruct": np.empty(0).__reduce__()[0],
            "ndarray": np.ndarray,
            "dtype": np.dtype,
        }
        if module.split(".")[0] != "numpy" or name not in allowed:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
        return allowed[name]


def _unpickle(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The pixels and labels of a batch of the python version, which Python 2 wrote."""
    batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    return batch[b"data"], np.asarray(batch[b"labels"], np.int64)


CIFAR10 = Source(shape=(32, 32, 3), levels=256, num_classes=10, urls=(URL,), read=read)
