"""TFDS, imported where it is used: it takes 1.4 s, and a second start needs none of it."""

import importlib
from types import ModuleType

from diffusion_jax.errors import ConfigError


def import_tfds() -> ModuleType:
    """The module tensorflow_datasets.

    Raises:
        ConfigError: it, or something that it imports, is not installed. It logs that, goes on, and
            lacks most of its functions then.
    """
    from absl import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)
    try:
        tfds = importlib.import_module("tensorflow_datasets")
        if not hasattr(tfds, "builder_from_directory"):
            importlib.import_module("tensorflow_datasets.public_api")  # raises what it logged
        return tfds
    except ImportError as error:
        raise ConfigError(f"tensorflow_datasets cannot be imported: {error}") from error
    finally:
        logging.set_verbosity(verbosity)
