"""The noise schedules of the literature, each a function from its parameters to a ``Schedule``.

With plain numbers a schedule is computed in float64 on the host and rounded once to float32. With
jax values (under jit, vmap or grad) the same formula runs in jax. No formula subtracts nearly equal
numbers, so that its relative error is 1e-6 (closed forms) or 1e-5 (running products).
"""

import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Array, Float

from diffusion_jax.diffusion.schedules.columns import (
    array_module,
    from_alpha_bars,
    from_columns,
    log_one_minus,
    require_betas,
    running_product,
)
from diffusion_jax.diffusion.schedules.schedule import Column, Scalar, Schedule, require_length
from diffusion_jax.diffusion.tracing import is_known
from diffusion_jax.errors import at_most, require


def _grid(num_timesteps: int) -> np.ndarray:
    """(t - 1)/(T - 1): 0 at the first timestep, 1 at the last (0 if T = 1)."""
    require_length("num_timesteps", num_timesteps)
    return np.linspace(0, 1, num_timesteps)


def _between(beta_start: Scalar, beta_end: Scalar, weight: np.ndarray) -> Column:
    require_betas(beta_start=beta_start, beta_end=beta_end)
    return beta_start * (1 - weight) + beta_end * weight


def linear(
    num_timesteps: int, beta_start: Scalar = 1e-4, beta_end: Scalar = 0.02, rescale: bool = False
) -> Schedule:
    """The linear schedule of DDPM: beta grows linearly from beta_start to beta_end.

    ``rescale`` multiplies both by 1000/T (iDDPM), so that alpha_bar_T hardly changes with T.

    Raises:
        ConfigError: T < 1, a beta outside (0, 1], or a rescaled beta above 1.
    """
    grid = _grid(num_timesteps)
    require_betas(beta_start=beta_start, beta_end=beta_end)
    if rescale:
        for beta in filter(is_known, (beta_start, beta_end)):
            smallest = math.ceil(1000 * beta)
            allowed = f">= {smallest}, as rescale multiplies beta = {beta} by 1000/num_timesteps"
            require(num_timesteps >= smallest, "num_timesteps", num_timesteps, allowed)
        beta_start, beta_end = (beta * 1000 / num_timesteps for beta in (beta_start, beta_end))
    return from_betas(_between(beta_start, beta_end, grid))


def quadratic(num_timesteps: int, beta_start: Scalar = 1e-4, beta_end: Scalar = 0.02) -> Schedule:
    """DDPM's "quad" schedule: sqrt(beta) grows linearly, beta from beta_start to beta_end.

    Raises:
        ConfigError: T < 1 or a beta outside (0, 1].
    """
    grid = _grid(num_timesteps)
    require_betas(beta_start=beta_start, beta_end=beta_end)
    xp = array_module(beta_start, beta_end)
    return from_betas(_between(xp.sqrt(beta_start), xp.sqrt(beta_end), grid) ** 2)


def scaled_linear(
    num_timesteps: int, beta_start: Scalar = 0.00085, beta_end: Scalar = 0.012
) -> Schedule:
    """Stable Diffusion's schedule: ``quadratic`` with other defaults, and the same errors."""
    return quadratic(num_timesteps, beta_start, beta_end)


def cosine(
    num_timesteps: int, s: Scalar = 0.008, max_beta: Scalar = 0.999, min_beta: Scalar = 0.0
) -> Schedule:
    """The cosine schedule of iDDPM: alpha_bar_t = f(t)/f(0), f(t) = cos^2((t/T + s)/(1 + s) pi/2).

    beta_t is clipped to [min_beta, max_beta]; iDDPM clips to at most 0.999. The offset s keeps
    sqrt(beta_1) close to the width of a pixel's bin.

    Raises:
        ConfigError: T < 1, s outside [0, 1e100], max_beta outside (0, 1] or min_beta outside
            [0, max_beta].
    """
    require_length("num_timesteps", num_timesteps)
    if is_known(s):
        # for much larger s the squares of the sines below are 0 in float64
        require(0 <= s <= 1e100, "s", s, "in [0, 1e100]")
    xp = array_module(s)
    t = np.arange(num_timesteps + 1.0)
    # theta is the argument of the cosine; phi = pi/2 - theta, computed without the subtraction
    d = np.pi / (2 * num_timesteps * (1 + s))
    theta, phi = (t + num_timesteps * s) * d, (num_timesteps - t) * d
    cos = xp.where(theta < phi, xp.cos(theta), xp.sin(phi))
    # cos^2 a - cos^2 b = sin(b + a) sin(b - a), and sin(b + a) = sin(pi - (b + a))
    sum_prev = xp.minimum(theta[1:] + theta[:-1], phi[1:] + phi[:-1])
    sum_start = xp.minimum(theta[1:] + theta[0], phi[1:] + phi[0])
    return from_alpha_bars(
        beta=xp.sin(sum_prev) * xp.sin(d) / cos[:-1] ** 2,
        alpha=(cos[1:] / cos[:-1]) ** 2,
        alpha_bar=(cos[1:] / cos[0]) ** 2,
        one_minus_alpha_bar=xp.sin(sum_start) * xp.sin(t[1:] * d) / cos[0] ** 2,
        max_beta=max_beta,
        min_beta=min_beta,
    )


def sigmoid(
    num_timesteps: int,
    start: Scalar = -3.0,
    end: Scalar = 3.0,
    tau: Scalar = 1.0,
    *,
    max_beta: Scalar = 0.999,
    min_beta: Scalar = 0.0,
) -> Schedule:
    """The sigmoid schedule of Jabri et al. 2023 (arXiv 2212.11972), in alpha_bar.

    alpha_bar_t = (S(u_T) - S(u_t)) / (S(u_T) - S(u_0)), u_t = (start + (end - start) t/T) / tau,
    S the logistic function; beta_t is clipped to [min_beta, max_beta].

    Raises:
        ConfigError: T < 1, tau <= 0, end <= start, |start| or |end| > 50 tau (too much for
            float32), max_beta outside (0, 1], or min_beta outside [0, max_beta].
    """
    require_length("num_timesteps", num_timesteps)
    if is_known(start, end, tau):
        require(0 < tau < math.inf, "tau", tau, "a finite number > 0")
        allowed = f"at most 50 tau = {at_most(50 * tau)} in size"
        require(-50 * tau <= start <= 50 * tau, "start", start, allowed)
        allowed = f"in (start, 50 tau] = ({start}, {at_most(50 * tau)}]"
        require(start < end <= 50 * tau, "end", end, allowed)
    xp = array_module(start, end, tau)
    t = np.arange(num_timesteps + 1.0)
    # S(2a) - S(2b) = sinh(a - b) / (2 cosh a cosh b), where u_t - u_{t-1} = 2 h
    h = (end - start) / (2 * num_timesteps * tau)
    cosh = xp.cosh(start / (2 * tau) + t * h)
    sinh_left, sinh_gone = xp.sinh((num_timesteps - t) * h), xp.sinh(t * h)
    signal = sinh_left / cosh
    return from_alpha_bars(
        beta=xp.sinh(h) * cosh[-1] / (cosh[1:] * sinh_left[:-1]),
        alpha=signal[1:] / signal[:-1],
        alpha_bar=signal[1:] / signal[0],
        one_minus_alpha_bar=sinh_gone[1:] * cosh[-1] / (sinh_left[0] * cosh[1:]),
        max_beta=max_beta,
        min_beta=min_beta,
    )


def sigmoid_beta(
    num_timesteps: int, beta_start: Scalar = 1e-4, beta_end: Scalar = 0.02
) -> Schedule:
    """The "sigmoid" schedule of diffusers: beta follows the logistic function over [-6, 6].

    Raises:
        ConfigError: T < 1 or a beta outside (0, 1].
    """
    weight = 1 / (1 + np.exp(6 - 12 * _grid(num_timesteps)))
    return from_betas(_between(beta_start, beta_end, weight))


def constant(num_timesteps: int, beta_end: Scalar = 0.02) -> Schedule:
    """DDPM's "const" schedule: beta is beta_end at every timestep.

    Raises:
        ConfigError: T < 1 or beta_end outside (0, 1].
    """
    require_length("num_timesteps", num_timesteps)
    require_betas(beta_end=beta_end)
    return from_betas(beta_end * np.ones(num_timesteps))


def jsd(num_timesteps: int) -> Schedule:
    """DDPM's "jsd" schedule: beta_t = 1/(T - t + 1), so that alpha_bar_t = 1 - t/T ends at 0.

    Raises:
        ConfigError: T < 1.
    """
    require_length("num_timesteps", num_timesteps)
    return from_betas(1 / np.arange(num_timesteps, 0.0, -1.0))


def _warmup(num_timesteps: int, share: int, beta_start: Scalar, beta_end: Scalar) -> Schedule:
    require_length("num_timesteps", num_timesteps)
    weight = np.ones(num_timesteps)
    length = num_timesteps // share
    weight[:length] = np.linspace(0, 1, length)
    return from_betas(_between(beta_start, beta_end, weight))


def warmup10(num_timesteps: int, beta_start: Scalar = 1e-4, beta_end: Scalar = 0.02) -> Schedule:
    """DDPM's "warmup10" schedule: linear over the first tenth, then constant.

    Raises:
        ConfigError: T < 1 or a beta outside (0, 1].
    """
    return _warmup(num_timesteps, 10, beta_start, beta_end)


def warmup50(num_timesteps: int, beta_start: Scalar = 1e-4, beta_end: Scalar = 0.02) -> Schedule:
    """DDPM's "warmup50" schedule: linear over the first half, then constant.

    Raises:
        ConfigError: T < 1 or a beta outside (0, 1].
    """
    return _warmup(num_timesteps, 2, beta_start, beta_end)


def from_betas(betas: Float[Array, "..."] | np.ndarray | Sequence[float]) -> Schedule:
    """The schedule with the given beta_1 .. beta_T (in a config: the path of a .npy file).

    Raises:
        ConfigError: an array that is empty or not one-dimensional, or a beta outside (0, 1].
    """
    beta = betas if isinstance(betas, jax.Array) else np.asarray(betas, np.float64)
    require(beta.ndim == 1 and beta.size > 0, "betas", beta, "a vector of betas")
    if is_known(beta):
        worst = np.argmin((np.asarray(beta, np.float32) > 0) & (beta <= 1))  # first out of range
        require_betas(**{f"betas[{worst}]": beta[worst]})
    alpha = 1 - beta
    alpha_bar, one_minus_alpha_bar = running_product(log_one_minus(beta, alpha))
    return from_columns(
        beta=beta, alpha=alpha, alpha_bar=alpha_bar, one_minus_alpha_bar=one_minus_alpha_bar
    )


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "linear": linear,
    "scaled_linear": scaled_linear,
    "quadratic": quadratic,
    "cosine": cosine,
    "sigmoid": sigmoid,
    "sigmoid_beta": sigmoid_beta,
    "constant": constant,
    "jsd": jsd,
    "warmup10": warmup10,
    "warmup50": warmup50,
    "from_betas": from_betas,
}
