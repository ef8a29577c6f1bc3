"""Exact denoisers of Gaussian data and Gaussian mixtures, and the reverse chain in float64."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.diffusion.process import Prediction

# beta_1 .. beta_T as the papers define them, in float64


def linear_betas(num_timesteps):
    """Ho et al. 2020, section 4."""
    return np.linspace(1e-4, 0.02, num_timesteps)


def cosine_betas(num_timesteps, s=0.008):
    """Nichol & Dhariwal 2021, eq. 17, clipped at 0.999."""
    f = np.cos((np.arange(num_timesteps + 1) / num_timesteps + s) / (1 + s) * np.pi / 2) ** 2
    return np.minimum(1 - f[1:] / f[:-1], 0.999)


BETAS = {"linear": linear_betas, "cosine": cosine_betas}


class Row(NamedTuple):
    """The quantities that follow from the betas, in float64, at one timestep or at all of them."""

    beta: np.ndarray
    alpha: np.ndarray
    alpha_bar: np.ndarray
    alpha_bar_prev: np.ndarray

    @property
    def noise(self):
        return 1 - self.alpha_bar

    @property
    def noise_prev(self):
        return 1 - self.alpha_bar_prev

    @property
    def posterior_variance(self):
        return self.beta * self.noise_prev / self.noise


def columns(betas):
    alpha_bar = np.cumprod(1 - betas)
    return Row(betas, 1 - betas, alpha_bar, np.append(1.0, alpha_bar[:-1]))


def rows(betas):
    return [Row(*values) for values in zip(*columns(betas))]


# Closed-form denoisers: functions of x_t and a row of the schedule, used in place of a network.


def gaussian(mean, variance):
    """E[x_0 | x_t] and E[eps | x_t] for x_0 ~ N(mean, variance I)."""

    def predict(x_t, row):
        total = row.alpha_bar * variance + row.one_minus_alpha_bar
        centred = (x_t - jnp.sqrt(row.alpha_bar) * mean) / total
        return Prediction(
            x_0=mean + jnp.sqrt(row.alpha_bar) * variance * centred,
            eps=jnp.sqrt(row.one_minus_alpha_bar) * centred,
        )

    return predict


def mixture(weights, means, variance):
    """E[x_0 | x_t] and E[eps | x_t] for a mixture of N(means[k], variance I) on the last axis."""
    log_weights, means = jnp.log(jnp.asarray(weights)), jnp.asarray(means)

    def of_point(x_t, row):
        total = row.alpha_bar * variance + row.one_minus_alpha_bar
        gaps = x_t[None] - jnp.sqrt(row.alpha_bar) * means
        share = jax.nn.softmax(log_weights - jnp.sum(gaps**2, axis=-1) / (2 * total))
        centred = share @ gaps / total
        return Prediction(
            x_0=share @ means + jnp.sqrt(row.alpha_bar) * variance * centred,
            eps=jnp.sqrt(row.one_minus_alpha_bar) * centred,
        )

    return jax.vmap(of_point, (0, None))


class Step(NamedTuple):
    """One step of a chain of Gaussian data: x_{t-1} = slope x_t + shift + deviation z."""

    slope: float
    shift: float
    deviation: float


def linear_prediction(row, mean, variance):
    """(slope, shift) of E[x_0 | x_t] and of E[eps | x_t] as functions of x_t, in float64."""
    signal, total = np.sqrt(row.alpha_bar), row.alpha_bar * variance + row.noise
    x_0 = np.array([signal * variance / total, mean - signal**2 * variance / total * mean])
    eps = np.array([1, -signal * mean]) * np.sqrt(row.noise) / total
    return x_0, eps


def ancestral_step(row, mean, variance, sigma2):
    """DDPM algorithm 2: (x_t - beta / sqrt(1 - ab) eps) / sqrt(alpha) + sigma z."""
    _, eps = linear_prediction(row, mean, variance)
    slope, shift = (np.array([1, 0]) - row.beta / np.sqrt(row.noise) * eps) / np.sqrt(row.alpha)
    return Step(slope, shift, np.sqrt(sigma2) if row.alpha_bar_prev < 1 else 0.0)


def ddim_step(row, mean, variance, eta):
    """DDIM eqs. 12 and 16."""
    x_0, eps = linear_prediction(row, mean, variance)
    ratio = 1 - row.alpha_bar / row.alpha_bar_prev
    sigma = eta * np.sqrt(row.noise_prev / row.noise) * np.sqrt(ratio)
    direction = np.sqrt(max(row.noise_prev - sigma**2, 0.0))
    return Step(*(np.sqrt(row.alpha_bar_prev) * x_0 + direction * eps), sigma)


def moments(steps):
    """Mean and variance of x_0 for x_T ~ N(0, 1); ``steps`` are in the order of the chain."""
    mean, variance = 0.0, 1.0
    for step in steps:
        mean = step.slope * mean + step.shift
        variance = step.slope**2 * variance + step.deviation**2
    return mean, variance
