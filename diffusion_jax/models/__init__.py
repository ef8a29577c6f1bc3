"""Networks as pairs of pure functions: the only place that knows Flax."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

from flax import nnx
from ml_collections import ConfigDict

from diffusion_jax.config import ConfigError, choose, require
from diffusion_jax.models.mlp import MLP
from diffusion_jax.models.pure import pure
from diffusion_jax.models.unet import UNet


class Model(NamedTuple):
    """A network as two pure functions of its parameters, nested dicts of float32 arrays.

    init(key) -> params
    apply(params, x_t, timestep, label, keys) -> float32 output of the shape of x_t, its last axis
        doubled where the variance is learned. timestep: float, 1..T or between; label: a class
        0..num_classes - 1, or num_classes for "no class" (classifier-free guidance), None unless
        the model is class-conditional; keys: one per example for dropout, None for none.
    """

    init: Callable[..., Any]
    apply: Callable[..., Any]


def create_model(
    config: ConfigDict,
    shape: tuple[int, ...],
    num_classes: int | None,
    learned_variance: bool = False,
) -> Model:
    """The network that config.model describes, for data of one shape; allocates nothing.

    The fields of config.model are its name and the keyword arguments of that network.

    Raises:
        ConfigError: a field is unknown, missing, of a wrong type, or has a value that no network
            of this shape can be built from.
    """
    network = choose("config.model.name", config.name, MODELS, "model")
    fields = _check_fields(network, config)
    if fields["class_conditional"]:
        named = "config.model.class_conditional", True
        require(num_classes is not None, *named, "False for a data set without classes")

    def create() -> nnx.Module:
        return network(shape, num_classes, learned_variance, **fields, rngs=nnx.Rngs(0))

    return Model(*pure(create))


def _check_fields(network: type[nnx.Module], config: ConfigDict) -> dict[str, Any]:
    """The keyword arguments of a network, of the types that it declares."""
    parameters = inspect.signature(network.__init__).parameters.values()
    types = {
        p.name: p.annotation for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "rngs"
    }
    fields = {name: value for name, value in config.items() if name != "name"}
    for name in fields:
        choose("config.model", name, types, f"field of the {config.name}")
    for name, expected in types.items():
        if name not in fields:
            raise ConfigError(f"config.model.{name} is missing: the {config.name} needs it")
        value = fields[name]
        if get_args(expected):  # tuple[int, ...]
            fits = isinstance(value, tuple) and all(type(element) is int for element in value)
        else:
            fits = type(value) in {float: (float, int)}.get(expected, (expected,))
        words = {int: "an integer", float: "a number", bool: "True or False", str: "a string"}
        require(fits, f"config.model.{name}", value, words.get(expected, "a tuple of integers"))
    return fields


MODELS = {"unet": UNet, "mlp": MLP}
