"""The sections of a report that hold plots: each plot with its title and caption."""

import math
from typing import NamedTuple

from markupsafe import Markup

from diffusion_jax.ablation.report import figures
from diffusion_jax.ablation.report.arms import reference_name
from diffusion_jax.ablation.results import SCORES, Results

BETA, ALPHA_BAR = Markup("β<sub>t</sub>"), Markup("ᾱ<sub>t</sub>")
MIDDLE, DECODER = Markup("L<sub>1</sub> to L<sub>T−1</sub>"), Markup("L<sub>0</sub>")


class Panel(NamedTuple):
    """One plot."""

    title: str
    caption: str | Markup
    svg: Markup


class Section(NamedTuple):
    """A group of panels. Without a legend, an axis of its plots names the arms."""

    id: str
    heading: str
    about: str
    has_legend: bool
    panels: list[Panel]


def create_sections(results: Results) -> list[Section]:
    """All sections with plots, in the order of the page."""
    return [
        _scores(results),
        _by_log_snr(results),
        _schedules(results),
        _terms_and_training(results),
    ]


def _scores(results: Results) -> Section:
    about = "Less is better in all of them."
    if results.swept is not None:
        about += f" Values of {results.swept} stand at equal distances, whatever lies between them."
    return Section(
        id="figures",
        heading="Figures of the arms",
        about=about,
        has_legend=results.swept is None,
        panels=[panel for name in SCORES for panel in _score(results, name)],
    )


def _score(results: Results, name: str) -> list[Panel]:
    """A score of every arm, and its differences to the reference arm if there are other arms."""
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
        hollow = "; hollow where the interval holds zero"
        panels.append(
            Panel(
                title=f"{title}: difference to {reference_name(results)}",
                caption=f"In pairs of equal seeds{hollow * has_ends}.",
                svg=Markup(figures.differences_of_arms(results, name)),
            )
        )
    return panels


def _by_log_snr(results: Results) -> Section:
    """The bound and the network's error; each is also compared if there are other arms."""
    panels = [
        Panel(
            title="Where the bits go",
            caption=Markup(
                "Bits/dim per unit of log SNR, means over seeds. The area below a curve is the"
                " sum of {}; {} stands apart."
            ).format(MIDDLE, DECODER),
            svg=Markup(figures.density(results)),
        ),
        Panel(
            title="Error of the predicted noise",
            caption="Mean squared error of ε, means over seeds; no line where an arm has no"
            " timestep.",
            svg=Markup(figures.eps_error(results)),
        ),
    ]
    if _has_others(results):
        compared = [
            Panel(
                title="Where arms differ",
                caption=Markup(
                    "The same, minus the reference arm: better below zero. Where one of the two"
                    " has no timestep, on the left, its bits are in {}."
                ).format(DECODER),
                svg=Markup(figures.density_difference(results)),
            ),
            Panel(
                title="Where the errors differ",
                caption="The same, divided by the reference arm's: better below one.",
                svg=Markup(figures.eps_error_ratio(results)),
            ),
        ]
        panels = [panel for pair in zip(panels, compared) for panel in pair]
    return Section(
        id="log-snr",
        heading="By log SNR",
        about="On the axis that all schedules share: timesteps of two schedules are not"
        " alike, noise levels are.",
        has_legend=True,
        panels=panels,
    )


def _schedules(results: Results) -> Section:
    panels = [
        Panel(
            title="Noise of each timestep",
            caption=Markup(
                "{} on logarithmic axes; at the dotted line its root is one pixel bin."
            ).format(BETA),
            svg=Markup(figures.beta(results)),
        ),
        Panel(
            title="Noise of the first timestep",
            caption=f"√β₁ in pixel bins: one is 2/{results.levels - 1}, from a grey level to the"
            " next.",
            svg=Markup(figures.root_beta_1(results)),
        ),
        Panel(
            title="Signal that is left",
            caption=Markup("{}, its share of the variance.").format(ALPHA_BAR),
            svg=Markup(figures.alpha_bar(results)),
        ),
        Panel(
            title="Signal to noise",
            caption=Markup(
                "Natural log of {0} / (1 − {0}); at the dotted line they are equal."
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
            caption="Bits/dim, means over seeds; each term on a scale of its own.",
            svg=Markup(figures.terms(results)),
        ),
        Panel(
            title="Training loss",
            caption=f"Means over seeds{seeds}. The first steps lie above. Another schedule's is"
            " another average: compare the errors by log SNR.",
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
