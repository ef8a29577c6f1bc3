"""Noise schedules: pure functions that return a ``Schedule``, and functions that transform one.

To add a schedule, write a function in families.py and add its line to SCHEDULES in that file.
"""

from diffusion_jax.diffusion.schedules.families import (
    SCHEDULES,
    constant,
    cosine,
    from_betas,
    jsd,
    linear,
    quadratic,
    scaled_linear,
    sigmoid,
    sigmoid_beta,
    warmup10,
    warmup50,
)
from diffusion_jax.diffusion.schedules.schedule import (
    Scalar,
    Schedule,
    clip_posterior_variance,
    num_timesteps,
    pad,
    terminal_row,
    with_terminal_row,
)
from diffusion_jax.diffusion.schedules.transforms import (
    at_log_snr,
    from_log_snr,
    respace,
    shift_log_snr,
    zero_terminal_snr,
)

__all__ = [
    "SCHEDULES",
    "Scalar",
    "Schedule",
    "at_log_snr",
    "clip_posterior_variance",
    "constant",
    "cosine",
    "from_betas",
    "from_log_snr",
    "jsd",
    "linear",
    "num_timesteps",
    "pad",
    "quadratic",
    "respace",
    "scaled_linear",
    "shift_log_snr",
    "sigmoid",
    "sigmoid_beta",
    "terminal_row",
    "warmup10",
    "warmup50",
    "with_terminal_row",
    "zero_terminal_snr",
]
