"""Denoising diffusion models in JAX: schedules, samplers and losses, and what trains with them.

``from diffusion_jax import schedules, samplers, process`` imports the library of diffusion/;
importing the package itself imports neither jax nor anything else.
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
