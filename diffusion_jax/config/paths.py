"""The one place where a path that a user gives is made one of the file system."""

import pathlib

from diffusion_jax.errors import ConfigError


def expand(name: str, path: str) -> str:
    """A path whose leading ~ is a home directory; ``name`` is its flag or field, for the message.

    Raises:
        ConfigError: nobody knows which directory that is.
    """
    if not path.startswith("~"):
        return path
    try:
        return str(pathlib.Path(path).expanduser())
    except RuntimeError as error:
        raise ConfigError(f"{name} = {path!r}: must be without ~: {error}") from error
