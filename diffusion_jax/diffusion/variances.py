"""The variance sigma^2 of p(x_{t-1} | x_t): fixed by the schedule, or predicted by the network."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion_jax.diffusion.process import Example
from diffusion_jax.diffusion.schedules.schedule import Schedule


class Variance(NamedTuple):
    """log sigma^2 as a function of a row and, if it is learned, of the network's output."""

    is_learned: bool
    log_variance: Callable[[Schedule, Any], Example]  # output is None if not learned


def log_posterior_variance(row: Schedule) -> Float[Array, "..."]:
    """Log beta~, or log beta where beta~ = 0 (at t = 1, before ``clip_posterior_variance``)."""
    return jnp.log(jnp.where(row.posterior_variance > 0, row.posterior_variance, row.beta))


def log_beta(row: Schedule) -> Float[Array, "..."]:
    """Log beta; at t = 1 ``log_posterior_variance``, as in the code of DDPM and iDDPM.

    Only L_0 depends on the variance at t = 1, and beta_1 would make L_0 worse. In a schedule
    without ``clip_posterior_variance`` the value at t = 1 is log beta_1.
    """
    is_first = row.one_minus_alpha_bar_prev == 0
    return jnp.where(is_first, log_posterior_variance(row), jnp.log(row.beta))


def learned_range(row: Schedule, output: Example) -> Example:
    """The log of sigma^2 = beta^f beta~^(1 - f), f = (output + 1) / 2 (iDDPM eq. 15)."""
    f = (output + 1) / 2
    return f * jnp.log(row.beta) + (1 - f) * log_posterior_variance(row)


VARIANCES: dict[str, Variance] = {
    "beta": Variance(False, lambda row, output: log_beta(row)),
    "posterior": Variance(False, lambda row, output: log_posterior_variance(row)),
    "learned_range": Variance(True, learned_range),
    "learned": Variance(True, lambda row, output: output),
}
