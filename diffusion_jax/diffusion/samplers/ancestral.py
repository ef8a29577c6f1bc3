"""Ancestral sampling (Ho et al. 2020), optionally with Langevin corrections (Song et al. 2021)."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffusion_jax.diffusion import process
from diffusion_jax.diffusion.samplers.base import STATIC, Batch, Number, Sampler, Step, fold, normal
from diffusion_jax.diffusion.tracing import is_known
from diffusion_jax.diffusion.variances import VARIANCES
from diffusion_jax.errors import choose, require


class Ancestral(Sampler):
    """See ``ancestral``."""

    variance: str = dataclasses.field(metadata=STATIC)

    def step(self, now: Step) -> tuple[Batch, tuple[Any, ...]]:
        """x_{t-1} = mu(x_t, x_0) + sigma_t z, z = 0 in the last step (DDPM algorithm 2)."""
        x_t, row = now.x_t, now.row
        prediction = now.predict(x_t, row)
        mean = process.posterior_mean(row, prediction.x_0, x_t)
        variance = VARIANCES[self.variance]
        if variance.is_learned:
            allowed = "a fixed one, as the network predicts none"
            log_variance = prediction.log_variance
            if log_variance is None:
                require(False, "variance", self.variance, allowed)
        else:
            log_variance = variance.log_variance(row, None)
        deviation = jnp.where(now.is_last, 0.0, jnp.exp(log_variance / 2))
        return mean + deviation * normal(now.keys, x_t), now.state


class PredictorCorrector(Sampler):
    """See ``predictor_corrector``."""

    snr: Number
    num_corrections: int = dataclasses.field(metadata=STATIC)
    predictor: Sampler

    def step(self, now: Step) -> tuple[Batch, tuple[Any, ...]]:
        """x_t += e score + sqrt(2 e) z, e = 2 alpha (snr sqrt(1 - ab))^2, then the predictor."""
        x_t, row = now.x_t, now.row
        size = 2 * row.alpha * jnp.square(self.snr) * row.one_minus_alpha_bar
        for number in range(self.num_corrections):
            score = -now.predict(x_t, row).eps / jnp.sqrt(row.one_minus_alpha_bar)
            z = normal(fold(now.keys, number + 1), x_t)
            x_t = x_t + size * score + jnp.sqrt(2 * size) * z
        return self.predictor.step(now._replace(keys=fold(now.keys, 0), x_t=x_t))

    def num_evaluations(self, num_steps: int) -> int:
        """Per step, one for the predictor and one for each correction."""
        return num_steps * (1 + self.num_corrections)


def ancestral(variance: str = "posterior") -> Sampler:
    """Ancestral sampling from p(x_{t-1} | x_t), a Gaussian around the posterior mean (DDPM).

    ``variance`` is "beta" or "posterior" (beta~), the two fixed choices of DDPM section 3.2.
    "learned" and "learned_range" both use the variance in the ``Prediction`` of the network.

    Raises:
        ConfigError: an unknown variance.
    """
    choose("variance", variance, VARIANCES, "variance")
    return Ancestral(variance)


def predictor_corrector(
    variance: str = "posterior", snr: Number = 0.16, num_corrections: int = 1
) -> Sampler:
    """Langevin steps at each noise level, then an ancestral step (Song et al. 2021, algorithm 5).

    ``snr`` > 0 scales the size of the Langevin steps, 2 alpha (snr sqrt(1 - alpha_bar))^2.
    ``num_corrections`` >= 1 is their number at each noise level.

    Raises:
        ConfigError: an unknown variance, or a number out of its range.
    """
    require(not is_known(snr) or 0 < snr < np.inf, "snr", snr, "a finite number > 0")
    require(
        not is_known(num_corrections) or num_corrections >= 1,
        "num_corrections",
        num_corrections,
        "at least 1",
    )
    return PredictorCorrector(snr, num_corrections, ancestral(variance))
