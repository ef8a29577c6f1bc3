"""Options of jax that change the results of a run beside its config; they are fixed here."""

import logging

import jax

from diffusion_jax.diffusion.streams import GENERATOR

LOG = logging.getLogger("diffusion_jax")

# Users can set these in the environment (JAX_ENABLE_X64). Other values change the noise of a seed,
# make noise depend on the batch, or make arrays and checkpoints 64-bit.
FIXED = {
    "jax_default_prng_impl": GENERATOR,
    "jax_enable_x64": False,
    "jax_numpy_dtype_promotion": "standard",
    "jax_random_seed_offset": 0,
    "jax_threefry_partitionable": True,
}


def fix() -> None:
    """Set the options to FIXED, with a warning for each that had another value."""
    for name, value in FIXED.items():
        if name not in jax.config.values:  # an option that this version of jax does not have
            continue
        before = jax.config.values[name]
        if getattr(before, "value", before) != value:
            LOG.warning("%s = %s: set to %s, because results depend on it", name, before, value)
            jax.config.update(name, value)
