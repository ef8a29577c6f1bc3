"""The one reader of arrays from files that a user names, whatever is wrong with them."""

import pathlib

import numpy as np


def read_array(path: str | pathlib.Path, name: str) -> np.ndarray:
    """The array of a .npy file, or the one called ``name`` of an .npz file.

    Raises:
        ValueError: in one line, why there is none: no such file, another format, damage, an array
            of objects, no array of this name.
    """
    try:
        # the contents decide, not the end of the name
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            if name not in loaded.files:
                raise ValueError(f"has no array {name!r} ({', '.join(loaded.files) or 'none'})")
            array = loaded[name]
        if not isinstance(array, np.ndarray):  # of a file in the archive that is no .npy
            raise ValueError(f"{name!r} is no array")
        return array
    except OSError as error:
        raise ValueError(error.strerror or " ".join(str(error).split())) from error
    except Exception as error:  # damage shows as any exception of numpy, zipfile or zlib
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"no intact .npy or .npz file: {reason[:200]}") from error
