"""The default config, at the place where configs beside this file look for it.

All fields are written out in diffusion_jax/config/default.py.
"""

from diffusion_jax.config.default import get_config

__all__ = ["get_config"]
