"""Noise schedules of a diffusion chain x_1 .. x_T, and what turns one into another.

Called with plain numbers a schedule is computed in float64 on the host and rounded once to
float32. Called with jax values (under jit, vmap or grad) the same formula runs in jax, and holds
1e-6 (identities) or 1e-5 (running products), because nearly equal numbers are never subtracted.
"""

import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Array, Float

from diffusion_jax.diffusion.schedules.schedule import (
    Column,
    Scalar,
    Schedule,
    array_module,
    from_columns,
    log_alphas,
    require_betas,
    require_length,
    running_product,
)
from diffusion_jax.diffusion.tracing import is_known
from diffusion_jax.errors import require


def _from_alpha_bars(
    *,
    beta: Column,
    alpha: Column,
    alpha_bar: Column,
    one_minus_alpha_bar: Column,
    max_beta: Scalar,
    min_beta: Scalar,
) -> Schedule:
    """Clip beta: alpha_bar is the exact one up to the first clipped row, a product from there."""
    require_betas(max_beta=max_beta)
    if is_known(max_beta, min_beta):
        require(0 <= min_beta <= max_beta, "min_beta", min_beta, f"in [0, max_beta = {max_beta}]")
    xp = array_module(beta, max_beta, min_beta)
    high, low = beta > max_beta, beta < min_beta
    beta = xp.where(high, max_beta, xp.where(low, min_beta, beta))
    # 1 - float32(0.999) is off by 1.3e-5: plain bounds are subtracted here, in float64.
    alpha = xp.where(high, 1 - max_beta, xp.where(low, 1 - min_beta, alpha))
    # Of two that add up to 1 the smaller one knows the larger best, and keeps it below 1.
    alpha = xp.where(beta < 0.5, 1 - beta, alpha)
    alpha_bar, one_minus_alpha_bar = (
        xp.where(one_minus_alpha_bar < 0.5, 1 - one_minus_alpha_bar, alpha_bar),
        xp.where(alpha_bar < 0.5, 1 - alpha_bar, one_minus_alpha_bar),
    )
    exact = xp.cumsum(high | low) == 0
    last_exact = xp.minimum(np.arange(1, len(beta) + 1), xp.sum(exact))  # 0: the row t = 0
    base = xp.concatenate([xp.ones(1), alpha_bar])[last_exact]
    one_minus_base = xp.concatenate([xp.zeros(1), one_minus_alpha_bar])[last_exact]
    tail, one_minus_tail = running_product(xp.where(exact, 0.0, log_alphas(beta, alpha)))
    return from_columns(
        beta=beta,
        alpha=alpha,
        alpha_bar=base * tail,
        one_minus_alpha_bar=one_minus_base * tail + one_minus_tail,
    )


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
    """DDPM's schedule: beta grows linearly from beta_start to beta_end.

    ``rescale`` multiplies both by 1000/T (iDDPM), so that alpha_bar_T hardly depends on T.

    Raises ValueError: T < 1, a beta outside (0, 1], or one that rescaling takes beyond 1.
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
    """DDPM's "quad" schedule: sqrt(beta) grows linearly from the start's to the end's.

    Raises ValueError: T < 1 or a beta outside (0, 1].
    """
    grid = _grid(num_timesteps)
    require_betas(beta_start=beta_start, beta_end=beta_end)
    xp = array_module(beta_start, beta_end)
    return from_betas(_between(xp.sqrt(beta_start), xp.sqrt(beta_end), grid) ** 2)


def scaled_linear(
    num_timesteps: int, beta_start: Scalar = 0.00085, beta_end: Scalar = 0.012
) -> Schedule:
    """Stable Diffusion's schedule: the quadratic one with betas of its own. Raises alike."""
    return quadratic(num_timesteps, beta_start, beta_end)


def cosine(
    num_timesteps: int, s: Scalar = 0.008, max_beta: Scalar = 0.999, min_beta: Scalar = 0.0
) -> Schedule:
    """The cosine schedule of iDDPM: alpha_bar_t = f(t)/f(0), f(t) = cos^2((t/T + s)/(1 + s) pi/2).

    beta_t is clipped to [min_beta, max_beta] (iDDPM: 0.999 above, nothing below). The offset s
    keeps sqrt(beta_1) close to the width of a pixel's bin.

    Raises ValueError: T < 1, s < 0, max_beta outside (0, 1] or min_beta outside [0, max_beta].
    """
    require_length("num_timesteps", num_timesteps)
    if is_known(s):
        require(0 <= s < math.inf, "s", s, "a finite number >= 0")
    xp = array_module(s)
    t = np.arange(num_timesteps + 1.0)
    # The cosine's argument theta, and phi = pi/2 - theta without the subtraction
    d = np.pi / (2 * num_timesteps * (1 + s))
    theta, phi = (t + num_timesteps * s) * d, (num_timesteps - t) * d
    cos = xp.where(theta < phi, xp.cos(theta), xp.sin(phi))
    # cos^2 a - cos^2 b = sin(b + a) sin(b - a), and sin(b + a) = sin(pi - (b + a))
    sum_prev = xp.minimum(theta[1:] + theta[:-1], phi[1:] + phi[:-1])
    sum_start = xp.minimum(theta[1:] + theta[0], phi[1:] + phi[0])
    return _from_alpha_bars(
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

    Raises ValueError: T < 1, tau <= 0, end <= start, |start| or |end| > 50 tau (too much for
    float32), max_beta outside (0, 1], or min_beta outside [0, max_beta].
    """
    require_length("num_timesteps", num_timesteps)
    if is_known(start, end, tau):
        require(0 < tau < math.inf, "tau", tau, "a finite number > 0")
        require(abs(start) <= 50 * tau, "start", start, f"at most 50 tau = {50 * tau} in size")
        require(start < end <= 50 * tau, "end", end, f"in (start, 50 tau] = ({start}, {50 * tau}]")
    xp = array_module(start, end, tau)
    t = np.arange(num_timesteps + 1.0)
    # S(2a) - S(2b) = sinh(a - b) / (2 cosh a cosh b), where u_t - u_{t-1} = 2 h
    h = (end - start) / (2 * num_timesteps * tau)
    cosh = xp.cosh(start / (2 * tau) + t * h)
    sinh_left, sinh_gone = xp.sinh((num_timesteps - t) * h), xp.sinh(t * h)
    signal = sinh_left / cosh
    return _from_alpha_bars(
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

    Raises ValueError: T < 1 or a beta outside (0, 1].
    """
    weight = 1 / (1 + np.exp(6 - 12 * _grid(num_timesteps)))
    return from_betas(_between(beta_start, beta_end, weight))


def constant(num_timesteps: int, beta_end: Scalar = 0.02) -> Schedule:
    """DDPM's "const" schedule: beta_end at every timestep.

    Raises ValueError: T < 1 or beta_end outside (0, 1].
    """
    require_length("num_timesteps", num_timesteps)
    require_betas(beta_end=beta_end)
    return from_betas(beta_end * np.ones(num_timesteps))


def jsd(num_timesteps: int) -> Schedule:
    """DDPM's "jsd" schedule: beta_t = 1/(T - t + 1), so that alpha_bar_t = 1 - t/T ends at 0.

    Raises ValueError: T < 1.
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

    Raises ValueError: T < 1 or a beta outside (0, 1].
    """
    return _warmup(num_timesteps, 10, beta_start, beta_end)


def warmup50(num_timesteps: int, beta_start: Scalar = 1e-4, beta_end: Scalar = 0.02) -> Schedule:
    """DDPM's "warmup50" schedule: linear over the first half, then constant.

    Raises ValueError: T < 1 or a beta outside (0, 1].
    """
    return _warmup(num_timesteps, 2, beta_start, beta_end)


def from_betas(betas: Float[Array, "..."] | np.ndarray | Sequence[float]) -> Schedule:
    """The schedule of one's own beta_1 .. beta_T (in a config, the path of a .npy file).

    Raises ValueError: an array that is empty or not one-dimensional, or a beta outside (0, 1].
    """
    beta = betas if isinstance(betas, jax.Array) else np.asarray(betas, np.float64)
    require(beta.ndim == 1 and beta.size > 0, "betas", beta, "a vector of betas")
    if is_known(beta):
        worst = np.argmin((np.asarray(beta, np.float32) > 0) & (beta <= 1))  # a False, if any
        require_betas(**{f"betas[{worst}]": beta[worst]})
    alpha = 1 - beta
    alpha_bar, one_minus_alpha_bar = running_product(log_alphas(beta, alpha))
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
