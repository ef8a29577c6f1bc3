"""The sections of a report that contain plots, each plot with its title and caption."""

import math
from typing import NamedTuple

from markupsafe import Markup

from diffusion_jax.ablation.report import figures
from diffusion_jax.ablation.report.arms import reference_name
from diffusion_jax.ablation.results import SCORES, Results

BETA, ALPHA_BAR = Markup("β<sub>t</sub>"), Markup("ᾱ<sub>t</sub>")
MIDDLE, DECODER = Markup("L<sub>1</sub> to L<sub>T−1</sub>"), Markup("L<sub>0</sub>")


class Panel(NamedTuple):
    """One plot with its title and caption."""

    title: str
    caption: str | Markup
    svg: Markup


class Section(NamedTuple):
    """A group of panels. If it has no legend, the axes of its plots name the arms."""

    id: str
    heading: str
    about: str
    has_legend: bool
    panels: list[Panel]


def create_sections(results: Results) -> list[Section]:
    """Create all sections with plots, in the order of the page."""
    return [
        _scores(results),
        _by_log_snr(results),
        _schedules(results),
        _terms_and_training(results),
    ]


def _scores(results: Results) -> Section:
    about = "Lower is better for every score."
    if results.swept is not None:
        about += f" The values of {results.swept} are sorted and evenly spaced on the axis."
    return Section(
        id="scores",
        heading="Scores of the arms",
        about=about,
        has_legend=results.swept is None,
        panels=[panel for name in SCORES for panel in _score(results, name)],
    )


def _score(results: Results, name: str) -> list[Panel]:
    """The panels of a score: its value for every arm and, with several arms, the differences."""
    heading, unit = SCORES[name].heading, SCORES[name].unit
    title = f"{heading[0].upper()}{heading[1:]}"
    has_ends = any(math.isfinite(arm.scores[name].mean.high) for arm in results.arms)
    marks = ", its 95 % interval" * has_ends + ", a small dot for each seed" * _has_seeds(results)
    panels = [
        Panel(
            title=title,
            caption=f"{unit[0].upper()}{unit[1:]}: the mean{marks}.",
            svg=Markup(figures.scores_of_arms(results, name)),
        )
    ]
    if _has_others(results):
        hollow = "; the marker is hollow if the interval contains zero"
        panels.append(
            Panel(
                title=f"{title}: difference to {reference_name(results)}",
                caption=f"Paired by seed{hollow * has_ends}.",
                svg=Markup(figures.differences_of_arms(results, name)),
            )
        )
    return panels


def _by_log_snr(results: Results) -> Section:
    """The bound and the error of eps; with several arms, also compared with the reference arm."""
    panels = [
        Panel(
            title="Bits by log SNR",
            caption=Markup(
                "Bits/dim per unit of log SNR, means over seeds. The area below a curve is the"
                " sum of {}, without {}."
            ).format(MIDDLE, DECODER),
            svg=Markup(figures.density(results)),
        ),
        Panel(
            title="Error of the predicted noise",
            caption="Mean squared error of ε, means over seeds. A curve has gaps where its arm has"
            " no timestep.",
            svg=Markup(figures.eps_error(results)),
        ),
    ]
    if _has_others(results):
        compared = [
            Panel(
                title="Difference of the bits",
                caption=Markup(
                    "Bits of an arm minus those of the reference arm: lower is better. At the left"
                    " end, where an arm may have no timestep, its bits are in {}."
                ).format(DECODER),
                svg=Markup(figures.density_difference(results)),
            ),
            Panel(
                title="Ratio of the errors",
                caption="Error of an arm divided by that of the reference arm: lower is better.",
                svg=Markup(figures.eps_error_ratio(results)),
            ),
        ]
        panels = [panel for pair in zip(panels, compared) for panel in pair]
    return Section(
        id="log-snr",
        heading="By log SNR",
        about="All schedules share the axis of log SNR. The same timestep has another noise level"
        " under every schedule, so arms are not compared by timestep.",
        has_legend=True,
        panels=panels,
    )


def _schedules(results: Results) -> Section:
    panels = [
        Panel(
            title="Noise of each timestep",
            caption=Markup(
                "{0} on logarithmic axes; on the dotted line √{0} is one pixel bin."
            ).format(BETA),
            svg=Markup(figures.beta(results)),
        ),
        Panel(
            title="Noise of the first timestep",
            caption=f"√β₁ in pixel bins; a bin is 2/{results.levels - 1}, the distance between two"
            " grey levels.",
            svg=Markup(figures.root_beta_1(results)),
        ),
        Panel(
            title="Remaining signal",
            caption=Markup("{}, the share of the signal's variance in x<sub>t</sub>.").format(
                ALPHA_BAR
            ),
            svg=Markup(figures.alpha_bar(results)),
        ),
        Panel(
            title="Signal-to-noise ratio",
            caption=Markup(
                "Natural log of {0} / (1 − {0}); on the dotted line signal and noise are equal."
            ).format(ALPHA_BAR),
            svg=Markup(figures.log_snr(results)),
        ),
    ]
    return Section(id="schedules", heading="Schedules", about="", has_legend=True, panels=panels)


def _terms_and_training(results: Results) -> Section:
    seeds = ", with a thin line for each seed" * _has_seeds(results)
    panels = [
        Panel(
            title="Terms of the bound",
            caption="Bits/dim, means over seeds; each term has its own scale.",
            svg=Markup(figures.terms(results)),
        ),
        Panel(
            title="Training loss",
            caption=f"Means over seeds{seeds}. The axis may leave out the first steps. The losses"
            " of two schedules are not comparable, because each averages over its own noise levels:"
            " compare the errors by log SNR.",
            svg=Markup(figures.training_loss(results)),
        ),
    ]
    return Section(
        id="terms", heading="Terms and training", about="", has_legend=True, panels=panels
    )


def _has_others(results: Results) -> bool:
    return len(results.arms) > 1


def _has_seeds(results: Results) -> bool:
    return any(len(arm.jobs) > 1 for arm in results.arms)
