"""The samples of a long job: one file per finished batch, joined into one file at the end."""

import json
import logging
import os
import pathlib
import shutil
import zipfile
from typing import Any

import numpy as np
from jaxtyping import Num

from diffusion_jax.runtime import files

LOG = logging.getLogger("diffusion_jax")


class Shards:
    """The files of a job that can be killed at any time and resumed without losing a batch.

    The name of a shard gives the range of its samples. ``job`` holds everything that the samples
    depend on; shards of another job are removed with a warning.
    """

    def __init__(self, folder: pathlib.Path, name: str, job: dict) -> None:
        self._folder, self._name = folder, name
        record, text = folder / "job.json", json.dumps(job, sort_keys=True)
        self._joined = folder.with_name(f"{folder.name}.joined")
        shutil.rmtree(self._joined, ignore_errors=True)  # left by a run killed in ``join``
        if folder.exists() and (not record.exists() or record.read_text() != text):
            LOG.warning("%s: removed the samples of another job; starting again", folder)
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files.replace_text(record, text)
        ranges = self._ranges()
        self._size = ranges[-1][1] if ranges else 0

    def _ranges(self) -> list[tuple[int, int, pathlib.Path]]:
        """(start, stop, file) of the shards that cover the samples from 0 without a gap."""
        ranges, end = [], 0
        for path in sorted(self._folder.glob("*.npz")):
            first, last = map(int, path.stem.split("-"))
            if first != end:
                break
            ranges.append((first, last + 1, path))
            end = last + 1
        return ranges

    def __len__(self) -> int:
        """The number of samples."""
        return self._size

    def add(self, samples: Num[np.ndarray, "n ..."]) -> None:
        """Write the next samples atomically."""
        end = self._size + len(samples)
        path = self._folder / f"{self._size:09d}-{end - 1:09d}.npz"
        arrays: dict[str, Any] = {self._name: samples}
        with files.replace(path) as file:
            np.savez(file, **arrays)
        self._size = end

    def first(self, count: int) -> Num[np.ndarray, "n ..."]:
        """The first ``count`` samples, or all if there are fewer."""
        parts, size = [], 0
        for _, _, path in self._ranges():
            if size >= count:
                break
            with np.load(path) as arrays:
                parts.append(arrays[self._name])
            size += len(parts[-1])
        return np.concatenate(parts)[:count]

    def join(self, path: pathlib.Path) -> None:
        """Join all shards into one .npz, with one shard in memory at a time, and remove them."""
        like = self.first(1)
        header = {
            "descr": np.lib.format.dtype_to_descr(like.dtype),
            "fortran_order": False,
            "shape": (len(self), *like.shape[1:]),
        }
        with (
            files.replace(path) as file,
            zipfile.ZipFile(file, "w") as archive,
            archive.open(f"{self._name}.npy", "w", force_zip64=True) as column,
        ):
            np.lib.format.write_array_header_2_0(column, header)
            for _, _, part in self._ranges():
                with np.load(part) as arrays:
                    column.write(np.ascontiguousarray(arrays[self._name]).tobytes())
        os.replace(self._folder, self._joined)  # atomic, unlike the removal
        shutil.rmtree(self._joined)
