"""The forward process q, its posterior, and the prediction of a network (Ho et al. 2020, DDPM).

The functions take ONE example and ONE row of a schedule (scalars); ``jax.vmap`` extends them to a
batch. A row broadcasts over any shape, so that a whole batch with one common row works too.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion_jax.diffusion.schedules.schedule import Schedule

Example = Float[Array, "..."]


class Prediction(NamedTuple):
    """The predicted x_0 and eps of x_t, and log sigma^2 of p(x_{t-1} | x_t), or None if unknown."""

    x_0: Example
    eps: Example
    log_variance: Example | None = None


# The network as samplers, guidance and the probability flow call it: a batch x_t and ONE row.
Predict = Callable[[Float[Array, "batch ..."], Schedule], Prediction]


def q_sample(row: Schedule, x_0: Example, eps: Example) -> Example:
    """Compute x_t ~ q(x_t | x_0) from x_0 and the noise eps.

    x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps   (DDPM eq. 4)
    """
    return jnp.sqrt(row.alpha_bar) * x_0 + jnp.sqrt(row.one_minus_alpha_bar) * eps


def posterior_mean(row: Schedule, x_0: Example, x_t: Example) -> Example:
    """Mean of the posterior q(x_{t-1} | x_t, x_0).

    sqrt(alpha_bar_prev) beta / (1 - alpha_bar) x_0
      + sqrt(alpha) (1 - alpha_bar_prev) / (1 - alpha_bar) x_t   (DDPM eq. 7)
    """
    of_x_0, of_x_t = posterior_coefficients(row)
    return of_x_0 * x_0 + of_x_t * x_t


def posterior(row: Schedule, x_0: Example, x_t: Example) -> tuple[Example, Float[Array, ""]]:
    """Mean and variance of the posterior q(x_{t-1} | x_t, x_0), DDPM eqs. 6 and 7.

    The variance is beta~ = beta (1 - alpha_bar_prev) / (1 - alpha_bar), a column of the schedule.
    """
    return posterior_mean(row, x_0, x_t), row.posterior_variance


def posterior_coefficients(row: Schedule) -> tuple[Float[Array, "*rows"], Float[Array, "*rows"]]:
    """The factors of x_0 and of x_t in the posterior mean (DDPM eq. 7)."""
    of_x_0 = jnp.sqrt(row.alpha_bar_prev) * row.beta / row.one_minus_alpha_bar
    of_x_t = jnp.sqrt(row.alpha) * row.one_minus_alpha_bar_prev / row.one_minus_alpha_bar
    return of_x_0, of_x_t


def eps_of_x_0(row: Schedule, x_t: Example, x_0: Example) -> Example:
    """Compute eps from x_0 and x_t: eps = (x_t - sqrt(alpha_bar) x_0) / sqrt(1 - alpha_bar)."""
    return (x_t - jnp.sqrt(row.alpha_bar) * x_0) / jnp.sqrt(row.one_minus_alpha_bar)


def x_0_of_eps(row: Schedule, x_t: Example, eps: Example) -> Example:
    """Compute x_0 from eps and x_t: x_0 = (x_t - sqrt(1 - alpha_bar) eps) / sqrt(alpha_bar)."""
    return (x_t - jnp.sqrt(row.one_minus_alpha_bar) * eps) / jnp.sqrt(row.alpha_bar)


def clip_x_0(row: Schedule, x_t: Example, prediction: Prediction) -> Prediction:
    """Clip the predicted x_0 to [-1, 1], the range of images, and recompute eps from it."""
    x_0 = jnp.clip(prediction.x_0, -1.0, 1.0)
    return prediction._replace(x_0=x_0, eps=eps_of_x_0(row, x_t, x_0))
