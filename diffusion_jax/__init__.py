"""Denoising diffusion models in JAX: a library of the mathematics, and an application that uses it.

``from diffusion_jax import schedules, samplers, process`` imports modules of the library, which is
the folder diffusion/. ``import diffusion_jax`` alone does not import jax.
"""

import importlib
from types import ModuleType

_OF_THE_LIBRARY = (
    "editing",
    "guidance",
    "learned_schedule",
    "likelihood",
    "losses",
    "process",
    "samplers",
    "schedules",
    "timesteps",
    "variances",
    "weightings",
)
__all__ = list(_OF_THE_LIBRARY)


def __getattr__(name: str) -> ModuleType:
    if name not in _OF_THE_LIBRARY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.diffusion.{name}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_OF_THE_LIBRARY])
