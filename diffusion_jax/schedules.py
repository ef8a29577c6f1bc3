"""Noise schedules of a diffusion chain x_1 .. x_T, and what turns one into another.

Called with plain numbers a schedule is computed in float64 on the host and rounded once to
float32. Called with jax values (under jit, vmap or grad) the same formula runs in jax, and holds
1e-6 (identities) or 1e-5 (running products), because nearly equal numbers are never subtracted.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from diffusion_jax.spacings import GRIDS, SPACINGS

Scalar = float | int | Float[Array, ""]
Column = Float[Array, "*rows"] | Float[np.ndarray, "*rows"]


@no_type_check  # jax also builds it with shapes, specs and placeholders as leaves
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Schedule:
    """The chain q(x_t|x_{t-1}) = N(sqrt(alpha_t) x_{t-1}, beta_t I), one row per transition.

    Row i is t = i + 1 and ``len(schedule)`` is T; ``schedule[i]`` is a row with scalar columns,
    ``schedule[a:b]`` a shorter schedule. Being a pytree it is an argument of compiled functions:
    another schedule of the same length does not compile them again.
    """

    timestep: Float[Array, "*rows"]  # what the network is told: 1..T on the native grid
    beta: Float[Array, "*rows"]
    alpha: Float[Array, "*rows"]  # 1 - beta
    alpha_bar: Float[Array, "*rows"]  # product of alpha_1 .. alpha_t
    alpha_bar_prev: Float[Array, "*rows"]  # of the row before; 1 in the first
    one_minus_alpha_bar: Float[Array, "*rows"]  # variance of q(x_t|x_0)
    one_minus_alpha_bar_prev: Float[Array, "*rows"]
    posterior_variance: Float[Array, "*rows"]  # beta tilde, the variance of q(x_{t-1}|x_t,x_0)

    def __getitem__(self, index: int | slice | Array | np.ndarray) -> "Schedule":
        # jax clamps an index out of range: `for row in schedule` would never end.
        if isinstance(index, int) and not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of a schedule of {len(self)} rows")
        return jax.tree.map(lambda column: column[index], self)

    def __len__(self) -> int:
        return self.beta.shape[0]

    @property
    def snr(self) -> Float[Array, "*rows"]:
        """Signal-to-noise ratio alpha_bar / (1 - alpha_bar)."""
        return self.alpha_bar / self.one_minus_alpha_bar

    @property
    def log_snr(self) -> Float[Array, "*rows"]:
        """Natural logarithm of the SNR: -inf at zero terminal SNR, inf at t = 0."""
        return jnp.log(self.alpha_bar) - jnp.log(self.one_minus_alpha_bar)

    @property
    def sigma(self) -> Float[Array, "*rows"]:
        """Noise level sqrt((1 - alpha_bar) / alpha_bar) of EDM and k-diffusion."""
        return jnp.sqrt(self.one_minus_alpha_bar / self.alpha_bar)

    @property
    def posterior_log_variance_clipped(self) -> Float[Array, "*rows"]:
        """Log of beta tilde, its 0 at t = 1 replaced by the value of t = 2 (by beta if T = 1).

        Raises ValueError: for a row, which cannot see the next: index the whole schedule's
        property.
        """
        if self.beta.ndim == 0:
            raise ValueError("posterior_log_variance_clipped: needs a schedule, not a row")
        return jnp.log(clip_posterior_variance(self).posterior_variance)


def terminal_row() -> Schedule:
    """The row t = 0: alpha_bar = 1 and no noise."""
    zero, one = jnp.zeros(()), jnp.ones(())
    return Schedule(zero, zero, one, one, one, zero, zero, zero)


def clip_posterior_variance(schedule: Schedule) -> Schedule:
    """Replace beta tilde's 0 at t = 1 by its value at t = 2 (by beta if T = 1), as iDDPM does.

    L_0 needs a density; everything else never looks at beta tilde of t = 1.
    """
    variance = schedule.posterior_variance
    following = jnp.concatenate([variance[..., 1:], schedule.beta[..., -1:]], axis=-1)
    following = jnp.where(following > 0, following, schedule.beta)  # T = 1, padded
    clipped = jnp.where(variance > 0, variance, following)
    return dataclasses.replace(schedule, posterior_variance=clipped)


def with_terminal_row(schedule: Schedule) -> Schedule:
    """The rows of t = 0, 1 .. T: row i of the schedule is row i + 1, the one before it row i."""
    return jax.tree.map(
        lambda first, column: jnp.concatenate([first[None].astype(column.dtype), column]),
        terminal_row(),
        schedule,
    )


def pad(schedule: Schedule, length: int) -> Schedule:
    """A schedule with ``length`` rows, of which those past T are copies of row T.

    Schedules of several T so have one shape, and one compiled function serves them: the mask of
    the rows that count is row < ``num_timesteps``.

    Raises:
        ValueError: the schedule is longer already.
    """
    _check_length("length", length)
    _check(
        "length", length, length >= len(schedule), f"at least the {len(schedule)} rows there are"
    )
    more = length - len(schedule)
    return jax.tree.map(lambda column: np.pad(column, (0, more), mode="edge"), schedule)


def num_timesteps(schedule: Schedule) -> Int[Array, ""]:
    """T of a schedule on its native grid, padded or not: what its last row is told."""
    return jnp.asarray(schedule.timestep[-1], jnp.int32)


def _array_module(*values: object) -> ModuleType:
    return jnp if any(isinstance(value, jax.Array) for value in values) else np


def _known(*values: object) -> bool:
    """Whether the values can be checked: traced ones (of jit, vmap, grad) have no number yet."""
    return not any(isinstance(value, jax.core.Tracer) for value in values)


def _check(field: str, value: object, holds: object, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{field} = {value}: must be {allowed}")


def _check_length(field: str, value: object, longest: int | None = None) -> None:
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    allowed = f"a whole number {'>= 1' if longest is None else f'in 1..{longest}'}"
    _check(field, value, whole and 1 <= value <= (longest or value), allowed)


def _check_betas(**betas: Scalar) -> None:
    for field, beta in betas.items():
        if _known(beta):  # what rounds to 0 in float32 is 0
            _check(field, beta, np.float32(beta) > 0 and beta <= 1, "in (0, 1]")


def _log_alpha(beta: Column, alpha: Column) -> Column:
    """log(alpha) from the one of beta and alpha that holds it to full relative precision."""
    xp = _array_module(beta)
    with np.errstate(divide="ignore"):  # beta = 1: -inf, hence alpha_bar = 0
        return xp.where(beta < 0.5, xp.log1p(-beta), xp.log(alpha))


def _running_product(log_alpha: Column) -> tuple[Column, Column]:
    """The products alpha_1 ... alpha_t, and 1 minus them."""
    xp = _array_module(log_alpha)
    # A float32 sum near -80 rounds by 4e-6 at every term. Multiples of 2^-16 add up exactly (to
    # 256; e^-88 is the least of float32), and what they leave of each term is too small to matter.
    coarse = xp.trunc(xp.maximum(log_alpha, -100) * 2**16) / 2**16
    fine = xp.cumsum(log_alpha - coarse)
    coarse = xp.cumsum(coarse)
    return xp.exp(coarse) * xp.exp(fine), -xp.expm1(coarse + fine)


def _schedule(
    beta: Column,
    alpha: Column,
    alpha_bar: Column,
    one_minus_alpha_bar: Column,
    timestep: Column | None = None,
) -> Schedule:
    """Add the columns that look at the row before; round once to float32 on the host."""
    xp = _array_module(beta)
    alpha_bar_prev = xp.concatenate([xp.ones(1), alpha_bar[:-1]])
    one_minus_alpha_bar_prev = xp.concatenate([xp.zeros(1), one_minus_alpha_bar[:-1]])
    posterior_variance = beta * (one_minus_alpha_bar_prev / one_minus_alpha_bar)  # DDPM eq. 7
    columns = (
        np.arange(1, len(beta) + 1) if timestep is None else timestep,
        *(beta, alpha, alpha_bar, alpha_bar_prev),
        *(one_minus_alpha_bar, one_minus_alpha_bar_prev, posterior_variance),
    )
    dtype = jnp.float32 if xp is np else beta.dtype
    return Schedule(*(jnp.asarray(column, dtype) for column in columns))


def _from_alpha_bars(
    beta: Column,
    alpha: Column,
    alpha_bar: Column,
    one_minus_alpha_bar: Column,
    max_beta: Scalar,
    min_beta: Scalar,
) -> Schedule:
    """Clip beta: alpha_bar is the exact one up to the first clipped row, a product from there."""
    _check_betas(max_beta=max_beta)
    if _known(max_beta, min_beta):
        _check("min_beta", min_beta, 0 <= min_beta <= max_beta, f"in [0, max_beta = {max_beta}]")
    xp = _array_module(beta, max_beta, min_beta)
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
    tail, one_minus_tail = _running_product(xp.where(exact, 0.0, _log_alpha(beta, alpha)))
    return _schedule(beta, alpha, base * tail, one_minus_base * tail + one_minus_tail)


def _grid(num_timesteps: int) -> np.ndarray:
    """(t - 1)/(T - 1): 0 at the first timestep, 1 at the last (0 if T = 1)."""
    _check_length("num_timesteps", num_timesteps)
    return np.linspace(0, 1, num_timesteps)


def _between(beta_start: Scalar, beta_end: Scalar, weight: np.ndarray) -> Column:
    _check_betas(beta_start=beta_start, beta_end=beta_end)
    return beta_start * (1 - weight) + beta_end * weight


def linear(
    num_timesteps: int, beta_start: Scalar = 1e-4, beta_end: Scalar = 0.02, rescale: bool = False
) -> Schedule:
    """DDPM's schedule: beta grows linearly from beta_start to beta_end.

    ``rescale`` multiplies both by 1000/T (iDDPM), so that alpha_bar_T hardly depends on T.

    Raises ValueError: T < 1, a beta outside (0, 1], or one that rescaling takes beyond 1.
    """
    grid = _grid(num_timesteps)
    _check_betas(beta_start=beta_start, beta_end=beta_end)
    if rescale:
        for beta in filter(_known, (beta_start, beta_end)):
            smallest = math.ceil(1000 * beta)
            allowed = f">= {smallest}, as rescale multiplies beta = {beta} by 1000/num_timesteps"
            _check("num_timesteps", num_timesteps, num_timesteps >= smallest, allowed)
        beta_start, beta_end = (beta * 1000 / num_timesteps for beta in (beta_start, beta_end))
    return from_betas(_between(beta_start, beta_end, grid))


def quadratic(num_timesteps: int, beta_start: Scalar = 1e-4, beta_end: Scalar = 0.02) -> Schedule:
    """DDPM's "quad" schedule: sqrt(beta) grows linearly from the start's to the end's.

    Raises ValueError: T < 1 or a beta outside (0, 1].
    """
    grid = _grid(num_timesteps)
    _check_betas(beta_start=beta_start, beta_end=beta_end)
    xp = _array_module(beta_start, beta_end)
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
    _check_length("num_timesteps", num_timesteps)
    if _known(s):
        _check("s", s, 0 <= s < math.inf, "a finite number >= 0")
    xp = _array_module(s)
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
    max_beta: Scalar = 0.999,
    min_beta: Scalar = 0.0,
) -> Schedule:
    """The sigmoid schedule of Jabri et al. 2023 (arXiv 2212.11972), in alpha_bar.

    alpha_bar_t = (S(u_T) - S(u_t)) / (S(u_T) - S(u_0)), u_t = (start + (end - start) t/T) / tau,
    S the logistic function; beta_t is clipped to [min_beta, max_beta].

    Raises ValueError: T < 1, tau <= 0, end <= start, |start| or |end| > 50 tau (too much for
    float32), max_beta outside (0, 1], or min_beta outside [0, max_beta].
    """
    _check_length("num_timesteps", num_timesteps)
    if _known(start, end, tau):
        _check("tau", tau, 0 < tau < math.inf, "a finite number > 0")
        _check("start", start, abs(start) <= 50 * tau, f"at most 50 tau = {50 * tau} in size")
        _check("end", end, start < end <= 50 * tau, f"in (start, 50 tau] = ({start}, {50 * tau}]")
    xp = _array_module(start, end, tau)
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
    _check_length("num_timesteps", num_timesteps)
    _check_betas(beta_end=beta_end)
    return from_betas(beta_end * np.ones(num_timesteps))


def jsd(num_timesteps: int) -> Schedule:
    """DDPM's "jsd" schedule: beta_t = 1/(T - t + 1), so that alpha_bar_t = 1 - t/T ends at 0.

    Raises ValueError: T < 1.
    """
    _check_length("num_timesteps", num_timesteps)
    return from_betas(1 / np.arange(num_timesteps, 0.0, -1.0))


def _warmup(num_timesteps: int, share: int, beta_start: Scalar, beta_end: Scalar) -> Schedule:
    _check_length("num_timesteps", num_timesteps)
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
    shape = f"array of shape {beta.shape}"
    _check("betas", shape, beta.ndim == 1 and beta.size > 0, "a vector of betas")
    if _known(beta):
        worst = np.argmin((np.asarray(beta, np.float32) > 0) & (beta <= 1))  # a False, if any
        _check_betas(**{f"betas[{worst}]": beta[worst]})
    alpha = 1 - beta
    return _schedule(beta, alpha, *_running_product(_log_alpha(beta, alpha)))


def from_log_snr(log_snr: Column, timestep: Column) -> Schedule:
    """The chain through rows of decreasing log SNR, which are told to a network as ``timestep``.

    alpha_bar = sigmoid(log SNR), beta_t = -(1 - alpha_bar_t) expm1(log SNR_t - log SNR_{t-1})
    (Kingma et al. 2021, VDM).
    """
    xp = _array_module(log_snr)
    alpha_bar, one_minus_alpha_bar = 1 / (1 + xp.exp(-log_snr)), 1 / (1 + xp.exp(log_snr))
    # alpha_t = alpha_bar_t / alpha_bar_{t-1}, where the row before the first has alpha_bar = 1
    drop = log_snr[1:] - log_snr[:-1]
    beta = xp.concatenate([one_minus_alpha_bar[:1], -one_minus_alpha_bar[1:] * xp.expm1(drop)])
    alpha = xp.concatenate([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
    return _schedule(beta, alpha, alpha_bar, one_minus_alpha_bar, timestep)


def at_log_snr(schedule: Schedule, log_snr: Column) -> Schedule:
    """The chain through off-grid rows, of decreasing log SNR within the range of ``schedule``.

    What the network is told is interpolated, linearly in log SNR, between the rows around.

    Raises ValueError: a log SNR that is outside of the range, or not below the one before.
    """
    old = _columns(schedule)
    xp = _array_module(old.beta, log_snr)
    known = xp.log(old.alpha_bar) - xp.log(old.one_minus_alpha_bar)
    if _known(known, log_snr):
        slack = 1e-6 * np.abs(known)  # columns are rounded to float32
        first, last = known[0] + slack[0], known[-1] - slack[-1]
        inside = np.all((log_snr <= first) & (log_snr >= last)) and np.all(np.diff(log_snr) < 0)
        _check("log_snr", log_snr, inside, f"decreasing, in [{known[-1]:.6g}, {known[0]:.6g}]")
    return from_log_snr(log_snr, _interpolate(-log_snr, -known, old.timestep))


def _interpolate(
    x: Float[Array, " n"] | Float[np.ndarray, " n"],
    known_x: Float[Array, " m"] | Float[np.ndarray, " m"],
    known_y: Float[Array, " m"] | Float[np.ndarray, " m"],
) -> Float[Array, " n"] | Float[np.ndarray, " n"]:
    """Linear interpolation, held at its ends; in jax without the loop of jnp.interp."""
    if _array_module(x, known_x) is np:
        return np.interp(x, known_x, known_y)
    if len(known_x) == 1:
        return jnp.broadcast_to(known_y, x.shape)
    known_x, known_y = jnp.asarray(known_x), jnp.asarray(known_y)
    after = jnp.searchsorted(known_x, x, side="right", method="compare_all")
    after = jnp.clip(after, 1, len(known_x) - 1)
    low, high = known_x[after - 1], known_x[after]
    share = jnp.clip((x - low) / (high - low), 0, 1)
    return known_y[after - 1] + share * (known_y[after] - known_y[after - 1])


def _columns(schedule: Schedule) -> Schedule:
    """The same schedule in float64 on the host, or as it is where it is traced."""
    if not _known(*jax.tree.leaves(schedule)):
        return schedule
    return jax.tree.map(lambda column: np.asarray(column, np.float64), schedule)


def zero_terminal_snr(schedule: Schedule) -> Schedule:
    """Lin et al. 2023 (arXiv 2305.08891): sqrt(alpha_bar) shifted and scaled so as to end at 0.

    alpha_bar_1 stays, beta_T becomes 1. x_T then holds nothing of x_0: a network that predicts
    eps or the score cannot tell x_0 there.

    Raises ValueError: a schedule of one row.
    """
    _check("num_timesteps", len(schedule), len(schedule) > 1, ">= 2 for zero terminal SNR")
    old = _columns(schedule)
    xp = _array_module(old.beta)
    zero, root = xp.zeros(1), xp.sqrt(old.alpha_bar)
    # sqrt(alpha_bar) loses `lost` over the transition t >= 2 and has `left` to lose after t.
    lost = (xp.sqrt(old.alpha_bar_prev) * old.beta / (1 + xp.sqrt(old.alpha)))[1:]
    left = xp.concatenate([xp.cumsum(lost[::-1])[::-1], zero])
    scale = root[0] / left[0]
    ratio = left[1:] / left[:-1]
    one_minus_root_1 = old.one_minus_alpha_bar[:1] / (1 + root[:1])
    one_minus_root = one_minus_root_1 + scale * xp.concatenate([zero, xp.cumsum(lost)])
    return _schedule(
        beta=xp.concatenate([old.beta[:1], lost / left[:-1] * (1 + ratio)]),
        alpha=xp.concatenate([old.alpha[:1], ratio**2]),
        alpha_bar=(scale * left) ** 2,
        one_minus_alpha_bar=one_minus_root * (1 + scale * left),
        timestep=old.timestep,
    )


def shift_log_snr(schedule: Schedule, resolution: Scalar, base_resolution: Scalar) -> Schedule:
    """Hoogeboom et al. 2023 (arXiv 2301.11093): log SNR + 2 log(base_resolution / resolution).

    Averaging over pixels undoes noise, and large images have more of them: shifted, they are
    destroyed as much as the schedule does at the base resolution (both in pixels).

    Raises ValueError: a resolution that is not positive.
    """
    for field, pixels in {"resolution": resolution, "base_resolution": base_resolution}.items():
        if _known(pixels):
            _check(field, pixels, 0 < pixels < math.inf, "a finite number > 0")
    old = _columns(schedule)
    c = (base_resolution / resolution) ** 2
    # The new alpha_bar and 1 - alpha_bar are as c alpha_bar to 1 - alpha_bar.
    total = c * old.alpha_bar + old.one_minus_alpha_bar
    total_prev = c * old.alpha_bar_prev + old.one_minus_alpha_bar_prev
    return _schedule(
        beta=old.beta / total,
        alpha=old.alpha * total_prev / total,
        alpha_bar=c * old.alpha_bar / total,
        one_minus_alpha_bar=old.one_minus_alpha_bar / total,
        timestep=old.timestep,
    )


def respace(
    schedule: Schedule,
    num_steps: int,
    spacing: str = "trailing",
    rho: Scalar = 7.0,
    sigma_min: Scalar | None = None,
    sigma_max: Scalar | None = None,
) -> Schedule:
    """The chain over ``num_steps`` of the timesteps, its betas those of the whole jumps (iDDPM).

    The rows that stay, which spacings.SPACINGS choose, keep their timestep and alpha_bar. Those of
    spacings.GRIDS stand between them, so that num_steps may exceed T: from ``sigma_min`` to
    ``sigma_max`` (None: the schedule's own), "karras" with its ``rho`` > 0.

    Raises ValueError: num_steps outside 1..T, an unknown spacing, a grid that is not within the
    schedule or where its SNR is 0.
    """
    if spacing in GRIDS:
        return _respace_off_grid(schedule, num_steps, spacing, rho, sigma_min, sigma_max)
    _check_length("num_steps", num_steps, longest=len(schedule))
    options = ", ".join([*SPACINGS, *GRIDS])
    _check("spacing", repr(spacing), spacing in SPACINGS, f"one of {options}")
    rows = SPACINGS[spacing](len(schedule), num_steps) - 1
    old = _columns(schedule)
    xp = _array_module(old.beta)
    # One sum per jump, beginning after the row kept before it
    log_alpha = _log_alpha(old.beta, old.alpha)[: rows[-1] + 1]
    log_jump = xp.add.reduceat(log_alpha, np.append(0, rows[:-1] + 1))
    kept = jax.tree.map(lambda column: column[rows], old)
    return _schedule(
        # the first jump is from t = 0: the same numbers, to the last digit
        beta=xp.concatenate([kept.one_minus_alpha_bar[:1], -xp.expm1(log_jump[1:])]),
        alpha=xp.concatenate([kept.alpha_bar[:1], xp.exp(log_jump[1:])]),
        alpha_bar=kept.alpha_bar,
        one_minus_alpha_bar=kept.one_minus_alpha_bar,
        timestep=kept.timestep,
    )


def _respace_off_grid(
    schedule: Schedule,
    num_steps: int,
    spacing: str,
    rho: Scalar,
    sigma_min: Scalar | None,
    sigma_max: Scalar | None,
) -> Schedule:
    _check_length("num_steps", num_steps)
    old = _columns(schedule)
    xp = _array_module(old.beta)
    with np.errstate(divide="ignore"):  # log(0) is checked below
        known = xp.log(old.alpha_bar[xp.array([0, -1])]) - xp.log(
            old.one_minus_alpha_bar[xp.array([0, -1])]
        )
    if _known(known):
        allowed = f"one of {', '.join(SPACINGS)}: the schedule ends at zero SNR"
        _check("spacing", repr(spacing), np.isfinite(known[1]), allowed)
    ends = list(known)
    for place, (field, sigma) in enumerate(
        {"sigma_min": sigma_min, "sigma_max": sigma_max}.items()
    ):
        if sigma is None:
            continue
        if _known(sigma, known):
            least, most = np.exp(-known / 2)
            allowed = f"a noise level of the schedule, in [{least:.6g}, {most:.6g}]"
            _check(field, sigma, least <= sigma <= most, allowed)
        ends[place] = -2 * xp.log(sigma)
    if _known(rho):
        _check("rho", rho, 0 < rho < math.inf, "a finite number > 0")
    if _known(*ends) and num_steps > 1:
        allowed = "above sigma_min (as many steps need noise levels between them)"
        _check("sigma_max", f"{np.exp(-ends[1] / 2):.6g}", ends[1] < ends[0], allowed)
    return at_log_snr(schedule, GRIDS[spacing](num_steps, *ends, rho))


def config_fields() -> dict[str, type]:
    """Every argument of the schedules but num_timesteps, with its type in a config."""
    kinds = {Scalar: float, bool: bool}
    return {
        name: kinds.get(parameter.annotation, str)  # an array is the path of its file
        for schedule in SCHEDULES.values()
        for name, parameter in inspect.signature(schedule).parameters.items()
        if name != "num_timesteps"
    }


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
