"""The plots of a report: each public function draws one and returns it as an SVG element."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from diffusion_jax.ablation.comparison import excludes_zero
from diffusion_jax.ablation.report.arms import (
    WIDTHS,
    Style,
    arm_labels,
    create_styles,
    reference_index,
    reference_name,
    swept_values,
)
from diffusion_jax.ablation.report.formats import (
    describe_interval,
    set_logarithmic_ticks,
    set_step_ticks,
    short_number,
    with_minus,
)
from diffusion_jax.ablation.report.svg import (
    FONT_POINTS,
    HEIGHT,
    SURFACE,
    TEXT,
    colour_of_arm,
    create_svg,
    tag_with_arm,
)
from diffusion_jax.ablation.results import SCORES, ArmScores, JobScores, Results, score_of_job
from diffusion_jax.drawing.plots import pixel_bin
from diffusion_jax.evaluation.interval import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROW_POINTS = 24  # height of an arm's row
PLOTTED_POINTS = 300  # the most points of a curve
UNSETTLED_SHARE = 0.1  # of the training steps: the first losses are far above the others

# Schedules


def beta(results: Results) -> str:
    """Draw beta against t on logarithmic axes, because the offset s changes the first timesteps."""
    bound = pixel_bin(results.levels) ** 2

    def draw(axis: "Axes") -> None:
        _curves(results, axis, "beta")
        axis.axhline(bound, color=TEXT, linewidth=0.9, linestyle=(0, (2, 3)))
        # The text is on the right, because the curves begin on the left.
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
        set_logarithmic_ticks(axis.xaxis)
        set_logarithmic_ticks(axis.yaxis)

    first = [float(arm.schedule.beta[0]) for arm in results.arms]
    text = (
        "Variance beta of the noise that each timestep adds, by arm; at t = 1 it is between"
        f" {min(first):.2g} and {max(first):.2g}. The square of a pixel bin is {bound:.2g}."
    )
    return create_svg("beta", text, draw)


def alpha_bar(results: Results) -> str:
    """Draw alpha_bar against t."""

    def draw(axis: "Axes") -> None:
        _curves(results, axis, "alpha_bar")
        axis.set(xlabel="timestep t", ylabel="ᾱ", ylim=(-0.03, 1.03))

    last = [float(arm.schedule.alpha_bar[-1]) for arm in results.arms]
    text = (
        "Share alpha_bar of the signal's variance that remains in x_t, by arm; at the last timestep"
        f" it is between {min(last):.2g} and {max(last):.2g}."
    )
    return create_svg("alpha_bar", text, draw)


def log_snr(results: Results) -> str:
    """Draw the natural log of the signal-to-noise ratio against t."""

    def draw(axis: "Axes") -> None:
        _curves(results, axis, "log_snr")
        axis.axhline(0, color=TEXT, linewidth=0.9, linestyle=(0, (2, 3)))
        axis.set(xlabel="timestep t", ylabel="log SNR")

    first = [float(arm.schedule.log_snr[0]) for arm in results.arms]
    last = [float(arm.schedule.log_snr[-1]) for arm in results.arms]
    text = (
        "Natural log of the signal-to-noise ratio, by arm. At the first timestep it is between"
        f" {min(first):.3g} and {max(first):.3g}, at the last between {min(last):.3g} and"
        f" {max(last):.3g}."
    )
    return create_svg("log_snr", text, draw)


def _curves(results: Results, axis: "Axes", column: str) -> None:
    """Draw a column of every schedule against t, with more points at the first timesteps."""
    for i, arm, style in _back_to_front(results):
        timestep = np.asarray(arm.schedule.timestep, np.float64)
        values = np.asarray(getattr(arm.schedule, column), np.float64)
        last = len(timestep) - 1
        rows = np.concatenate(
            [np.linspace(0, last, PLOTTED_POINTS), np.geomspace(1, last + 1, 100) - 1]
        )
        rows = np.unique(rows.round().astype(int))
        rows = rows[np.isfinite(values[rows])]
        marker = "." if len(timestep) <= 50 else ""
        tag_with_arm(axis.plot(timestep[rows], values[rows], marker=marker, **_line(i, style)), i)


def root_beta_1(results: Results) -> str:
    """Draw sqrt(beta_1) of each arm, in pixel bins."""
    roots = [root_beta_1_in_bins(results, arm) for arm in results.arms]

    def draw(axis: "Axes") -> None:
        axis.axvline(1, color=TEXT, linewidth=0.9, linestyle=(0, (2, 3)))
        for row, root in enumerate(roots):
            tag_with_arm(axis.plot(root, row, **_dot(results, row)), row)
            axis.annotate(
                short_number(root),
                (root, row),
                (7, 0),
                textcoords="offset points",
                va="center",
                # A background, so that the line at one bin does not cross the number.
                bbox={"facecolor": SURFACE, "edgecolor": "none", "pad": 1},
            )
        low, high = min(*roots, 1), max(*roots, 1)
        axis.set(
            xscale="log", xlim=(low / (high / low * 2) ** 0.08, high * (high / low * 2) ** 0.2)
        )
        set_logarithmic_ticks(axis.xaxis)
        _arm_rows(results, axis)
        axis.set_xlabel("√β₁ in pixel bins")

    descriptions = ", ".join(f"{arm.name}: {root:.2g}" for arm, root in zip(results.arms, roots))
    text = f"Square root of beta_1 in pixel bins, by arm, with a line at one bin. {descriptions}."
    return create_svg("root_beta_1", text, draw, height=_rows_height(results))


def root_beta_1_in_bins(results: Results, arm: ArmScores) -> float:
    """sqrt(beta_1), the standard deviation of the first timestep's noise, in pixel bins."""
    return float(np.sqrt(np.asarray(arm.schedule.beta[0], np.float64)) / pixel_bin(results.levels))


# Training


def training_loss(results: Results) -> str:
    """Draw the training loss against the step: thick lines for means, thin lines for seeds."""

    def draw(axis: "Axes") -> None:
        curves = []
        for i, arm, style in _back_to_front(results):
            thin = _line(i, style) | {"linewidth": 0.6, "alpha": 0.45, "linestyle": "solid"}
            for job in arm.jobs:
                curves.append(_thinned(job.steps, job.losses))
                if len(arm.jobs) > 1:
                    tag_with_arm(axis.plot(*curves[-1], **thin), i)
            tag_with_arm(axis.plot(*_thinned(*mean_losses(arm)), **_line(i, style)), i)
        if all((losses > 0).all() for _, losses in curves):
            axis.set_yscale("log")
            _settled(axis, curves)
            set_logarithmic_ticks(axis.yaxis)
        set_step_ticks(axis.xaxis)
        axis.set(xlabel="training step", ylabel="loss")

    ends = {arm.name: mean_losses(arm)[1] for arm in results.arms}
    descriptions = ", ".join(f"{name}: {end[-1]:.4g}" for name, end in ends.items() if len(end))
    text = f"Training loss against the step, by arm, means over seeds. At the end {descriptions}."
    return create_svg("training_loss", text, draw)


def _settled(axis: "Axes", curves: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Fit the logarithmic y axis to the losses after the first ``UNSETTLED_SHARE`` of training."""
    last = max((steps[-1] for steps, _ in curves if len(steps)), default=1)
    settled = [losses[steps >= UNSETTLED_SHARE * last] for steps, losses in curves]
    values = np.concatenate([*settled, np.zeros(0)])
    values = values[np.isfinite(values)]
    if len(values) and 0 < values.min() < values.max():
        room = (values.max() / values.min()) ** 0.06
        axis.set_ylim(values.min() / room, values.max() * room)


def mean_losses(arm: ArmScores) -> tuple[np.ndarray, np.ndarray]:
    """The steps at which all seeds have a record, and the mean of their losses there."""
    common = arm.jobs[0].steps
    for job in arm.jobs[1:]:
        common = np.intersect1d(common, job.steps)
    losses = np.array([job.losses[np.isin(job.steps, common)] for job in arm.jobs], np.float64)
    return np.asarray(common), losses.mean(axis=0)


def _thinned(steps: np.ndarray, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Average neighbouring points, so that at most ``PLOTTED_POINTS`` points are left."""
    losses = np.asarray(losses, np.float64)
    if len(steps) <= PLOTTED_POINTS:
        return steps, losses
    starts = np.linspace(0, len(steps), PLOTTED_POINTS + 1).astype(int)[:-1]
    sizes = np.diff([*starts, len(steps)])
    steps, losses = (np.add.reduceat(values, starts) / sizes for values in (steps, losses))
    return steps, losses


# The bound and the network's error, by log SNR


def density(results: Results) -> str:
    """Draw bits/dim per unit of log SNR: the area below a curve is the sum of L_1 to L_{T-1}."""

    def draw(axis: "Axes") -> None:
        _stairs(results, axis, _of_seeds(results, lambda job: job.density))
        axis.set(ylabel="bits/dim per unit of log SNR")
        axis.set_ylim(bottom=0)
        _from_data_to_noise(results, axis)

    text = f"Bits/dim per unit of log SNR, by arm. {_highest(results, lambda job: job.density)}"
    return create_svg("density", text, draw)


def density_difference(results: Results) -> str:
    """Draw the difference of ``density`` between each arm and the reference arm."""
    densities = _of_seeds(results, lambda job: job.density)
    of_reference = densities[reference_index(results)]

    def draw(axis: "Axes") -> None:
        _stairs(results, axis, [values - of_reference for values in densities])
        axis.set(ylabel=f"minus that of {reference_name(results)}")
        _from_data_to_noise(results, axis)

    text = (
        "Bits/dim per unit of log SNR minus those of the reference arm: an arm is better where"
        " its curve is below zero."
    )
    return create_svg("density_difference", text, draw)


def eps_error(results: Results) -> str:
    """Draw the mean squared error of eps against log SNR."""
    errors = _of_seeds(results, lambda job: job.eps_error)

    def draw(axis: "Axes") -> None:
        _stairs(results, axis, errors)
        axis.set(ylabel="mean squared error of ε")
        drawn = np.concatenate(errors)
        if (drawn[np.isfinite(drawn)] > 0).any():
            axis.set_yscale("log")
            set_logarithmic_ticks(axis.yaxis)
        _from_data_to_noise(results, axis)

    text = (
        "Mean squared error of the predicted noise eps against log SNR, by arm; gaps where an arm"
        f" has no timestep. {_highest(results, lambda job: job.eps_error)}"
    )
    return create_svg("eps_error", text, draw)


def eps_error_ratio(results: Results) -> str:
    """Draw the mean squared error of eps divided by that of the reference arm."""
    errors = _of_seeds(results, lambda job: job.eps_error)
    of_reference = errors[reference_index(results)]
    of_reference = np.where(of_reference > 0, of_reference, np.nan)

    def draw(axis: "Axes") -> None:
        _stairs(results, axis, [values / of_reference for values in errors])
        axis.set(ylabel=f"divided by that of {reference_name(results)}")
        _from_data_to_noise(results, axis)

    text = (
        "Mean squared error of the predicted noise eps divided by that of the reference arm,"
        " against log SNR: an arm is better where its curve is below one."
    )
    return create_svg("eps_error_ratio", text, draw)


def _of_seeds(
    results: Results, column: Callable[[JobScores], np.ndarray]
) -> list[Float[np.ndarray, " bins"]]:
    """The mean over the finite values of the seeds, for each arm; nan in bins without a value."""
    means = []
    for arm in results.arms:
        values = np.stack([column(job) for job in arm.jobs]).astype(np.float64)
        has = np.isfinite(values)
        count = has.sum(axis=0)
        total = np.where(has, values, 0).sum(axis=0)
        means.append(np.where(count > 0, total / np.maximum(count, 1), np.nan))
    return means


def _stairs(results: Results, axis: "Axes", values: list[Float[np.ndarray, " bins"]]) -> None:
    """Draw the values of each arm in bins of log SNR, with gaps at bins without a finite value."""
    for i, _, style in _back_to_front(results):
        line = _line(i, style)
        line["edgecolor"] = line.pop("color")
        # One patch cannot have a gap, so every run of finite bins is a patch of its own.
        for first, last in _runs(np.isfinite(values[i])):
            edges = results.edges[first : last + 1]
            tag_with_arm([axis.stairs(values[i][first:last], edges, baseline=None, **line)], i)
    axis.autoscale_view()


def _runs(has: np.ndarray) -> list[tuple[int, int]]:
    """The start and the end (exclusive) of each run of True."""
    steps = np.diff(np.concatenate([[False], has, [False]]).astype(int))
    return list(zip(np.flatnonzero(steps == 1).tolist(), np.flatnonzero(steps == -1).tolist()))


def _from_data_to_noise(results: Results, axis: "Axes") -> None:
    """Let log SNR decrease from left to right, as it does with the timestep."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_xlim(results.edges[-1], results.edges[0])
    axis.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: with_minus(f"{value:g}")))
    axis.set_xlabel("log SNR, from data to noise")


def _highest(results: Results, column: Callable[[JobScores], np.ndarray]) -> str:
    """A sentence that says where the reference arm has its highest value."""
    values = dict(zip((arm.name for arm in results.arms), _of_seeds(results, column)))
    mean = values[results.reference]
    if not np.isfinite(mean).any():
        return f"{results.reference} has no finite values."
    k = int(np.nanargmax(mean))
    low, high = results.edges[k : k + 2]
    return (
        f"{results.reference} has its highest value, {mean[k]:.3g}, at log SNR"
        f" {low:.3g} to {high:.3g}."
    )


def terms(results: Results) -> str:
    """Draw the terms of the bound as bars, each term on its own axis."""
    names = list(results.arms[0].jobs[0].terms)
    means = {
        name: [float(np.mean([job.terms[name] for job in arm.jobs])) for arm in results.arms]
        for name in names
    }

    def draw(*axes: "Axes") -> None:
        for k, (axis, name) in enumerate(zip(axes, names)):
            for row, mean in enumerate(means[name]):
                bar = axis.barh(row, mean, height=0.58, color=colour_of_arm(row))
                tag_with_arm(bar.patches, row)
                axis.annotate(
                    short_number(mean),
                    (mean if math.isfinite(mean) else 0, row),
                    (3, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=FONT_POINTS - 2,
                )
            finite = [abs(mean) for mean in means[name] if math.isfinite(mean)]
            # Twice the longest bar leaves room for its number.
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
    return create_svg("terms", text + ".", draw, height=_rows_height(results), columns=len(names))


# Scores of arms


def scores_of_arms(results: Results, name: str) -> str:
    """Draw a score of each arm with its interval, and a small dot for each seed."""
    kind = SCORES[name]
    means = [arm.scores[name].mean for arm in results.arms]

    def draw(axis: "Axes") -> None:
        _along(results, axis, means, [_per_seed(arm, name) for arm in results.arms])
        _label_values(results, axis, kind.heading)

    order = sorted(zip(results.arms, means), key=lambda pair: pair[1].value)
    (lowest, low), (highest, high) = order[0], order[-1]
    text = (
        f"{kind.heading.capitalize()}, {kind.unit}, of each arm: lowest at {lowest.name},"
        f" {describe_interval(low)}, highest at {highest.name}, {describe_interval(high)}."
    )
    return create_svg(f"{name}_of_arms", text, draw, height=_scores_height(results))


def differences_of_arms(results: Results, name: str) -> str:
    """Draw the paired difference of a score between each arm and the reference arm."""
    kind = SCORES[name]
    exact = Interval(0.0, 0.0, 0.0)
    differences = [arm.scores[name].difference or exact for arm in results.arms]
    of_reference = _per_seed(results.arms[reference_index(results)], name)
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
    arms_by_side = "; ".join(
        f"{side} zero: {', '.join(arms) or 'none'}" for side, arms in sides.items()
    )
    text = (
        f"{kind.heading.capitalize()}, {kind.unit}, of each arm minus that of the reference arm"
        f" {results.reference}. Intervals {arms_by_side}."
    )
    return create_svg(f"{name}_differences", text, draw, height=_scores_height(results))


def _per_seed(arm: ArmScores, name: str) -> Float[np.ndarray, " seeds"]:
    return np.array([score_of_job(job, name) for job in arm.jobs])


def _along(
    results: Results,
    axis: "Axes",
    intervals: list[Interval],
    seeds: list[np.ndarray],
    hollow: Sequence[int] = (),
) -> None:
    """Draw the interval of each arm: evenly spaced along x if a number is swept, else in rows."""
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
            bar = {"color": dot["color"], "linewidth": WIDTHS[i == reference_index(results)]}
            tag_with_arm(plot([place, place], ends, solid_capstyle="butt", **bar), i)
        if i in hollow:
            dot |= {"markerfacecolor": SURFACE, "markeredgewidth": 1.6}
        tag_with_arm(plot(place, interval.value, **dot), i)
        small = {"marker": "o", "markersize": 3, "markeredgewidth": 0, "linestyle": "none"}
        beside = np.full(len(of_seeds), place + (0.22 if is_swept else -0.3))
        if len(of_seeds) > 1:
            tag_with_arm(plot(beside, of_seeds, color=dot["color"], alpha=0.75, **small), i)
    labels = arm_labels(results)
    names = [labels[i] for i in np.argsort(places)]
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


def _scores_height(results: Results) -> int:
    return HEIGHT if results.swept is not None else _rows_height(results)


# Arms in all plots


def _back_to_front(results: Results) -> list[tuple[int, ArmScores, Style]]:
    """The arms in drawing order: the thick line of the reference arm is drawn first."""
    entries = list(zip(range(len(results.arms)), results.arms, create_styles(results)))
    return sorted(entries, key=lambda entry: entry[1].name != results.reference)


def _line(i: int, style: Style) -> dict[str, Any]:
    linestyle = (0, style.dashes) if style.dashes else "solid"
    return {"color": colour_of_arm(i), "linewidth": style.width, "linestyle": linestyle}


def _dot(results: Results, i: int) -> dict[str, Any]:
    is_reference = i == reference_index(results)
    return {
        "color": colour_of_arm(i),
        "marker": "D" if is_reference else "o",
        "markersize": 7 if is_reference else 6.5,
        "linestyle": "none",
        "zorder": 3,
    }


def _arm_rows(results: Results, axis: "Axes", labelled: bool = True) -> None:
    """Give every arm a row, from top to bottom as in the table."""
    names = arm_labels(results) if labelled else [""] * len(results.arms)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.yaxis.grid(False)
    if labelled and results.swept is not None:
        axis.set_ylabel(results.swept)


def _rows_height(results: Results) -> int:
    lines = max(tick.count("\n") for tick in arm_labels(results)) + 1
    return max(HEIGHT, 70 + max(ROW_POINTS, 16 * lines) * len(results.arms))
