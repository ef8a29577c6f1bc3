"""Networks as pairs of pure functions (init, apply); the only folder that imports Flax.

A new network is a Flax module in a file here and its line in MODELS.
"""

import inspect
from collections.abc import Mapping
from typing import Any, get_args

from flax import nnx

from diffusion_jax.diffusion.network import Model
from diffusion_jax.errors import ConfigError, choose, require
from diffusion_jax.models.mlp import MLP
from diffusion_jax.models.pure import pure
from diffusion_jax.models.unet import UNet


def create_model(
    fields: Mapping[str, Any],
    shape: tuple[int, ...],
    num_classes: int | None,
    *,
    learned_variance: bool = False,
) -> Model:
    """Create the network that config.model describes, for data of one shape.

    ``fields`` holds the name in MODELS and the keyword arguments. No parameters are allocated.

    Raises:
        ConfigError: a field is unknown or missing, or has a wrong type, or its value does not fit
            the network or the shape.
    """
    network = choose("config.model.name", fields["name"], MODELS, "model")
    arguments = _check_fields(network, fields)
    if arguments["class_conditional"]:
        named = "config.model.class_conditional", True
        require(num_classes is not None, *named, "False for a data set without classes")

    def create(rngs: nnx.Rngs) -> nnx.Module:
        return network(shape, num_classes, learned_variance, **arguments, rngs=rngs)

    return Model(*pure(create))


def _check_fields(network: type[nnx.Module], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of a network, checked against the types of its signature."""
    parameters = inspect.signature(network.__init__).parameters.values()
    types = {
        p.name: p.annotation for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "rngs"
    }
    model = fields["name"]
    fields = {name: value for name, value in fields.items() if name != "name"}
    for name in fields:
        choose("config.model", name, types, f"field of the {model}")
    for name, expected in types.items():
        if name not in fields:
            raise ConfigError(f"config.model.{name} is missing: the {model} needs it")
        value = fields[name]
        if get_args(expected):  # tuple[int, ...]
            fits = isinstance(value, tuple) and all(type(element) is int for element in value)
        else:
            fits = type(value) in {float: (float, int)}.get(expected, (expected,))
        words = {int: "an integer", float: "a number", bool: "True or False", str: "a string"}
        require(fits, f"config.model.{name}", value, words.get(expected, "a tuple of integers"))
    return fields


MODELS = {"unet": UNet, "mlp": MLP}
