"""Weightings of the squared error at each timestep, defined in terms of the error of x_0.

A weighting gives the weight of the squared error of x_0 as a function of a row. An error in x_0 is
an error gain_p(row) times as large in another prediction p (``parametrisations.Parametrisation``).
The same loss in terms of p therefore has this weight divided by gain_p^2, so that a weighting means
the same loss for every prediction. Only "simple" depends on the prediction.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion_jax.diffusion.parametrisations import PREDICTIONS
from diffusion_jax.diffusion.schedules.schedule import Schedule
from diffusion_jax.errors import require

Weight = Float[Array, "..."]

# (row, gain of the prediction, log sigma^2 of p(x_{t-1}|x_t)) -> weight of the error of x_0
Weighting = Callable[[Schedule, Weight, Weight], Weight]


def vlb_weight(row: Schedule, log_variance: Weight) -> Weight:
    """The weight of the squared error of x_0 in KL(q(x_{t-1}|x_t,x_0) || p(x_{t-1}|x_t)), t >= 2.

    alpha_bar_prev beta^2 / (2 sigma^2 (1 - alpha_bar)^2), from DDPM eqs. 8 to 10. This is half the
    squared gain of the posterior mean, over sigma^2. For sigma^2 = beta~ it is half the decrease of
    the SNR from t - 1 to t.
    """
    return PREDICTIONS["mu"].gain(row) ** 2 / 2 * jnp.exp(-log_variance)


def simple() -> Weighting:
    """Weight 1 for the squared error of the prediction itself: L_simple (DDPM eq. 14)."""
    return lambda row, gain, log_variance: gain**2


def vlb() -> Weighting:
    """The weight of the variational bound, see ``vlb_weight``."""
    return lambda row, gain, log_variance: vlb_weight(row, log_variance)


def snr() -> Weighting:
    """SNR: the same loss as L_simple of eps (Salimans & Ho 2022, section 4)."""
    return lambda row, gain, log_variance: row.snr


def truncated_snr() -> Weighting:
    """max(SNR, 1) (Salimans & Ho 2022, section 4)."""
    return lambda row, gain, log_variance: jnp.maximum(row.snr, 1.0)


def min_snr(gamma: float = 5.0) -> Weighting:
    """min(SNR, gamma) (Hang et al. 2023, arXiv 2303.09556).

    Raises:
        ConfigError: gamma <= 0.
    """
    require(0 < gamma < math.inf, "gamma", gamma, "a finite number above 0")
    return lambda row, gain, log_variance: jnp.minimum(row.snr, gamma)


def p2(gamma: float = 1.0, k: float = 1.0) -> Weighting:
    """SNR / (k + SNR)^gamma: 1 / (k + SNR)^gamma for eps (Choi et al. 2022, arXiv 2204.00227).

    Raises:
        ConfigError: gamma < 0 or k <= 0.
    """
    require(gamma >= 0, "gamma", gamma, "at least 0")
    require(0 < k < math.inf, "k", k, "a finite number above 0")
    return lambda row, gain, log_variance: row.snr / (k + row.snr) ** gamma


def sigmoid(bias: float = 0.0) -> Weighting:
    """The logistic function of bias - log SNR, for eps (Kingma & Gao 2023, arXiv 2303.00848).

    The paper also divides the weight by the density of log SNR. This function does not, so that the
    loss depends on the schedule. The default bias is 0, as in code after Hoogeboom et al. 2024
    (SiD2, arXiv 2410.19324) for 128 pixels; that code has -1 for 256 and -3 for 512. Code after
    Kingma & Gao has 2 (BayesFlow 2.0.12). The numbers were not checked against the papers' text.
    """
    return lambda row, gain, log_variance: row.snr * jax.nn.sigmoid(bias - row.log_snr)


def edm(sigma_data: float = 0.5) -> Weighting:
    """(sigma^2 + sigma_data^2) / (sigma sigma_data)^2 (Karras et al. 2022, table 1).

    This equals SNR + 1 / sigma_data^2; ``sigma_data`` is the standard deviation of the data.

    Raises:
        ConfigError: sigma_data <= 0.
    """
    require(0 < sigma_data < math.inf, "sigma_data", sigma_data, "a finite number above 0")
    return lambda row, gain, log_variance: row.snr + sigma_data**-2


WEIGHTINGS: dict[str, Callable[..., Weighting]] = {
    "simple": simple,
    "vlb": vlb,
    "snr": snr,
    "truncated_snr": truncated_snr,
    "min_snr": min_snr,
    "p2": p2,
    "sigmoid": sigmoid,
    "edm": edm,
}
