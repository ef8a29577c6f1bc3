"""Atomic writing of files: a file is replaced as a whole, or stays as it was."""

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import BinaryIO


@contextlib.contextmanager
def replace(path: pathlib.Path) -> Iterator[BinaryIO]:
    """Yield a temporary file that replaces ``path`` when the block ends without an error.

    It is on disk before it replaces ``path``. A process that is killed leaves ``path`` as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_text(path: pathlib.Path, text: str) -> None:
    """Write a text file atomically, see ``replace``."""
    with replace(path) as file:
        file.write(text.encode())
