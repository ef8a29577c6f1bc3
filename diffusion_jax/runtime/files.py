"""The one way in which files are written: whole or not at all, whatever happens meanwhile."""

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import BinaryIO


@contextlib.contextmanager
def replace(path: pathlib.Path) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of ``path`` once all of it is on the disk.

    A process that is killed meanwhile leaves ``path`` as it was.
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
    """Write a text in the place of ``path``."""
    with replace(path) as file:
        file.write(text.encode())
