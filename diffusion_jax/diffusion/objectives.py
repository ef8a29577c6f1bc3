"""The training objectives: functions from parameters and examples to the losses of a step.

A new objective is a function that returns a ``losses.LossesOf``, and its line in OBJECTIVES.
"""

from collections.abc import Callable

from diffusion_jax.diffusion.learned_schedule import continuous_time
from diffusion_jax.diffusion.losses import LossesOf, discrete_time

# Called with an Objective, the function ``apply`` of the model, and the objective's own arguments.
OBJECTIVES: dict[str, Callable[..., LossesOf]] = {
    "discrete_time": discrete_time,
    "continuous_time": continuous_time,
}
