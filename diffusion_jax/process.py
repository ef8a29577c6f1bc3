"""The forward process q and what a network may predict about it (Ho et al. 2020, DDPM).

Everything here is about ONE example and ONE row of a schedule (scalars); ``jax.vmap`` makes
batches. Rows broadcast over examples of any shape, so a batch with one common row works too.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax.scipy.special import log_ndtr
from jaxtyping import Array, Float

from diffusion_jax.schedules import Schedule

Example = Float[Array, "..."]


class Prediction(NamedTuple):
    """What a network says about x_t: the clean x_0, the noise eps and, if learned, log sigma^2."""

    x_0: Example
    eps: Example
    log_variance: Example | None = None


# All that samplers, guidance and the probability flow see of a network: a batch x_t and ONE row.
Predict = Callable[[Float[Array, "batch ..."], Schedule], Prediction]


def q_sample(row: Schedule, x_0: Example, eps: Example) -> Example:
    """Diffuse x_0 to timestep t in one jump.

    x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps   (DDPM eq. 4)
    """
    return jnp.sqrt(row.alpha_bar) * x_0 + jnp.sqrt(row.one_minus_alpha_bar) * eps


def posterior_mean(row: Schedule, x_0: Example, x_t: Example) -> Example:
    """Mean of the posterior q(x_{t-1} | x_t, x_0).

    sqrt(alpha_bar_prev) beta / (1 - alpha_bar) x_0
      + sqrt(alpha) (1 - alpha_bar_prev) / (1 - alpha_bar) x_t   (DDPM eq. 7)
    """
    of_x_0, of_x_t = _posterior_coefficients(row)
    return of_x_0 * x_0 + of_x_t * x_t


def posterior(row: Schedule, x_0: Example, x_t: Example) -> tuple[Example, Float[Array, ""]]:
    """Mean and variance of the posterior q(x_{t-1} | x_t, x_0), DDPM eqs. 6 and 7.

    The variance is beta~ = beta (1 - alpha_bar_prev) / (1 - alpha_bar), a column of the schedule.
    """
    return posterior_mean(row, x_0, x_t), row.posterior_variance


def _posterior_coefficients(
    row: Schedule,
) -> tuple[Float[Array, "*rows"], Float[Array, "*rows"]]:
    of_x_0 = jnp.sqrt(row.alpha_bar_prev) * row.beta / row.one_minus_alpha_bar
    of_x_t = jnp.sqrt(row.alpha) * row.one_minus_alpha_bar_prev / row.one_minus_alpha_bar
    return of_x_0, of_x_t


def eps_of_x_0(row: Schedule, x_t: Example, x_0: Example) -> Example:
    """The noise that takes x_0 to x_t: eps = (x_t - sqrt(alpha_bar) x_0) / sqrt(1 - alpha_bar)."""
    return (x_t - jnp.sqrt(row.alpha_bar) * x_0) / jnp.sqrt(row.one_minus_alpha_bar)


def x_0_of_eps(row: Schedule, x_t: Example, eps: Example) -> Example:
    """The image under the noise: x_0 = (x_t - sqrt(1 - alpha_bar) eps) / sqrt(alpha_bar)."""
    return (x_t - jnp.sqrt(row.one_minus_alpha_bar) * eps) / jnp.sqrt(row.alpha_bar)


def clip_x_0(row: Schedule, x_t: Example, prediction: Prediction) -> Prediction:
    """Clip the predicted x_0 to [-1, 1], the range of images, and keep eps consistent with it."""
    x_0 = jnp.clip(prediction.x_0, -1.0, 1.0)
    return prediction._replace(x_0=x_0, eps=eps_of_x_0(row, x_t, x_0))


def decoder_log_likelihood(
    x_0: Example, mean: Example, log_variance: Example, levels: int | None
) -> Example:
    """Log p(x_0|x_1) per dimension: the mass of N(mean, sigma^2) in the bin of x_0 (DDPM eq. 13).

    ``levels`` equidistant values in [-1, 1] have bins of half-width 1 / (levels - 1), the outer
    two reaching to infinity. Without levels the data are continuous: the density itself.
    """
    deviation = jnp.exp(log_variance / 2)
    distance = (x_0 - mean) / deviation
    if levels is None:
        return -(jnp.square(distance) + log_variance + math.log(2 * math.pi)) / 2
    half = 1 / (levels - 1) / deviation
    # Phi(b) - Phi(a) = Phi(-a) - Phi(-b): the tail where Phi is small keeps its digits
    low, high = -jnp.abs(distance) - half, -jnp.abs(distance) + half
    log_low, log_high = log_ndtr(low), log_ndtr(high)
    tiny = jnp.finfo(log_high.dtype).tiny  # no gradient of log(0) where a bin is all but empty
    inner = log_high + jnp.log(-jnp.expm1(-jnp.maximum(log_high - log_low, tiny)))
    quarter = 0.5 / (levels - 1)  # of a bin: levels are as exact as float32 has them
    return jnp.select(
        [x_0 < -1 + quarter, x_0 > 1 - quarter],
        [log_ndtr(distance + half), log_ndtr(half - distance)],
        inner,
    )


# What a network may be trained to put out. encode(row, (x_0, eps), x_t) is the target,
# decode(row, x_t, output) -> Prediction its inverse.


class Parametrisation(NamedTuple):
    """One quantity a network may predict, with the way there and back through (x_0, eps).

    gain(row) is how much an error in x_0 moves it, at a given x_t.
    """

    encode: Callable[[Schedule, Prediction, Example], Example]
    decode: Callable[[Schedule, Example, Example], Prediction]
    gain: Callable[[Schedule], Float[Array, "..."]]


def _encode_eps(row: Schedule, truth: Prediction, x_t: Example) -> Example:
    """The noise eps itself (DDPM eq. 14)."""
    return truth.eps


def _decode_eps(row: Schedule, x_t: Example, output: Example) -> Prediction:
    return Prediction(x_0_of_eps(row, x_t, output), output)


def _encode_x_0(row: Schedule, truth: Prediction, x_t: Example) -> Example:
    """The clean image x_0."""
    return truth.x_0


def _decode_x_0(row: Schedule, x_t: Example, output: Example) -> Prediction:
    return Prediction(output, eps_of_x_0(row, x_t, output))


def _encode_v(row: Schedule, truth: Prediction, x_t: Example) -> Example:
    """The velocity of the angle that mixes x_0 and eps (Salimans & Ho 2022, section 4).

    v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0
    """
    return jnp.sqrt(row.alpha_bar) * truth.eps - jnp.sqrt(row.one_minus_alpha_bar) * truth.x_0


def _decode_v(row: Schedule, x_t: Example, output: Example) -> Prediction:
    signal, noise = jnp.sqrt(row.alpha_bar), jnp.sqrt(row.one_minus_alpha_bar)
    return Prediction(x_0=signal * x_t - noise * output, eps=noise * x_t + signal * output)


def _encode_mu(row: Schedule, truth: Prediction, x_t: Example) -> Example:
    """The mean of the posterior (DDPM eq. 8)."""
    return posterior_mean(row, truth.x_0, x_t)


def _decode_mu(row: Schedule, x_t: Example, output: Example) -> Prediction:
    of_x_0, of_x_t = _posterior_coefficients(row)
    return _decode_x_0(row, x_t, (output - of_x_t * x_t) / of_x_0)


def _encode_score(row: Schedule, truth: Prediction, x_t: Example) -> Example:
    """The score of q(x_t | x_0): -eps / sqrt(1 - alpha_bar) (Song et al. 2021)."""
    return -truth.eps / jnp.sqrt(row.one_minus_alpha_bar)


def _decode_score(row: Schedule, x_t: Example, output: Example) -> Prediction:
    return _decode_eps(row, x_t, -jnp.sqrt(row.one_minus_alpha_bar) * output)


PREDICTIONS: dict[str, Parametrisation] = {
    "eps": Parametrisation(_encode_eps, _decode_eps, lambda row: jnp.sqrt(row.snr)),
    "x_0": Parametrisation(_encode_x_0, _decode_x_0, lambda row: jnp.ones_like(row.beta)),
    "v": Parametrisation(_encode_v, _decode_v, lambda row: 1 / jnp.sqrt(row.one_minus_alpha_bar)),
    "mu": Parametrisation(_encode_mu, _decode_mu, lambda row: _posterior_coefficients(row)[0]),
    "score": Parametrisation(
        _encode_score, _decode_score, lambda row: jnp.sqrt(row.snr / row.one_minus_alpha_bar)
    ),
}

# Those whose x_0 divides by sqrt(alpha_bar): impossible where alpha_bar_T = 0.
NEEDS_SIGNAL = ("eps", "score")
