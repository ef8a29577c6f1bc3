"""The training objectives: what makes the losses of a step of a network's output."""

from collections.abc import Callable

from diffusion_jax.diffusion.learned_schedule import continuous_time
from diffusion_jax.diffusion.losses import LossesOf, discrete_time

# Called with an Objective, the function ``apply`` of the model, and what is the objective's own.
OBJECTIVES: dict[str, Callable[..., LossesOf]] = {
    "discrete_time": discrete_time,
    "continuous_time": continuous_time,
}
