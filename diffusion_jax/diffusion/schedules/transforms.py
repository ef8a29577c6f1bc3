"""Functions from schedule to schedule: respacing, off-grid rows, shifts, zero terminal SNR."""

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
    """The chain through rows of decreasing log SNR, whose input to a network is ``timestep``.

    alpha_bar = sigmoid(log SNR), beta_t = -(1 - alpha_bar_t) expm1(log SNR_t - log SNR_{t-1})
    (Kingma et al. 2021, VDM). ``drops`` are log SNR_{t-1} - log SNR_t for t >= 2, where they are
    known better than the difference of two neighbours that were rounded to float32.
    """
    xp = array_module(log_snr)
    alpha_bar, one_minus_alpha_bar = 1 / (1 + xp.exp(-log_snr)), 1 / (1 + xp.exp(log_snr))
    # alpha_t = alpha_bar_t / alpha_bar_{t-1}, where the row before the first has alpha_bar = 1
    drops = log_snr[:-1] - log_snr[1:] if drops is None else drops
    beta = xp.concatenate([one_minus_alpha_bar[:1], -one_minus_alpha_bar[1:] * xp.expm1(-drops)])
    # of two numbers that add up to 1 the smaller one determines the larger
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
    """The chain through off-grid rows, of decreasing log SNR within the range of ``schedule``.

    The timestep is interpolated between the neighbouring rows, linearly in log SNR.

    Raises:
        ConfigError: a log SNR outside the range, or not below the one before it.
    """
    old = _columns(schedule)
    known = _log_snr(old)
    if is_known(known, log_snr):
        slack = 1e-6 * np.abs(known)  # columns are rounded to float32
        first, last = known[0] + slack[0], known[-1] - slack[-1]
        inside = np.all((log_snr <= first) & (log_snr >= last)) and np.all(np.diff(log_snr) < 0)
        require(inside, "log_snr", log_snr, f"decreasing, in {bounds(known[-1], known[0])}")
    return from_log_snr(log_snr, _interpolate(-log_snr, -known, old.timestep))


def _log_snr(old: Schedule) -> Column:
    """Log SNR of float64 columns in float64; -inf at zero SNR."""
    xp = array_module(old.beta)
    with np.errstate(divide="ignore"):
        log_snr: Column = xp.log(old.alpha_bar) - xp.log(old.one_minus_alpha_bar)
    return log_snr


def _interpolate(
    x: Float[Array, " n"] | Float[np.ndarray, " n"],
    known_x: Float[Array, " m"] | Float[np.ndarray, " m"],
    known_y: Float[Array, " m"] | Float[np.ndarray, " m"],
) -> Float[Array, " n"] | Float[np.ndarray, " n"]:
    """Linear interpolation, constant beyond its ends; in jax without the loop of jnp.interp."""
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
    """The same schedule in float64 on the host, or unchanged if it is traced."""
    if not is_known(*jax.tree.leaves(schedule)):
        return schedule
    return map_leaves(lambda column: np.asarray(column, np.float64), schedule)


def zero_terminal_snr(schedule: Schedule) -> Schedule:
    """Lin et al. 2023 (arXiv 2305.08891): sqrt(alpha_bar) is shifted and scaled to end at 0.

    alpha_bar_1 stays, beta_T becomes 1. x_T then contains nothing of x_0, which therefore does not
    follow from a prediction of eps or of the score.

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
    # sqrt(alpha_bar) loses `lost` over the transition t >= 2 and has `left` to lose after t.
    lost = (xp.sqrt(old.alpha_bar_prev) * old.beta / (1 + xp.sqrt(old.alpha)))[1:]
    left = xp.concatenate([xp.cumsum(lost[::-1])[::-1], zero])
    scale = root[0] / left[0]
    ratio = left[1:] / left[:-1]
    one_minus_root_1 = old.one_minus_alpha_bar[:1] / (1 + root[:1])
    one_minus_root = one_minus_root_1 + scale * xp.concatenate([zero, xp.cumsum(lost)])
    return from_columns(
        beta=xp.concatenate([old.beta[:1], lost / left[:-1] * (1 + ratio)]),
        alpha=xp.concatenate([old.alpha[:1], ratio**2]),
        alpha_bar=(scale * left) ** 2,
        one_minus_alpha_bar=one_minus_root * (1 + scale * left),
        timestep=old.timestep,
    )


def shift_log_snr(schedule: Schedule, resolution: Scalar, base_resolution: Scalar) -> Schedule:
    """Hoogeboom et al. 2023 (arXiv 2301.11093): log SNR + 2 log(base_resolution / resolution).

    An average over pixels removes noise, and large images have more pixels. With the shift they
    lose as much at each timestep as images of the base resolution (both in pixels) without it.

    Raises:
        ConfigError: a resolution that is not finite and positive (traced ones are not checked).
    """
    for field, pixels in {"resolution": resolution, "base_resolution": base_resolution}.items():
        if is_known(pixels):
            require(0 < pixels < math.inf, field, pixels, "a finite number > 0")
    old = _columns(schedule)
    c = (base_resolution / resolution) ** 2
    # The new alpha_bar and 1 - alpha_bar are as c alpha_bar to 1 - alpha_bar.
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
    """The chain over ``num_steps`` of the timesteps, with the betas of the whole jumps (iDDPM).

    A spacing of ``spacings.SPACINGS`` selects rows, which keep their timestep and alpha_bar. One of
    ``spacings.GRIDS`` makes rows between them, so that num_steps may exceed T: from ``sigma_min``
    to ``sigma_max`` (None: those of the schedule); "karras" depends on ``rho`` > 0.

    Raises:
        ConfigError: num_steps outside 1..T, an unknown spacing, a spacing whose single step is at
            t = 1, a grid that is not within the schedule or where its SNR is 0.
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
    # one sum per jump, which starts after the selected row before it
    log_alpha = log_one_minus(old.beta, old.alpha)[: rows[-1] + 1]
    log_jump = xp.add.reduceat(log_alpha, np.append(0, rows[:-1] + 1))
    selected = jax.tree.map(lambda column: column[rows], old)
    return from_columns(
        # the first jump is from t = 0: the same numbers, to the last digit
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
    """A spacing of ``spacings.GRIDS``; ``sigmas`` are its two ends, by the name of their field."""
    require_length("num_steps", num_steps, longest=1 if len(schedule) == 1 else None)
    old = _columns(schedule)
    xp, known = array_module(old.beta), _log_snr(old)
    if is_known(known):
        allowed = f"one of {', '.join(SPACINGS)}: the schedule ends at zero SNR"
        require(np.isfinite(known[-1]), "spacing", spacing, allowed)
    ends = [known[0], known[-1]]
    for place, (field, sigma) in enumerate(sigmas.items()):
        if sigma is None:
            continue
        if is_known(sigma, known):
            least, most = np.exp(-known[0] / 2), np.exp(-known[-1] / 2)
            allowed = f"a noise level of the schedule, in {bounds(least, most)}"
            require(least <= sigma <= most, field, sigma, allowed)
        ends[place] = -2 * xp.log(sigma)
    if is_known(*ends) and num_steps > 1:
        sigma_min, sigma_max = np.exp(-ends[0] / 2), np.exp(-ends[1] / 2)
        if sigmas["sigma_max"] is None:
            field, allowed = "sigma_min", f"below sigma_max = {at_most(sigma_max)}"
        else:
            field, allowed = "sigma_max", f"above sigma_min = {at_least(sigma_min)}"
        why = "as many steps need noise levels between them"
        require(ends[1] < ends[0], field, sigmas[field], f"{allowed} ({why})")
    if is_known(rho):
        require(0 < rho < math.inf, "rho", rho, "a finite number > 0")
    if is_known(rho, *ends):
        # sigma^(1/rho) must be a float64, and its logarithm times rho have digits
        least = max(abs(ends[0]), abs(ends[1])) / 1400
        require(least <= rho <= 1e8, "rho", rho, f"in {bounds(least, 1e8)}")
    log_snr, drops = GRIDS[spacing](num_steps, ends[0], ends[1], rho)
    return from_log_snr(log_snr, _interpolate(-log_snr, -known, old.timestep), drops)
