"""The training objectives: functions from parameters and examples to the losses of a step.

To add an objective, write a function that returns a ``losses.LossesOf`` and add its line to
OBJECTIVES.
"""

from collections.abc import Callable

from diffusion_jax.diffusion.learned_schedule import continuous_time
from diffusion_jax.diffusion.losses import LossesOf, discrete_time

# Arguments: an Objective, the function ``apply`` of the model, then the entry's own arguments.
OBJECTIVES: dict[str, Callable[..., LossesOf]] = {
    "discrete_time": discrete_time,
    "continuous_time": continuous_time,
}
