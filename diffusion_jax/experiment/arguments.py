"""The fields of a config that are arguments of a function of a registry."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from diffusion_jax.errors import require

Registry = Mapping[str, Callable[..., Any]]


def names_of_arguments(registry: Registry) -> list[str]:
    """The names of all arguments of the registry's functions, each once.

    ``num_timesteps`` is left out, because its field is set for every schedule.
    """
    signatures = (inspect.signature(function) for function in registry.values())
    names = dict.fromkeys(name for signature in signatures for name in signature.parameters)
    return [name for name in names if name != "num_timesteps"]


def arguments_of(registry: Registry, name: str, section: str, fields: ConfigDict) -> dict[str, Any]:
    """The arguments of the function ``name`` that a section of the config sets.

    Raises:
        ConfigError: the section sets an argument that only other functions of the registry have.
    """
    parameters = inspect.signature(registry[name]).parameters
    names = names_of_arguments(registry)
    arguments = {argument: fields[argument] for argument in names if fields[argument] is not None}
    for argument, value in arguments.items():
        allowed = f"unset, {name} has no such argument ({', '.join(parameters) or 'it has none'})"
        require(argument in parameters, f"config.{section}.{argument}", value, allowed)
    return arguments
