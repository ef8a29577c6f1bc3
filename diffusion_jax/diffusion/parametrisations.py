"""The quantities that a network may predict: eps, x_0, v, mu or the score.

To add a prediction, write a ``Parametrisation`` and add its line to PREDICTIONS.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion_jax.diffusion.process import (
    Example,
    Prediction,
    eps_of_x_0,
    posterior_coefficients,
    posterior_mean,
    x_0_of_eps,
)
from diffusion_jax.diffusion.schedules.schedule import Schedule


class Parametrisation(NamedTuple):
    """One quantity that a network may predict, and its conversions from and to (x_0, eps).

    encode(row, (x_0, eps), x_t) is the target, and decode(row, x_t, output) -> Prediction its
    inverse. An error in x_0 is an error gain(row) times as large in the quantity, at constant x_t.
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
    """The velocity dx_t/dphi of x_t = cos(phi) x_0 + sin(phi) eps (Salimans & Ho 2022, section 4).

    v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0
    """
    return jnp.sqrt(row.alpha_bar) * truth.eps - jnp.sqrt(row.one_minus_alpha_bar) * truth.x_0


def _decode_v(row: Schedule, x_t: Example, output: Example) -> Prediction:
    signal, noise = jnp.sqrt(row.alpha_bar), jnp.sqrt(row.one_minus_alpha_bar)
    return Prediction(x_0=signal * x_t - noise * output, eps=noise * x_t + signal * output)


def _encode_mu(row: Schedule, truth: Prediction, x_t: Example) -> Example:
    """The mean of the posterior (DDPM eq. 7)."""
    return posterior_mean(row, truth.x_0, x_t)


def _decode_mu(row: Schedule, x_t: Example, output: Example) -> Prediction:
    of_x_0, of_x_t = posterior_coefficients(row)
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
    "mu": Parametrisation(_encode_mu, _decode_mu, lambda row: posterior_coefficients(row)[0]),
    "score": Parametrisation(
        _encode_score, _decode_score, lambda row: jnp.sqrt(row.snr / row.one_minus_alpha_bar)
    ),
}


def determines_x_0(prediction: Parametrisation, schedule: Schedule) -> bool:
    """Whether the prediction determines x_0 at every row: eps and the score do not at zero SNR."""
    return bool(jnp.all(prediction.gain(schedule) > 0))
