"""The plots of a report, as SVG that follows the page: its colours, its letters, its width."""

import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float

from diffusion_jax.ablation.comparison import Interval, excludes_zero
from diffusion_jax.ablation.results import SCORES, ArmScores, JobScores, Results
from diffusion_jax.drawing.plots import pixel_bin

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# In units of the picture, which are 0.85 pixels on a phone: small letters can still be read.
WIDTH, HEIGHT = 390, 270
FONT_POINTS = 11
LETTER_WIDTH = 0.62  # of a mean letter, as a share of its height
ROW_POINTS = 24  # of a panel with one row for each arm
POINTS_PER_INCH = 72

# No curve is drawn through more points.
PLOTTED_POINTS = 300

# Of a training loss the beginning, this share of the steps, is far above all that matters.
UNSETTLED_SHARE = 0.1

# Beside a plot names have lines of so many letters, and so many lines; the table has all of them.
NAME_LETTERS = 20
NAME_LINES = 3

# matplotlib wants numbers for colours; what stands for a colour of the page is replaced.
TEXT, GRID, SURFACE = "#010203", "#040506", "#070809"
PAGE_COLOURS = {TEXT: "currentColor", GRID: "var(--grid)", SURFACE: "var(--surface)"}

# Lines of arms, one after the other; dashes in units of the line's width.
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 1.8), (1.6, 1.4), (7, 1.6, 1.6, 1.6))
WIDTHS = {True: 3.2, False: 1.6}  # of the reference arm and of others

# Arms that no number orders: told apart by the colour-blind, with 3:1 and more on the page.
CATEGORIES = {
    "light": ("#0072b2", "#b85000", "#00826a", "#a8438a", "#7a6a00", "#3f3f9e"),
    "dark": ("#56b4e9", "#e69f00", "#1fc29a", "#e58fc6", "#e5dc4b", "#a5a5f5"),
}

# Where on the map "plasma" arms lie that a number orders: dark on white, bright on near-black.
SEQUENCE = {"light": (0.02, 0.63), "dark": (0.44, 0.97)}


class Style(NamedTuple):
    """How an arm is drawn in every plot."""

    light: str  # colours on a white and on a near-black page
    dark: str
    width: float
    dashes: tuple[float, ...]


def styles(results: Results) -> list[Style]:
    """A style for each arm; the reference arm has the colour of the text, and a thick line."""
    others = [i for i, arm in enumerate(results.arms) if arm.name != results.reference]
    ordered = sorted(others, key=lambda i: _position(results, results.arms[i]))
    found = [Style("currentColor", "currentColor", WIDTHS[True], ())] * len(results.arms)
    for rank, i in enumerate(ordered):
        share = rank / max(len(ordered) - 1, 1)
        light, dark = (_colour(results.swept is not None, theme, rank, share) for theme in SEQUENCE)
        found[i] = Style(light, dark, WIDTHS[False], DASHES[rank % len(DASHES)])
    return found


def _colour(is_swept: bool, theme: str, rank: int, share: float) -> str:
    if not is_swept:
        return CATEGORIES[theme][rank % len(CATEGORIES[theme])]
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    low, high = SEQUENCE[theme]
    return to_hex(colormaps["plasma"](low + share * (high - low)))


def swept_values(results: Results) -> list[float]:
    """The number of each arm that they differ in; their places where none is swept."""
    return [_position(results, arm) for arm in results.arms]


def _position(results: Results, arm: ArmScores) -> float:
    if results.swept is None:
        return float(results.arms.index(arm))
    return float(arm.fields[results.swept])


# Schedules


def beta(results: Results) -> str:
    """Draw beta against t, both logarithmic: what an offset does lies at the first timesteps."""
    bound = pixel_bin(results.levels) ** 2

    def draw(axis: "Axes") -> None:
        _curves(results, axis, "beta")
        axis.axhline(bound, color=TEXT, linewidth=0.9, linestyle=(0, (2, 3)))
        # On the left, where the curves begin, there is no room for it.
        axis.annotate(
            "√β = one pixel bin",
            (1, bound),
            (-4, 4),
            xycoords=axis.get_yaxis_transform(),
            textcoords="offset points",
            ha="right",
            fontsize=FONT_POINTS - 1.5,
        )
        axis.set(xscale="log", yscale="log", xlabel="timestep t", ylabel="β")
        _plain_logarithms(axis.xaxis)
        _plain_logarithms(axis.yaxis)

    first = [float(arm.schedule.beta[0]) for arm in results.arms]
    text = (
        "Variance beta of the noise that each timestep adds, by arm; at t = 1 it is between"
        f" {min(first):.2g} and {max(first):.2g}. The square of a pixel's bin is {bound:.2g}."
    )
    return _svg("beta", text, draw)


def alpha_bar(results: Results) -> str:
    """Draw alpha_bar against t."""

    def draw(axis: "Axes") -> None:
        _curves(results, axis, "alpha_bar")
        axis.set(xlabel="timestep t", ylabel="ᾱ", ylim=(-0.03, 1.03))

    last = [float(arm.schedule.alpha_bar[-1]) for arm in results.arms]
    text = (
        "Share alpha_bar of the signal's variance that is left, by arm, falling from 1 to between"
        f" {min(last):.2g} and {max(last):.2g}."
    )
    return _svg("alpha_bar", text, draw)


def log_snr(results: Results) -> str:
    """Draw the log of the signal-to-noise ratio against t."""

    def draw(axis: "Axes") -> None:
        _curves(results, axis, "log_snr")
        axis.axhline(0, color=TEXT, linewidth=0.9, linestyle=(0, (2, 3)))
        axis.set(xlabel="timestep t", ylabel="log SNR")

    first = [float(arm.schedule.log_snr[0]) for arm in results.arms]
    last = [float(arm.schedule.log_snr[-1]) for arm in results.arms]
    text = (
        f"Natural log of the signal-to-noise ratio, by arm, falling from between {min(first):.3g}"
        f" and {max(first):.3g} to between {min(last):.3g} and {max(last):.3g}."
    )
    return _svg("log_snr", text, draw)


def _curves(results: Results, axis: "Axes", column: str) -> None:
    for i, arm, style in _back_to_front(results):
        timestep = np.asarray(arm.schedule.timestep, np.float64)
        values = np.asarray(getattr(arm.schedule, column), np.float64)
        last = len(timestep) - 1
        shown = np.concatenate(
            [np.linspace(0, last, PLOTTED_POINTS), np.geomspace(1, last + 1, 100) - 1]
        )
        shown = np.unique(shown.round().astype(int))
        shown = shown[np.isfinite(values[shown])]
        marker = "." if len(timestep) <= 50 else ""
        _own(axis.plot(timestep[shown], values[shown], marker=marker, **_line(i, style)), i)


def root_beta_1(results: Results) -> str:
    """Draw sqrt(beta_1) of each arm, in pixel bins."""
    roots = [root_beta_1_in_bins(results, arm) for arm in results.arms]

    def draw(axis: "Axes") -> None:
        axis.axvline(1, color=TEXT, linewidth=0.9, linestyle=(0, (2, 3)))
        for row, root in enumerate(roots):
            _own(axis.plot(root, row, **_dot(results, row)), row)
            axis.annotate(
                short_number(root),
                (root, row),
                (7, 0),
                textcoords="offset points",
                va="center",
                # The line at one bin does not strike it through.
                bbox={"facecolor": SURFACE, "edgecolor": "none", "pad": 1},
            )
        low, high = min(*roots, 1), max(*roots, 1)
        axis.set(
            xscale="log", xlim=(low / (high / low * 2) ** 0.08, high * (high / low * 2) ** 0.2)
        )
        _plain_logarithms(axis.xaxis)
        _arm_rows(results, axis)
        axis.set_xlabel("√β₁ in pixel bins")

    described = ", ".join(f"{arm.name}: {root:.2g}" for arm, root in zip(results.arms, roots))
    text = f"Square root of beta_1 in pixel bins, by arm, beside a line at one bin. {described}."
    return _svg("root_beta_1", text, draw, height=_rows_height(results))


def root_beta_1_in_bins(results: Results, arm: ArmScores) -> float:
    """sqrt(beta_1), the noise of the first timestep, in units of a pixel's bin."""
    return float(np.sqrt(np.asarray(arm.schedule.beta[0], np.float64)) / pixel_bin(results.levels))


# Training


def training_loss(results: Results) -> str:
    """Draw the loss against the step: thin lines for seeds, thick ones for their means."""

    def draw(axis: "Axes") -> None:
        curves = []
        for i, arm, style in _back_to_front(results):
            thin = _line(i, style) | {"linewidth": 0.6, "alpha": 0.45, "linestyle": "solid"}
            for job in arm.jobs:
                curves.append(_thinned(job.steps, job.losses))
                if len(arm.jobs) > 1:
                    _own(axis.plot(*curves[-1], **thin), i)
            _own(axis.plot(*_thinned(*mean_losses(arm)), **_line(i, style)), i)
        if all((losses > 0).all() for _, losses in curves):
            axis.set_yscale("log")
            _settled(axis, curves)
            _plain_logarithms(axis.yaxis)
        _plain_steps(axis.xaxis)
        axis.set(xlabel="training step", ylabel="loss")

    ends = {arm.name: mean_losses(arm)[1] for arm in results.arms}
    described = ", ".join(f"{name}: {end[-1]:.4g}" for name, end in ends.items() if len(end))
    text = f"Training loss against the step, by arm, means over seeds. At the end {described}."
    return _svg("training_loss", text, draw)


def _settled(axis: "Axes", curves: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Scale the logarithmic y axis to what comes after the beginning of training."""
    last = max((steps[-1] for steps, _ in curves if len(steps)), default=1)
    values = [losses[steps >= UNSETTLED_SHARE * last] for steps, losses in curves]
    values = np.concatenate([*values, np.zeros(0)])
    values = values[np.isfinite(values)]
    if len(values) and 0 < values.min() < values.max():
        room = (values.max() / values.min()) ** 0.06
        axis.set_ylim(values.min() / room, values.max() * room)


def mean_losses(arm: ArmScores) -> tuple[np.ndarray, np.ndarray]:
    """The steps that all seeds have a record of, and the mean of their losses there."""
    common = arm.jobs[0].steps
    for job in arm.jobs[1:]:
        common = np.intersect1d(common, job.steps)
    losses = [np.float64(job.losses[np.isin(job.steps, common)]) for job in arm.jobs]
    return np.asarray(common), np.mean(losses, axis=0)


def _thinned(steps: np.ndarray, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of so many neighbours that few enough points are left."""
    losses = np.asarray(losses, np.float64)
    if len(steps) <= PLOTTED_POINTS:
        return steps, losses
    starts = np.linspace(0, len(steps), PLOTTED_POINTS + 1).astype(int)[:-1]
    sizes = np.diff([*starts, len(steps)])
    steps, losses = (np.add.reduceat(values, starts) / sizes for values in (steps, losses))
    return steps, losses


# The bound and the network's error, by log SNR


def density(results: Results) -> str:
    """Draw bits/dim per unit of log SNR: the area below a curve is the sum of L_1 to L_T-1."""

    def draw(axis: "Axes") -> None:
        _stairs(results, axis, _of_seeds(results, lambda job: job.density))
        axis.set(ylabel="bits/dim per unit of log SNR")
        axis.set_ylim(bottom=0)
        _from_data_to_noise(results, axis)

    text = f"Bits/dim per unit of log SNR, by arm. {_highest(results, lambda job: job.density)}"
    return _svg("density", text, draw)


def density_difference(results: Results) -> str:
    """Draw by how much bits/dim per unit of log SNR are above those of the reference arm."""
    densities = _of_seeds(results, lambda job: job.density)
    of_reference = densities[_reference(results)]

    def draw(axis: "Axes") -> None:
        _stairs(results, axis, [values - of_reference for values in densities])
        axis.set(ylabel=f"minus that of {reference_name(results)}")
        _from_data_to_noise(results, axis)

    text = (
        "Bits/dim per unit of log SNR minus those of the reference arm: an arm is better where"
        " its curve is below zero."
    )
    return _svg("density_difference", text, draw)


def eps_error(results: Results) -> str:
    """Draw the mean squared error of eps against log SNR."""
    errors = _of_seeds(results, lambda job: job.eps_error)

    def draw(axis: "Axes") -> None:
        _stairs(results, axis, errors)
        axis.set(ylabel="mean squared error of ε")
        drawn = np.concatenate(errors)
        if (drawn[np.isfinite(drawn)] > 0).any():
            axis.set_yscale("log")
            _plain_logarithms(axis.yaxis)
        _from_data_to_noise(results, axis)

    text = (
        "Mean squared error of the predicted noise eps against log SNR, by arm; gaps where an arm"
        f" has no timestep. {_highest(results, lambda job: job.eps_error)}"
    )
    return _svg("eps_error", text, draw)


def eps_error_ratio(results: Results) -> str:
    """Draw the error of eps as a multiple of the reference arm's."""
    errors = _of_seeds(results, lambda job: job.eps_error)
    of_reference = errors[_reference(results)]
    of_reference = np.where(of_reference > 0, of_reference, np.nan)

    def draw(axis: "Axes") -> None:
        _stairs(results, axis, [values / of_reference for values in errors])
        axis.set(ylabel=f"divided by that of {reference_name(results)}")
        _from_data_to_noise(results, axis)

    text = (
        "Mean squared error of the predicted noise eps divided by that of the reference arm,"
        " against log SNR: an arm is better where its curve is below one."
    )
    return _svg("eps_error_ratio", text, draw)


def _of_seeds(
    results: Results, column: Callable[[JobScores], np.ndarray]
) -> list[Float[np.ndarray, " bins"]]:
    """Of each arm the mean over seeds, nan where no seed has a number."""
    means = []
    for arm in results.arms:
        values = np.stack([column(job) for job in arm.jobs]).astype(np.float64)
        has = np.isfinite(values)
        count = has.sum(axis=0)
        total = np.where(has, values, 0).sum(axis=0)
        means.append(np.where(count > 0, total / np.maximum(count, 1), np.nan))
    return means


def _stairs(results: Results, axis: "Axes", values: list[Float[np.ndarray, " bins"]]) -> None:
    for i, _, style in _back_to_front(results):
        line = _line(i, style)
        line["edgecolor"] = line.pop("color")
        # Of an empty bin between two others nothing is drawn, which a patch cannot leave out.
        for first, last in _runs(np.isfinite(values[i])):
            edges = results.edges[first : last + 1]
            _own([axis.stairs(values[i][first:last], edges, baseline=None, **line)], i)
    axis.autoscale_view()


def _runs(has: np.ndarray) -> list[tuple[int, int]]:
    """Where runs of True begin and end."""
    steps = np.diff(np.concatenate([[False], has, [False]]).astype(int))
    return list(zip(np.flatnonzero(steps == 1).tolist(), np.flatnonzero(steps == -1).tolist()))


def _from_data_to_noise(results: Results, axis: "Axes") -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_xlim(results.edges[-1], results.edges[0])
    axis.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _with_minus(f"{value:g}")))
    axis.set_xlabel("log SNR, from data to noise")


def _highest(results: Results, column: Callable[[JobScores], np.ndarray]) -> str:
    values = dict(zip((arm.name for arm in results.arms), _of_seeds(results, column)))
    mean = values[results.reference]
    if not np.isfinite(mean).any():
        return f"{results.reference} has no numbers."
    k = int(np.nanargmax(mean))
    low, high = results.edges[k : k + 2]
    return (
        f"{results.reference} has its highest value, {mean[k]:.3g}, at log SNR"
        f" {low:.3g} to {high:.3g}."
    )


def terms(results: Results) -> str:
    """Draw the terms of the bound as bars, each on an axis of its own."""
    names = list(results.arms[0].jobs[0].terms)
    means = {
        name: [float(np.mean([job.terms[name] for job in arm.jobs])) for arm in results.arms]
        for name in names
    }

    def draw(*axes: "Axes") -> None:
        for k, (axis, name) in enumerate(zip(axes, names)):
            for row, mean in enumerate(means[name]):
                bar = axis.barh(row, mean, height=0.58, color=_sentinel(row))
                _own(bar.patches, row)
                axis.annotate(
                    short_number(mean),
                    (mean if math.isfinite(mean) else 0, row),
                    (3, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=FONT_POINTS - 2,
                )
            finite = [abs(mean) for mean in means[name] if math.isfinite(mean)]
            # Twice the longest bar: the number stands beside it.
            axis.set_xlim(0, 2 * max(finite, default=0) or 1)
            axis.set_title(name, fontsize=FONT_POINTS)
            axis.set_xticks([0])
            axis.xaxis.grid(False)
            _arm_rows(results, axis, labelled=k == 0)

    text = "Terms of the bound in bits/dim, by arm. " + "; ".join(
        f"{name}: "
        + ", ".join(f"{arm.name} {short_number(mean)}" for arm, mean in zip(results.arms, of_arms))
        for name, of_arms in means.items()
    )
    return _svg("terms", text + ".", draw, height=_rows_height(results), columns=len(names))


# Figures of arms


def figure_of_arms(results: Results, name: str) -> str:
    """Draw a figure of each arm with its interval, and a dot for each seed."""
    heading, unit = SCORES[name]
    means = [arm.scores[name].mean for arm in results.arms]

    def draw(axis: "Axes") -> None:
        _along(results, axis, means, [_per_seed(arm, name) for arm in results.arms])
        _label_values(results, axis, heading)

    order = sorted(zip(results.arms, means), key=lambda pair: pair[1].value)
    (lowest, low), (highest, high) = order[0], order[-1]
    text = (
        f"{heading.capitalize()}, {unit}, of each arm: lowest at {lowest.name},"
        f" {describe(low)}, highest at {highest.name}, {describe(high)}."
    )
    return _svg(f"{name}_of_arms", text, draw, height=_figure_height(results))


def differences_of_arms(results: Results, name: str) -> str:
    """Draw by how much a figure of each arm is above that of the reference arm, in pairs."""
    heading, unit = SCORES[name]
    exact = Interval(0.0, 0.0, 0.0)
    differences = [arm.scores[name].difference or exact for arm in results.arms]
    of_reference = _per_seed(results.arms[_reference(results)], name)
    pairs = [
        np.zeros(0) if arm.name == results.reference else _per_seed(arm, name) - of_reference
        for arm in results.arms
    ]

    def draw(axis: "Axes") -> None:
        line = axis.axhline if results.swept else axis.axvline
        line(0, color=TEXT, linewidth=0.9)
        hollow = [i for i, of_arm in enumerate(differences) if not excludes_zero(of_arm)]
        _along(results, axis, differences, pairs, hollow)
        _label_values(results, axis, f"minus that of {reference_name(results)}")

    sides = {
        "below": [a.name for a, d in zip(results.arms, differences) if d.high < 0],
        "above": [a.name for a, d in zip(results.arms, differences) if d.low > 0],
    }
    found = "; ".join(f"{side} zero: {', '.join(arms) or 'none'}" for side, arms in sides.items())
    text = (
        f"{heading.capitalize()}, {unit}, of each arm minus that of the reference arm"
        f" {results.reference}. Intervals that lie {found}."
    )
    return _svg(f"{name}_differences", text, draw, height=_figure_height(results))


def _per_seed(arm: ArmScores, name: str) -> np.ndarray:
    return np.array([figure_of_job(job, name) for job in arm.jobs])


def figure_of_job(job: JobScores, name: str) -> float:
    """The figure of SCORES of one trained model."""
    if name == "bits_per_dim":
        return float(np.mean(job.bits))
    return float(job.quality.value if name == "quality" else job.loss)


def describe(interval: Interval) -> str:
    """A number and its interval for a sentence: 3 significant digits of what is not known."""
    half = (interval.high - interval.low) / 2
    if not math.isfinite(half):
        return f"{interval.value:.4g}"
    digits = decimals([interval])
    value, low, high = (f"{x:.{digits}f}" for x in interval)
    return f"{value} (95 % interval {low} to {high})"


def decimals(intervals: Sequence[Interval]) -> int:
    """Decimals at which a typical half-width has two significant digits; six at most."""
    halves = [(interval.high - interval.low) / 2 for interval in intervals]
    halves = [half for half in halves if math.isfinite(half) and half > 0]
    if halves:
        return int(np.clip(1 - math.floor(math.log10(np.median(halves))), 0, 6))
    sizes = [abs(interval.value) for interval in intervals]
    largest = max((size for size in sizes if math.isfinite(size) and size > 0), default=1.0)
    return int(np.clip(3 - math.floor(math.log10(largest)), 0, 6))


def _along(
    results: Results,
    axis: "Axes",
    intervals: list[Interval],
    seeds: list[np.ndarray],
    hollow: Sequence[int] = (),
) -> None:
    """Intervals at evenly spaced places: along x where a number is swept, else one row each."""
    is_swept = results.swept is not None
    values = swept_values(results)
    places = np.argsort(np.argsort(values, kind="stable"), kind="stable")

    def plot(place: Any, value: Any, **style: Any) -> list:
        return axis.plot(place, value, **style) if is_swept else axis.plot(value, place, **style)

    if is_swept:
        order = np.argsort(places)
        trend = [intervals[i].value for i in order]
        plot(np.arange(len(order)), trend, color=TEXT, linewidth=0.8, alpha=0.35, zorder=1)
    for i, (interval, of_seeds, place) in enumerate(zip(intervals, seeds, places)):
        dot = _dot(results, i)
        if math.isfinite(interval.low) and math.isfinite(interval.high):
            ends = [interval.low, interval.high]
            bar = {"color": dot["color"], "linewidth": WIDTHS[i == _reference(results)]}
            _own(plot([place, place], ends, solid_capstyle="butt", **bar), i)
        if i in hollow:
            dot |= {"markerfacecolor": SURFACE, "markeredgewidth": 1.6}
        _own(plot(place, interval.value, **dot), i)
        small = {"marker": "o", "markersize": 3, "markeredgewidth": 0, "linestyle": "none"}
        beside = np.full(len(of_seeds), place + (0.22 if is_swept else -0.3))
        if len(of_seeds) > 1:
            _own(plot(beside, of_seeds, color=dot["color"], alpha=0.75, **small), i)
    ticks = _ticks(results)
    names = [ticks[i] for i in np.argsort(places)]
    if is_swept:
        crowded = sum(map(len, names)) > 48
        axis.set_xticks(range(len(names)), names, rotation=45 if crowded else 0)
        axis.set_xlim(-0.5, len(names) - 0.4)
        axis.xaxis.grid(False)
    else:
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(len(names) - 0.4, -0.6)
        axis.yaxis.grid(False)


def _label_values(results: Results, axis: "Axes", text: str) -> None:
    if results.swept is None:
        axis.set_xlabel(text)
    else:
        axis.set(xlabel=results.swept, ylabel=text)


def _figure_height(results: Results) -> int:
    return HEIGHT if results.swept is not None else _rows_height(results)


# What panels share


def _reference(results: Results) -> int:
    return [arm.name for arm in results.arms].index(results.reference)


def _back_to_front(results: Results) -> list[tuple[int, ArmScores, Style]]:
    """Arms in the order they are drawn: the reference arm's thick line lies below the others."""
    entries = list(zip(range(len(results.arms)), results.arms, styles(results)))
    return sorted(entries, key=lambda entry: entry[1].name != results.reference)


def _sentinel(i: int) -> str:
    """What stands for the colour of arm i until the page's takes its place."""
    return f"#0b{i // 256:02x}{i % 256:02x}"


def _line(i: int, style: Style) -> dict[str, Any]:
    linestyle = (0, style.dashes) if style.dashes else "solid"
    return {"color": _sentinel(i), "linewidth": style.width, "linestyle": linestyle}


def _dot(results: Results, i: int) -> dict[str, Any]:
    is_reference = i == _reference(results)
    return {
        "color": _sentinel(i),
        "marker": "D" if is_reference else "o",
        "markersize": 7 if is_reference else 6.5,
        "linestyle": "none",
        "zorder": 3,
    }


def _own(artists: "Sequence[Artist]", i: int) -> None:
    """Say that the artists are of arm i: the page's legend picks them out."""
    for artist in artists:
        artist.set_gid(f"arm:{i}")


def reference_name(results: Results) -> str:
    """The name of the reference arm, or that it is it where the name is long."""
    is_short = len(results.reference) <= NAME_LETTERS
    return results.reference if is_short else "the reference arm"


def _ticks(results: Results) -> list[str]:
    """What stands beside each arm: its number, or its name, in lines."""
    if results.swept is not None:
        return [f"{value:g}" for value in swept_values(results)]
    names = [arm.name for arm in results.arms]
    # Of "schedule.name=cosine,schedule.s=0.008" the fields' last parts, if they tell arms apart.
    short = [re.sub(r"[\w.]*\.(?=[A-Za-z_]\w*=)", "", name) for name in names]
    return [_lines(name) for name in (short if len(set(short)) == len(names) else names)]


def _lines(name: str) -> str:
    lines = [""]
    for part in re.findall(r"[^,]+,?|,", name):
        if lines[-1] and len(lines[-1]) + len(part.rstrip()) > NAME_LETTERS:
            lines.append("")
        lines[-1] += part if lines[-1] else part.lstrip()
    if len(lines) > NAME_LINES:
        lines = [*lines[: NAME_LINES - 1], lines[NAME_LINES - 1] + "…"]
    return "\n".join(
        line if len(line) <= NAME_LETTERS else line[: NAME_LETTERS - 1] + "…" for line in lines
    )


def _arm_rows(results: Results, axis: "Axes", labelled: bool = True) -> None:
    names = _ticks(results) if labelled else [""] * len(results.arms)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.6)  # from the top down, as the table
    axis.yaxis.grid(False)
    if labelled and results.swept is not None:
        axis.set_ylabel(results.swept)


def _rows_height(results: Results) -> int:
    lines = max(tick.count("\n") for tick in _ticks(results)) + 1
    return max(HEIGHT, 70 + max(ROW_POINTS, 16 * lines) * len(results.arms))


def short_number(value: float) -> str:
    """Three significant digits."""
    if not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    if abs(value) >= 1e-3:
        return _with_minus(f"{value:#.3g}".rstrip("."))
    mantissa, exponent = f"{value:.2e}".split("e")
    return _with_minus(f"{mantissa}e{int(exponent)}")


def _with_minus(number: str) -> str:
    return number.replace("-", "−")


def _plain_logarithms(axis: "Axis") -> None:
    """Ticks of a logarithmic axis as plain numbers: 0.001, not a power that needs mathtext."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = sorted(axis.get_view_interval())
    is_narrow = low > 0 and high / low < 100
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if is_narrow else (1,), numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _plain_number(value)))
    axis.set_minor_locator(NullLocator())


def _plain_number(value: float) -> str:
    if 1e-4 <= value < 1e6:
        return f"{value:.10f}".rstrip("0").rstrip(".")
    mantissa, exponent = f"{value:e}".split("e")
    return _with_minus(f"{float(mantissa):g}e{int(exponent)}")


def _plain_steps(axis: "Axis") -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(
        FuncFormatter(lambda step, _: f"{step / 1000:g}k" if abs(step) >= 10_000 else f"{step:g}")
    )


def _svg(
    name: str, text: str, draw: Callable[..., None], height: int = HEIGHT, columns: int = 1
) -> str:
    """Draw axes, and make of them SVG for the middle of a page; ``text`` says what is seen."""
    # Half a second to import, see plots.schedule_card.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    settings = {
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": name,
        "text.parse_math": False,  # an arm's name may have a dollar sign
        "font.family": "DejaVu Sans",
        "font.size": FONT_POINTS,
        "axes.labelsize": FONT_POINTS,
        "axes.facecolor": "none",
        "axes.edgecolor": TEXT,
        "axes.linewidth": 0.7,
        "axes.labelcolor": TEXT,
        "axes.titlecolor": TEXT,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.unicode_minus": True,
        "grid.color": GRID,
        "grid.linewidth": 0.6,
        "text.color": TEXT,
        "xtick.color": TEXT,
        "ytick.color": TEXT,
        "xtick.labelsize": FONT_POINTS - 1,
        "ytick.labelsize": FONT_POINTS - 1,
        "xtick.major.width": 0.7,
        "ytick.major.width": 0.7,
        "xtick.minor.size": 0,
        "ytick.minor.size": 0,
    }
    drawn = io.StringIO()
    with rc_context(settings), warnings.catch_warnings():
        # Letters that DejaVu lacks are measured with a wrong width; the page has other fonts.
        warnings.filterwarnings("ignore", message="Glyph")
        size = WIDTH / POINTS_PER_INCH, height / POINTS_PER_INCH
        figure = Figure(figsize=size)
        figure.patch.set_visible(False)
        axes = figure.subplots(1, columns, squeeze=False).ravel()
        draw(*axes)
        _set_margins(figure, axes, height)
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    return _tidy(drawn.getvalue(), name, text, height)


def _set_margins(figure: "Figure", axes: "Sequence[Axes]", height: int) -> None:
    """Leave room for labels by their letters; to measure them takes as long as the drawing."""

    def longest(axis: "Axis") -> float:
        ticks = axis.get_major_formatter().format_ticks(axis.get_majorticklocs())
        return (
            LETTER_WIDTH
            * (FONT_POINTS - 1)
            * max((len(line) for tick in ticks for line in tick.split("\n")), default=0)
        )

    line = 1.5 * FONT_POINTS
    left = 10 + longest(axes[0].yaxis) + line * bool(axes[0].get_ylabel())
    is_slanted = any(tick.get_rotation() for tick in axes[0].get_xticklabels())
    below = 0.75 * longest(axes[0].xaxis) if is_slanted else FONT_POINTS
    bottom = 8 + below + line * bool(axes[0].get_xlabel())
    top = 6 + line * bool(axes[0].get_title())
    figure.subplots_adjust(left / WIDTH, bottom / height, 1 - 12 / WIDTH, 1 - top / height, 0.1)


def _tidy(svg: str, name: str, text: str, height: int) -> str:
    """Turn a file of matplotlib into an element of a page, half as long."""
    body = svg[svg.index("<defs>") : svg.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", body, flags=re.DOTALL)
    # It would hold for the whole page; the root element has it instead.
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)

    # Ids count up from 1 in every file: those that something refers to get the name in front.
    body = re.sub(r' id="arm:(\d+)"', r' data-arm="\1"', body)
    used = set(re.findall(r"#([\w-]+)\"|url\(#([\w-]+)\)", body))
    used = {found for pair in used for found in pair if found}
    body = re.sub(
        r' id="([^"]*)"',
        lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "",
        body,
    )
    body = re.sub(r'href="#', f'href="#{name}-', body)
    body = re.sub(r"url\(#", f"url(#{name}-", body)

    for sentinel, colour in PAGE_COLOURS.items():
        body = body.replace(sentinel, colour)
    body = re.sub(r"#0b([0-9a-f]{4})", lambda found: f"var(--arm-{int(found[1], 16)})", body)
    body = body.replace("'DejaVu Sans'", "var(--sans, sans-serif)")
    body = re.sub(r'\b(d|x|y|transform|width|height)="([^"]*)"', _rounded, body)
    # L_0 and L_{T-1} as they are set; elsewhere an underscore is one.
    body = re.sub(r"\bL_(?:\{([^}<]*)\}|(\w))", _subscript, body)
    body = re.sub(r">\s+<", "><", body).strip()
    return (
        f'<svg role="img" aria-label="{escape(text)}" viewBox="0 0 {WIDTH} {height:g}"'
        f' stroke-linejoin="round" stroke-linecap="butt">{body}</svg>'
    )


def _rounded(found: re.Match) -> str:
    def shorter(number: re.Match) -> str:
        return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")

    values = re.sub(r"-?\d+\.\d+(?:e-?\d+)?", shorter, " ".join(found[2].split()))
    return f'{found[1]}="{values}"'


def _subscript(found: re.Match) -> str:
    below = (found[1] or found[2]).replace("-", "−")
    return f'L<tspan dy="0.25em" font-size="75%">{below}</tspan><tspan dy="-0.19em">\u200b</tspan>'
