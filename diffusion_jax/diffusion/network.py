"""A network with the objective that defines its output, and its ``predict`` for samplers."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from diffusion_jax.diffusion import losses
from diffusion_jax.diffusion.losses import Objective
from diffusion_jax.diffusion.process import Predict, Prediction
from diffusion_jax.diffusion.schedules.schedule import Schedule
from diffusion_jax.diffusion.streams import seed_key


class Model(NamedTuple):
    """A network as two pure functions of its parameters, nested dicts of float32 arrays.

    init(key) -> params
    apply(params, x_t, timestep, label, keys) -> float32 output of the shape of x_t; a learned
        variance doubles its last axis. timestep: float in [1, T]. label: a class
        0..num_classes - 1, or num_classes for "no class" (classifier-free guidance); None unless
        the model is class-conditional. keys: one per example for dropout, or None.
    """

    init: Callable[..., Any]
    apply: Callable[..., Any]

    @property
    def template(self) -> PyTree:
        """The structure and shapes of the parameters."""
        return jax.eval_shape(self.init, seed_key(0))


class Network(NamedTuple):
    """A network, and the objective that defines the meaning of its output."""

    model: Model
    objective: Objective


def create_predict(network: Network, params: PyTree, label: Int[Array, " batch"] | None) -> Predict:
    """The network as samplers call it: (x_t, row) -> x_0, eps and log sigma^2, without dropout."""

    def predict(x_t: Float[Array, "batch ..."], row: Schedule) -> Prediction:
        timestep = jnp.full(len(x_t), row.timestep)
        output = network.model.apply(params, x_t, timestep, label, None)
        return losses.decode_output(network.objective, row, x_t, output)

    return predict
