"""The devices of a config, and the precision of the products that they compute."""

import logging

import jax
from ml_collections import ConfigDict

from diffusion_jax.config.config import value_of
from diffusion_jax.config.default import FIELDS
from diffusion_jax.errors import choose
from diffusion_jax.runtime import devices
from diffusion_jax.runtime.numerics import HIGHEST, PRECISIONS

LOG = logging.getLogger("diffusion_jax")


def start_devices(
    config: ConfigDict, batch_size: int, *, divide: bool, num_jobs: int | None = None
) -> list[jax.Device]:
    """Start jax as the config says, see ``runtime.devices.start``; the devices of all processes.

    Raises:
        ConfigError: a number of devices or a setting of processes that cannot be.
    """
    devices.start(
        config.num_devices,
        batch_size,
        config.distributed,
        divide,
        num_jobs,
        deterministic=config.deterministic,
    )
    for field in ("precision", "sampling.precision", "evaluate.precision"):
        create_precision(config, field)
        value = value_of(config, field)
        if not FIELDS[field].is_default(value) and jax.default_backend() == "cpu":
            LOG.info("config.%s = %s: on a CPU it changes nothing", field, value)
    return devices.select_devices(config.num_devices)


def create_precision(config: ConfigDict, field: str) -> str:
    """The precision of the products of a mode.

    If it is unset, that of sampling is training's, and that of evaluation is the highest.

    Raises:
        ConfigError: an unknown precision.
    """
    values = {
        "precision": config.precision,
        "sampling.precision": config.sampling.precision or config.precision,
        "evaluate.precision": config.evaluate.precision or HIGHEST,
    }
    choose(f"config.{field}", values[field], PRECISIONS, "precision")
    return values[field]
