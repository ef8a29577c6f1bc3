"""The import of TFDS, which takes 1.4 s; runs on decoded arrays do without it."""

import importlib
from types import ModuleType

from diffusion_jax.errors import ConfigError


def import_tfds() -> ModuleType:
    """Import the module tensorflow_datasets.

    If a package that it imports is missing, TFDS only logs the error and lacks most functions.

    Raises:
        ConfigError: TFDS, or a package that it imports, is not installed.
    """
    from absl import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)
    try:
        tfds = importlib.import_module("tensorflow_datasets")
        if not hasattr(tfds, "builder_from_directory"):
            importlib.import_module("tensorflow_datasets.public_api")  # raises the logged error
        return tfds
    except ImportError as error:
        raise ConfigError(f"tensorflow_datasets cannot be imported: {error}") from error
    finally:
        logging.set_verbosity(verbosity)
