"""What the numbers of a run depend on beside its config: options of jax, which are fixed here."""

import logging

import jax

from diffusion_jax.diffusion.streams import GENERATOR

LOG = logging.getLogger("diffusion_jax")

# jax takes them from the environment too (JAX_ENABLE_X64). Other values change the noise of a seed,
# make it depend on the batch, or make arrays and checkpoints of 64 bits.
FIXED = {
    "jax_default_prng_impl": GENERATOR,
    "jax_enable_x64": False,
    "jax_numpy_dtype_promotion": "standard",
    "jax_random_seed_offset": 0,
    "jax_threefry_partitionable": True,
}


def fix() -> None:
    """Set the options, with a warning where one had another value."""
    for name, value in FIXED.items():
        if name not in jax.config.values:  # an option that this version of jax does not have
            continue
        before = jax.config.values[name]
        if getattr(before, "value", before) != value:
            LOG.warning("%s = %s: set to %s, for results depend on it", name, before, value)
            jax.config.update(name, value)
