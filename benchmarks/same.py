"""Whether two runs ended with the same bits: the newest checkpoint, the records and the samples.

    python -m benchmarks.same RUN OTHER

Each difference is a line; the exit status is 1 if there is any. The speed in the records does not
count.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from diffusion_jax.runtime import checkpoint


def differences(run: pathlib.Path, other: pathlib.Path) -> Iterator[str]:
    """A line for each difference between the ends of two runs."""
    steps, others = (max(checkpoint.saved_steps(path / "checkpoints")) for path in (run, other))
    if steps != others:
        yield f"the newest checkpoints are of steps {steps} and {others}"
        return
    arrays, other_arrays = (checkpoint.load(path / "checkpoints", steps) for path in (run, other))
    yield from _of_arrays(f"checkpoint {steps}", arrays, other_arrays)
    records, other_records = _records(run), _records(other)
    for record, other_record in zip(records, other_records):
        if record != other_record:
            yield f"metrics.jsonl: first in the record {record}, where the other has {other_record}"
            break
    if len(records) != len(other_records):
        yield f"metrics.jsonl: {len(records)} and {len(other_records)} records"
    yield from _of_arrays("samples.npz", _samples(run), _samples(other))


def _of_arrays(name: str, arrays: checkpoint.Arrays, others: checkpoint.Arrays) -> Iterator[str]:
    if arrays.keys() != others.keys():
        yield f"{name}: other arrays"
        return
    changed = [path for path in arrays if not _has_same_bits(arrays[path], others[path])]
    if changed:
        worst = max(_distance(arrays[path], others[path]) for path in changed)
        yield f"{name}: {len(changed)} of {len(arrays)} arrays differ, by at most {worst:.2g}"


def _has_same_bits(array: np.ndarray, other: np.ndarray) -> bool:
    same_type = (array.dtype, array.shape) == (other.dtype, other.shape)
    return same_type and array.tobytes() == other.tobytes()


def _distance(array: np.ndarray, other: np.ndarray) -> float:
    if array.shape != other.shape:
        return np.inf
    return float(np.max(np.abs(array.astype(float) - other.astype(float)), initial=0.0))


def _records(run: pathlib.Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if name != "images_per_second"}
        for line in lines
    ]


def _samples(run: pathlib.Path) -> checkpoint.Arrays:
    with np.load(run / "samples" / "samples.npz") as arrays:
        return dict(arrays)


def main() -> int:
    """Print the differences, or what was compared."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=pathlib.Path)
    parser.add_argument("other", type=pathlib.Path)
    arguments = parser.parse_args()
    lines = list(differences(arguments.run, arguments.other))
    print("\n".join(lines or ["every bit is equal"]))
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
