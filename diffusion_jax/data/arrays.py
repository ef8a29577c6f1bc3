"""Reads numpy arrays from files of the user; every problem becomes a one-line ValueError."""

import pathlib

import numpy as np


def read_array(path: str | pathlib.Path, name: str) -> np.ndarray:
    """Read the array of a .npy file, or the array called ``name`` of an .npz file.

    Raises:
        ValueError: the file does not exist, has another format, is damaged, holds Python objects,
            or holds no array of this name; the message has one line.
    """
    try:
        # numpy decides by the contents of the file, not by its suffix
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            if name not in loaded.files:
                raise ValueError(f"has no array {name!r} ({', '.join(loaded.files) or 'none'})")
            array = loaded[name]
        if not isinstance(array, np.ndarray):  # numpy returns bytes for a member that is not .npy
            raise ValueError(f"{name!r} is not an array")
        return array
    except OSError as error:
        raise ValueError(error.strerror or " ".join(str(error).split())) from error
    except Exception as error:  # numpy, zipfile and zlib raise many types for damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"not an intact .npy or .npz file: {reason[:200]}") from error
