"""Expansion of ~ in the paths of flags and fields."""

import pathlib

from diffusion_jax.errors import ConfigError


def expand(name: str, path: str) -> str:
    """Replace a leading ~ by the home directory; ``name`` is the flag or field, for the message.

    Raises:
        ConfigError: the home directory is unknown.
    """
    if not path.startswith("~"):
        return path
    try:
        return str(pathlib.Path(path).expanduser())
    except RuntimeError as error:
        raise ConfigError(f"{name} = {path!r}: must be without ~: {error}") from error
