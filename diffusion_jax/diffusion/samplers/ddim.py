"""DDIM (Song et al. 2021), and the samplers of other papers that compute the same step."""

from typing import Any

import jax.numpy as jnp

from diffusion_jax.diffusion.samplers.base import Batch, Number, Sampler, Step, normal
from diffusion_jax.diffusion.tracing import is_known
from diffusion_jax.errors import require


class Ddim(Sampler):
    """See ``ddim``."""

    eta: Number

    def step(self, now: Step) -> tuple[Batch, tuple[Any, ...]]:
        """x_{t-1} = sqrt(ab_prev) x_0 + sqrt(1 - ab_prev - sigma^2) eps + sigma z (DDIM eq. 12).

        sigma^2 = eta^2 beta~. To avoid subtracting nearly equal numbers, 1 - ab_prev - sigma^2 is
        computed as (1 - ab_prev) (1 - eta^2 + eta^2 alpha (1 - ab_prev) / (1 - ab)).
        """
        x_t, row = now.x_t, now.row
        prediction = now.predict(x_t, row)
        eta2 = self.eta**2
        share = 1 - eta2 + eta2 * row.alpha * row.one_minus_alpha_bar_prev / row.one_minus_alpha_bar
        direction = jnp.sqrt(row.one_minus_alpha_bar_prev * share)
        x_prev = jnp.sqrt(row.alpha_bar_prev) * prediction.x_0 + direction * prediction.eps
        x_prev += self.eta * jnp.sqrt(row.posterior_variance) * normal(now.keys, x_t)
        return x_prev, now.state


def ddim(eta: Number = 0.0) -> Sampler:
    """The sampler of denoising diffusion implicit models, DDIM (Song et al. 2021).

    ``eta`` in [0, 1]: 0 is deterministic, 1 has the mean and variance of ancestral sampling.

    Raises:
        ConfigError: eta outside [0, 1] (a traced eta is not checked).
    """
    require(not is_known(eta) or 0 <= eta <= 1, "eta", eta, "in [0, 1]")
    return Ddim(eta)


def euler() -> Sampler:
    """Euler's method for dy = eps d sigma, k-diffusion's "euler": the step of DDIM with eta = 0."""
    return ddim(0.0)


def euler_ancestral(eta: Number = 1.0) -> Sampler:
    """An Euler step to sigma_down, then noise up to sigma_prev: k-diffusion's "euler_ancestral".

    sigma_up^2 = eta^2 sigma_prev^2 (sigma^2 - sigma_prev^2) / sigma^2 is eta^2 beta~ in the units
    of x_t, so that the step is that of DDIM with the same eta in [0, 1].

    Raises:
        ConfigError: eta outside [0, 1] (a traced eta is not checked).
    """
    return ddim(eta)


def dpmpp_1s() -> Sampler:
    """DPM-Solver++(1), the first-order exponential integrator of x_0: DDIM's step with eta = 0."""
    return ddim(0.0)
