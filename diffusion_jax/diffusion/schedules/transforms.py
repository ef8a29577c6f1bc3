"""Transforms of schedules: respacing, rows between timesteps, log SNR shift, zero terminal SNR."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffusion_jax.diffusion.schedules.columns import array_module, from_columns, log_one_minus
from diffusion_jax.diffusion.schedules.schedule import Column, Scalar, Schedule, require_length
from diffusion_jax.diffusion.schedules.spacings import GRIDS, SPACINGS, LogSnrs
from diffusion_jax.diffusion.tracing import is_known
from diffusion_jax.diffusion.trees import map_leaves
from diffusion_jax.errors import at_least, at_most, bounds, choose, require


def from_log_snr(log_snr: Column, timestep: Column, drops: LogSnrs | None = None) -> Schedule:
    """The schedule with these decreasing log SNRs; ``timestep`` is the network's input at each row.

    alpha_bar = sigmoid(log SNR), beta_t = -(1 - alpha_bar_t) expm1(log SNR_t - log SNR_{t-1})
    (Kingma et al. 2021, VDM). ``drops`` are log SNR_{t-1} - log SNR_t for t >= 2. Pass them if they
    are known more exactly than the difference of two rounded log SNRs.
    """
    xp = array_module(log_snr)
    alpha_bar, one_minus_alpha_bar = 1 / (1 + xp.exp(-log_snr)), 1 / (1 + xp.exp(log_snr))
    # alpha_t = alpha_bar_t / alpha_bar_{t-1}, with alpha_bar_0 = 1
    drops = log_snr[:-1] - log_snr[1:] if drops is None else drops
    beta = xp.concatenate([one_minus_alpha_bar[:1], -one_minus_alpha_bar[1:] * xp.expm1(-drops)])
    # for small beta, 1 - beta is more exact than the ratio of the alpha_bars
    alpha = xp.where(beta[1:] < 0.5, 1 - beta[1:], alpha_bar[1:] / alpha_bar[:-1])
    alpha = xp.concatenate([alpha_bar[:1], alpha])
    return from_columns(
        beta=beta,
        alpha=alpha,
        alpha_bar=alpha_bar,
        one_minus_alpha_bar=one_minus_alpha_bar,
        timestep=timestep,
    )


def at_log_snr(schedule: Schedule, log_snr: Column) -> Schedule:
    """The schedule with these decreasing log SNRs, which lie in the range of ``schedule``.

    The timestep is interpolated between the rows of ``schedule``, linearly in log SNR.

    Raises:
        ConfigError: a log SNR outside the range, or log SNRs that do not decrease.
    """
    old = _columns(schedule)
    old_log_snr = _log_snr(old)
    if is_known(old_log_snr, log_snr):
        slack = 1e-6 * np.abs(old_log_snr)  # columns are rounded to float32
        first, last = old_log_snr[0] + slack[0], old_log_snr[-1] - slack[-1]
        inside = np.all((log_snr <= first) & (log_snr >= last)) and np.all(np.diff(log_snr) < 0)
        require(
            inside,
            "log_snr",
            log_snr,
            f"decreasing, in {bounds(old_log_snr[-1], old_log_snr[0])}",
        )
    return from_log_snr(log_snr, _interpolate(-log_snr, -old_log_snr, old.timestep))


def _log_snr(old: Schedule) -> Column:
    """Log SNR in the precision of the columns, without a warning at zero SNR (-inf)."""
    xp = array_module(old.beta)
    with np.errstate(divide="ignore"):
        log_snr: Column = xp.log(old.alpha_bar) - xp.log(old.one_minus_alpha_bar)
    return log_snr


def _interpolate(
    x: Float[Array, " n"] | Float[np.ndarray, " n"],
    known_x: Float[Array, " m"] | Float[np.ndarray, " m"],
    known_y: Float[Array, " m"] | Float[np.ndarray, " m"],
) -> Float[Array, " n"] | Float[np.ndarray, " n"]:
    """Linear interpolation, constant beyond its ends; in jax without the loop in jnp.interp."""
    if array_module(x, known_x) is np:
        return np.asarray(np.interp(x, known_x, known_y))
    if len(known_x) == 1:
        return jnp.broadcast_to(known_y, x.shape)
    known_x, known_y = jnp.asarray(known_x), jnp.asarray(known_y)
    after = jnp.searchsorted(known_x, x, side="right", method="compare_all")
    after = jnp.clip(after, 1, len(known_x) - 1)
    low, high = known_x[after - 1], known_x[after]
    share = jnp.clip((x - low) / (high - low), 0, 1)
    return known_y[after - 1] + share * (known_y[after] - known_y[after - 1])


def _columns(schedule: Schedule) -> Schedule:
    """The schedule with float64 columns of numpy, or unchanged if it is traced."""
    if not is_known(*jax.tree.leaves(schedule)):
        return schedule
    return map_leaves(lambda column: np.asarray(column, np.float64), schedule)


def zero_terminal_snr(schedule: Schedule) -> Schedule:
    """Zero terminal SNR: shift and scale sqrt(alpha_bar) to end at 0 (Lin et al. 2023).

    arXiv 2305.08891. alpha_bar_1 stays unchanged and beta_T becomes 1. x_T then contains nothing of
    x_0, so that a prediction of eps or of the score does not determine x_0 at t = T.

    Raises:
        ConfigError: a schedule of one row, or one whose SNR is 0 before its last row.
    """
    require(len(schedule) > 1, "num_timesteps", len(schedule), ">= 2 for zero terminal SNR")
    old = _columns(schedule)
    if is_known(old.alpha_bar):
        allowed = "False: the SNR is zero before the last timestep already"
        require(old.alpha_bar[-2] > 0, "zero_terminal_snr", True, allowed)
    xp = array_module(old.beta)
    zero, root = xp.zeros(1), xp.sqrt(old.alpha_bar)
    # decrease: of sqrt(alpha_bar) from t - 1 to t, for t >= 2; remaining: from t to T
    decrease = (xp.sqrt(old.alpha_bar_prev) * old.beta / (1 + xp.sqrt(old.alpha)))[1:]
    remaining = xp.concatenate([xp.cumsum(decrease[::-1])[::-1], zero])
    scale = root[0] / remaining[0]
    ratio = remaining[1:] / remaining[:-1]
    one_minus_root_1 = old.one_minus_alpha_bar[:1] / (1 + root[:1])
    one_minus_root = one_minus_root_1 + scale * xp.concatenate([zero, xp.cumsum(decrease)])
    return from_columns(
        beta=xp.concatenate([old.beta[:1], decrease / remaining[:-1] * (1 + ratio)]),
        alpha=xp.concatenate([old.alpha[:1], ratio**2]),
        alpha_bar=(scale * remaining) ** 2,
        one_minus_alpha_bar=one_minus_root * (1 + scale * remaining),
        timestep=old.timestep,
    )


def shift_log_snr(schedule: Schedule, resolution: Scalar, base_resolution: Scalar) -> Schedule:
    """Shift log SNR by 2 log(base_resolution / resolution) (Hoogeboom et al. 2023).

    arXiv 2301.11093. Both resolutions are in pixels. Averaging neighbouring pixels removes noise,
    and a larger image has more of them. With the shift, an image that is averaged down to
    ``base_resolution`` has the same SNR at each timestep as an image of that size without it.

    Raises:
        ConfigError: a resolution that is not finite and positive (traced ones are not checked).
    """
    for field, pixels in {"resolution": resolution, "base_resolution": base_resolution}.items():
        if is_known(pixels):
            require(0 < pixels < math.inf, field, pixels, "a finite number > 0")
    old = _columns(schedule)
    c = (base_resolution / resolution) ** 2
    # new alpha_bar : new 1 - alpha_bar = c alpha_bar : 1 - alpha_bar
    total = c * old.alpha_bar + old.one_minus_alpha_bar
    total_prev = c * old.alpha_bar_prev + old.one_minus_alpha_bar_prev
    return from_columns(
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
    *,
    rho: Scalar = 7.0,
    sigma_min: Scalar | None = None,
    sigma_max: Scalar | None = None,
) -> Schedule:
    """A shorter chain over ``num_steps`` of the timesteps, whose betas span the jumps (iDDPM).

    A spacing of ``spacings.SPACINGS`` selects rows, which keep their timestep and alpha_bar. A
    spacing of ``spacings.GRIDS`` makes rows between the timesteps from ``sigma_min`` to
    ``sigma_max`` (None: those of the schedule); num_steps may then exceed T. "karras" depends on
    ``rho`` > 0.

    Raises:
        ConfigError: num_steps < 1, or above T for SPACINGS; an unknown spacing; a single step that
            is at t = 1; a grid beyond the schedule's noise levels, or on a schedule with zero SNR.
    """
    if spacing in GRIDS:
        ends = {"sigma_min": sigma_min, "sigma_max": sigma_max}
        return _respace_off_grid(schedule, num_steps, spacing, rho, ends)
    require_length("num_steps", num_steps, longest=len(schedule))
    choose("spacing", spacing, [*SPACINGS, *GRIDS], "spacing")
    rows = SPACINGS[spacing](len(schedule), num_steps) - 1
    has_noise = num_steps > 1 or rows[-1] > 0 or len(schedule) == 1
    allowed = "trailing for a single step: this one is at t = 1, where hardly anything is noise"
    require(has_noise, "spacing", spacing, allowed)
    old = _columns(schedule)
    xp = array_module(old.beta)
    # one sum per jump, which starts after the previous selected row
    log_alpha = log_one_minus(old.beta, old.alpha)[: rows[-1] + 1]
    log_jump = xp.add.reduceat(log_alpha, np.append(0, rows[:-1] + 1))
    selected = jax.tree.map(lambda column: column[rows], old)
    return from_columns(
        # the first jump starts at t = 0: its beta and alpha are exactly 1 - alpha_bar and alpha_bar
        beta=xp.concatenate([selected.one_minus_alpha_bar[:1], -xp.expm1(log_jump[1:])]),
        alpha=xp.concatenate([selected.alpha_bar[:1], xp.exp(log_jump[1:])]),
        alpha_bar=selected.alpha_bar,
        one_minus_alpha_bar=selected.one_minus_alpha_bar,
        timestep=selected.timestep,
    )


def _respace_off_grid(
    schedule: Schedule,
    num_steps: int,
    spacing: str,
    rho: Scalar,
    sigmas: dict[str, Scalar | None],
) -> Schedule:
    """``respace`` for a spacing of GRIDS; ``sigmas`` maps the two field names to the two ends."""
    require_length("num_steps", num_steps, longest=1 if len(schedule) == 1 else None)
    old = _columns(schedule)
    xp, old_log_snr = array_module(old.beta), _log_snr(old)
    if is_known(old_log_snr):
        allowed = f"one of {', '.join(SPACINGS)}: the schedule ends at zero SNR"
        require(np.isfinite(old_log_snr[-1]), "spacing", spacing, allowed)
    ends = [old_log_snr[0], old_log_snr[-1]]
    for place, (field, sigma) in enumerate(sigmas.items()):
        if sigma is None:
            continue
        if is_known(sigma, old_log_snr):
            least, most = np.exp(-old_log_snr[0] / 2), np.exp(-old_log_snr[-1] / 2)
            allowed = f"a noise level of the schedule, in {bounds(least, most)}"
            require(least <= sigma <= most, field, sigma, allowed)
        ends[place] = -2 * xp.log(sigma)
    if is_known(*ends) and num_steps > 1:
        sigma_min, sigma_max = np.exp(-ends[0] / 2), np.exp(-ends[1] / 2)
        if sigmas["sigma_max"] is None:
            field, allowed = "sigma_min", f"below sigma_max = {at_most(sigma_max)}"
        else:
            field, allowed = "sigma_max", f"above sigma_min = {at_least(sigma_min)}"
        why = "more than one step needs noise levels between them"
        require(ends[1] < ends[0], field, sigmas[field], f"{allowed} ({why})")
    if is_known(rho):
        require(0 < rho < math.inf, "rho", rho, "a finite number > 0")
    if is_known(rho, *ends):
        # bounds: sigma^(1/rho) must fit float64, and rho times its logarithm must keep its digits
        least = max(abs(ends[0]), abs(ends[1])) / 1400
        require(least <= rho <= 1e8, "rho", rho, f"in {bounds(least, 1e8)}")
    log_snr, drops = GRIDS[spacing](num_steps, ends[0], ends[1], rho)
    return from_log_snr(log_snr, _interpolate(-log_snr, -old_log_snr, old.timestep), drops)
