"""The default config, so that ``--config=configs/default.py`` works.

diffusion_jax/config/default.py lists all fields.
"""

from diffusion_jax.config.default import get_config

__all__ = ["get_config"]
