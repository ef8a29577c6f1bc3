"""Plots: the schedule card, and the terms of the variational bound."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from diffusion_jax.diffusion.schedules.schedule import Schedule
from diffusion_jax.drawing.images import BLUE, GREY, RED

# A panel has fewer pixels than this, so more points would only be slower.
PLOTTED_TIMESTEPS = 4000

# The axis of the bound's terms goes no lower than this share of the largest term.
NEGLIGIBLE_BITS = 1e-7


def pixel_bin(levels: int) -> float:
    """The pixel bin, the distance of neighbouring grey levels in [-1, 1]: 2/(levels - 1)."""
    return 2 / (levels - 1)


def describe_schedule(schedule: Schedule, levels: int | None, num_clipped: int, title: str) -> str:
    """The summary of a schedule that a run prints, in lines of text.

    Nichol & Dhariwal 2021 (section 3.2) choose the offset s of the cosine schedule so that
    sqrt(beta_1) is slightly smaller than the pixel bin, so the summary shows both.

    Args:
        schedule: the schedule of the run, after all rescaling.
        levels: grey levels of the data set (256: a bin of 1/127.5); None: the data are points.
        num_clipped: number of betas that were clipped to max_beta or min_beta.
        title: the schedule's name and parameters.
    """
    root_beta_1 = np.sqrt(schedule.beta[0])
    lines = [f"schedule      {title}"]
    if levels is None:
        lines.append(f"sqrt(beta_1)  {root_beta_1:.3g} (the data have no pixel bin)")
    else:
        lines.append(
            f"sqrt(beta_1)  {root_beta_1:.3g} = {root_beta_1 / pixel_bin(levels):.3g} pixel bins"
            f" (one bin: {_fraction(levels)} = {pixel_bin(levels):.3g})"
        )
    alpha_bar_T = schedule.alpha_bar[-1]
    snr, log_snr = np.asarray(schedule.snr), np.asarray(schedule.log_snr)
    lines += [
        f"alpha_bar_T   {alpha_bar_T:.3g}{' (zero terminal SNR)' if alpha_bar_T == 0 else ''}",
        f"SNR           {snr[0]:.3g} to {snr[-1]:.3g} (log SNR {log_snr[0]:.3g} to"
        f" {log_snr[-1]:.3g})",
        f"clipped       {num_clipped} of {len(schedule)} betas",
    ]
    return "\n".join(lines)


def _fraction(levels: int) -> str:
    return f"1/{1 / pixel_bin(levels):g}"


# The panels of the card: column of the schedule -> (its symbol, its meaning).
PANELS = {
    "beta": (r"$\beta_t$", "variance of the noise that step t adds"),
    "alpha_bar": (r"$\bar\alpha_t$", "share of the signal's variance that is left"),
    "sigma": (
        r"$\sigma_t=\sqrt{(1-\bar\alpha_t)\,/\,\bar\alpha_t}$",
        "noise level of k-diffusion and EDM",
    ),
    "log_snr": (r"$\log\mathrm{SNR}(t)$", "log signal-to-noise ratio (natural log)"),
}


def schedule_card(schedule: Schedule, levels: int | None, title: str, path: str | Path) -> None:
    """Draw beta, alpha_bar, sigma and log SNR against the timestep, as one PNG.

    The panel of beta shows the data set's pixel bin, see ``describe_schedule``.
    """
    # Imported here, because it takes half a second. A Figure without pyplot needs no display and
    # no global state.
    from matplotlib.figure import Figure

    columns = {
        name: np.asarray(getattr(schedule, name), np.float64) for name in ("timestep", *PANELS)
    }
    # Fixed margins, because an automatic layout takes as long as the drawing.
    figure = Figure(figsize=(10, 7), dpi=120)
    figure.subplots_adjust(0.08, 0.07, 0.985, 0.89, wspace=0.45, hspace=0.17)
    figure.suptitle(title, fontsize=14)
    axes = dict(zip(PANELS, figure.subplots(2, 2, sharex=True).ravel()))
    for name, axis in axes.items():
        _draw_column(axis, name, columns)
    if np.isfinite(columns["sigma"]).any():  # false if alpha_bar = 0 in the only row
        axes["sigma"].set_yscale("log")
    axes["alpha_bar"].set_ylim(-0.03, 1.03)
    axes["log_snr"].axhline(0, color="black", linewidth=0.8)  # SNR = 1
    for name in ("sigma", "log_snr"):
        axes[name].set_xlabel("timestep t", fontsize=11)
        # The axis starts at t = 0, the data.
        axes[name].set_xlim(0, 1.02 * columns["timestep"][-1])
    _mark_pixel_bin(axes["beta"], columns, levels)
    figure.savefig(path, format="png")


def _draw_column(axis: Any, name: str, columns: dict[str, np.ndarray]) -> None:
    """Draw one column of a schedule against the timestep; a text marks infinite values."""
    symbol, meaning = PANELS[name]
    num_rows = len(columns["timestep"])
    shown = np.unique(np.linspace(0, num_rows - 1, PLOTTED_TIMESTEPS).round().astype(int))
    timestep, values = columns["timestep"][shown], columns[name][shown]
    finite = np.isfinite(values)
    marker = "." if num_rows <= 50 else None
    axis.plot(timestep[finite], values[finite], color=_hex(BLUE), linewidth=2, marker=marker)
    axis.set_title(meaning, fontsize=11)
    axis.set_ylabel(symbol, fontsize=13)
    axis.grid(color=_hex(GREY), linewidth=0.5)
    if finite.all():
        return
    # sigma and log SNR are infinite where alpha_bar = 0.
    upwards = values[~finite][0] > 0
    word = "at" if finite[:-1].all() else "from"
    axis.text(
        0.5,
        0.94 if upwards else 0.06,
        rf"${'' if upwards else '-'}\infty$ {word} t = {timestep[~finite][0]:g}",
        transform=axis.transAxes,
        ha="center",
        va="top" if upwards else "bottom",
        color=_hex(RED),
        fontsize=11,
    )


def _mark_pixel_bin(axis: Any, columns: dict[str, np.ndarray], levels: int | None) -> None:
    """Mark beta_1 on the panel of beta, and the squared pixel bin if the data are images."""
    beta = columns["beta"]
    axis.set_yscale("log")
    axis.plot(
        columns["timestep"][0],
        beta[0],
        "o",
        color=_hex(RED),
        markersize=7,
        clip_on=False,
        label=rf"$\sqrt{{\beta_1}}$ = {np.sqrt(beta[0]):.3g}",
    )
    drawn = [beta.min(), beta.max()]
    if levels is not None:
        drawn.append(pixel_bin(levels) ** 2)
        axis.axhline(
            pixel_bin(levels) ** 2,
            color=_hex(RED),
            linestyle="--",
            linewidth=1.2,
            label=rf"$\sqrt{{\beta}}$ = pixel bin = {_fraction(levels)} = {pixel_bin(levels):.3g}",
        )
    # At least one decade, otherwise the panel of a constant beta would show rounding errors. The
    # space below is for the legend.
    low, high = np.min(drawn), np.max(drawn)
    span = max(high / low, 10)
    axis.set_ylim(low / span**0.45, high * span**0.05)
    axis.legend(fontsize=10, loc="lower right")
    # The same curve as a standard deviation, which is compared with the pixel bin.
    root_axis = axis.secondary_yaxis("right", functions=(np.sqrt, np.square))
    root_axis.set_ylabel(r"$\sqrt{\beta_t}$", fontsize=13)


class BoundCurve(NamedTuple):
    """The terms of the variational bound at some timesteps, in bits/dim, with standard errors."""

    timestep: Int[np.ndarray, " n"]
    log_snr: Float[np.ndarray, " n"]
    bits: Float[np.ndarray, " n"]
    error: Float[np.ndarray, " n"]


def bound_terms(curve: BoundCurve, path: str | Path) -> None:
    """Draw the terms of the variational bound, in bits/dim, against the timestep and log SNR.

    The band is plus and minus two standard errors.
    """
    from matplotlib.figure import Figure

    timestep, log_snr, bits, error = curve
    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axis, x, name in (
        (left, timestep, "timestep t"),
        (right, log_snr, "log SNR (natural log)"),
    ):
        drawn = np.isfinite(x) & (bits > 0)
        low = np.maximum(bits - 2 * error, bits / 10)  # the axis is logarithmic
        axis.fill_between(
            x[drawn], low[drawn], (bits + 2 * error)[drawn], color=_hex(BLUE), alpha=0.25
        )
        axis.plot(x[drawn], bits[drawn], color=_hex(BLUE), linewidth=1.5)
        axis.set_yscale("log")
        axis.set_xlabel(name, fontsize=11)
        axis.grid(color=_hex(GREY), linewidth=0.5)
    # L_0 is nearly 0 if there are few grey levels; the other terms would be squeezed.
    left.set_ylim(bottom=max(bits[bits > 0].min() / 2, bits.max() * NEGLIGIBLE_BITS))
    left.set_xscale("log")
    right.invert_xaxis()  # from data to noise, as the timestep axis
    left.set_ylabel("bits/dim of the term", fontsize=11)
    figure.savefig(path, format="png")


def _hex(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)
