"""The report of an ablation: one page that needs nothing else, and a table for other tools."""

import base64
import csv
import io
import math
import os
import pathlib
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt8

from diffusion_jax.ablation.comparison import Interval, excludes_zero, not_told_apart
from diffusion_jax.ablation.report import figures
from diffusion_jax.ablation.results import SCORES, ArmScores, JobScores, Results, Score
from diffusion_jax.drawing.images import image_grid

if TYPE_CHECKING:
    from markupsafe import Markup

# So many of the first samples stand in a row: more would be too small to see.
ROW_PICTURES = 16

# The browser enlarges them further, and keeps pixels square; the line between them is not wider.
PICTURE_SCALE = 2
DASH = "–"  # where there is no number
MARKS = {"best": "◆", "better": "▼", "worse": "▲"}  # beside the word, never alone


def write_report(results: Results, path: pathlib.Path) -> None:
    """Write the page, whole or not at all. It asks for no file or address but its own."""
    # Only a report needs it.
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = _breakable
    page = environment.get_template("report.html.jinja").render(_page(results))
    _write(path, page)


def write_csv(results: Results, path: pathlib.Path) -> None:
    """Write one row for each arm and seed with all its figures, whole or not at all."""
    rows = [_row(results, arm, job) for arm in results.arms for job in arm.jobs]
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    _write(path, text.getvalue())


def _write(path: pathlib.Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    os.replace(temporary, path)


def _row(results: Results, arm: ArmScores, job: JobScores) -> dict[str, Any]:
    return {
        "arm": arm.name,
        **{name: arm.fields.get(name, "") for name in _fields(results)},
        "seed": job.seed,
        "config_hash": job.config_hash,
        "step": job.step,
        "training_loss": float(job.losses[-1]) if len(job.losses) else math.nan,
        "loss": float(job.loss),
        "bits_per_dim": figures.figure_of_job(job, "bits_per_dim"),
        **{name: float(bits) for name, bits in job.terms.items()},
        "quality": float(job.quality.value),
        "quality_low": float(job.quality.low),
        "quality_high": float(job.quality.high),
        "sqrt_beta_1": float(np.sqrt(np.asarray(arm.schedule.beta[0], np.float64))),
        "alpha_bar_T": float(arm.schedule.alpha_bar[-1]),
        "folder": job.folder,
    }


def _fields(results: Results) -> list[str]:
    return list(dict.fromkeys(name for arm in results.arms for name in arm.fields))


# What the page says


def _page(results: Results) -> dict[str, Any]:
    """All that the template fills in."""
    styles = figures.styles(results)
    fields = _fields(results)
    num_seeds = max(len(arm.jobs) for arm in results.arms)
    num_images = max(len(job.bits) for arm in results.arms for job in arm.jobs)
    num_compared = len(SCORES) * (len(results.arms) - 1)
    return {
        "results": results,
        "fields": fields,
        "heading": f"Ablation of {', '.join(fields) or 'one arm'} on {results.dataset}",
        "levels": results.levels,
        "num_seeds": num_seeds,
        "num_images": num_images,
        "num_compared": num_compared,
        "num_by_chance": f"{num_compared / 20:.1f}",
        "has_reference": len(results.arms) > 1,
        "reference": figures.reference_name(results),
        "findings": [_finding(results, name) for name in SCORES],
        "columns": [{"heading": heading, "unit": unit} for heading, unit in SCORES.values()],
        "rows": _table(results),
        "arms": [
            {
                "name": arm.name,
                "is_reference": arm.name == results.reference,
                "title": arm.title,
                "fields": [(name, _plain(value)) for name, value in arm.fields.items()],
                "style": style,
                "dashes": " ".join(f"{dash * style.width:g}" for dash in style.dashes),
            }
            for arm, style in zip(results.arms, styles)
        ],
        "plots": _plots(results),
        "samples": _samples(results),
        "distance": {"frechet": "Fréchet"}.get(results.distance, results.distance),
        "marks": MARKS,
        "dash": DASH,
    }


def _breakable(name: str) -> "Markup":
    """A name whose line may end between its parts: "schedule.", "s=", "0.008,"."""
    from markupsafe import Markup, escape

    parts = re.split(r"(?<=[,=])|(?<=\.)(?=[A-Za-z])", name)
    return Markup("<wbr>").join(escape(part) for part in parts)


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _finding(results: Results, name: str) -> dict[str, Any]:
    """What is known of a figure: the lowest arm, and which arms may be as low."""
    heading, unit = SCORES[name]
    finding: dict[str, Any] = {"heading": heading, "unit": unit, "lowest": None}
    values = {
        arm.name: np.stack([job.bits for job in arm.jobs]).astype(np.float64)
        if name == "bits_per_dim"
        else np.array([figures.figure_of_job(job, name) for job in arm.jobs])
        for arm in results.arms
    }
    if not all(np.isfinite(of_arm).all() for of_arm in values.values()):
        return finding
    if all(of_arm.size > 1 for of_arm in values.values()):
        lowest, equal = not_told_apart(values)
    else:
        lowest = min(values, key=lambda name: float(values[name].mean()))
        equal = _equal_to_reference(results, name) if lowest == results.reference else None
    figure = next(arm for arm in results.arms if arm.name == lowest).scores[name]
    all_means = [arm.scores[name].mean for arm in results.arms]
    finding |= {
        "lowest": lowest,
        "value": _interval(figure.mean, figures.decimals(all_means)),
        "is_reference": lowest == results.reference,
        "equal": None if equal is None else [arm.name for arm in results.arms if arm.name in equal],
        "others": len(results.arms) - 1,
        "difference": None,
        "excludes_zero": False,
    }
    if figure.difference is not None:
        finding["excludes_zero"] = excludes_zero(figure.difference)
        finding["difference"] = _interval(
            figure.difference, _difference_decimals(results, name), sign="+"
        )
    return finding


def _equal_to_reference(results: Results, name: str) -> list[str]:
    """The arms whose difference to the reference arm may be none."""
    differences = {arm.name: arm.scores[name].difference for arm in results.arms}
    return [arm for arm, found in differences.items() if found and not excludes_zero(found)]


def _table(results: Results) -> list[dict[str, Any]]:
    means = {
        name: figures.decimals([arm.scores[name].mean for arm in results.arms]) for name in SCORES
    }
    differences = {name: _difference_decimals(results, name) for name in SCORES}
    rows = []
    for arm, position in zip(results.arms, figures.swept_values(results)):
        root = figures.root_beta_1_in_bins(results, arm)
        alpha_bar = float(arm.schedule.alpha_bar[-1])
        rows.append(
            {
                "name": arm.name,
                "is_reference": arm.name == results.reference,
                "position": repr(position) if results.swept else arm.name,
                "cells": [
                    _cells(arm.scores[name], means[name], differences[name]) for name in SCORES
                ],
                "root": {"text": figures.short_number(root), "sort": repr(root)},
                "alpha_bar": {"text": figures.short_number(alpha_bar), "sort": repr(alpha_bar)},
            }
        )
    return rows


def _difference_decimals(results: Results, name: str) -> int:
    differences = [arm.scores[name].difference for arm in results.arms]
    return figures.decimals([difference for difference in differences if difference is not None])


def _cells(figure: Score, mean_decimals: int, difference_decimals: int) -> dict[str, Any]:
    difference = figure.difference
    return {
        "mark": figure.mark,
        "mean": _interval(figure.mean, mean_decimals),
        # The reference arm is at no distance from itself: it sorts between better and worse.
        "difference": None
        if difference is None
        else _interval(difference, difference_decimals, sign="+"),
    }


def _interval(interval: Interval, decimals: int, sign: str = "") -> dict[str, str | None]:
    """A number, the ends of its interval (None: they exclude nothing), and what it sorts by."""

    def text(value: float) -> str:
        if not math.isfinite(value):
            return DASH
        return f"{value:{sign}.{decimals}f}".replace("-", "−")

    is_known = math.isfinite(interval.low) and math.isfinite(interval.high)
    return {
        "text": text(interval.value),
        "ends": f"[{text(interval.low)}, {text(interval.high)}]" if is_known else None,
        "sort": repr(float(interval.value)) if math.isfinite(interval.value) else "",
    }


# Plots


def _plots(results: Results) -> list[dict[str, Any]]:
    """Groups of plots, each with its heading, what it shows, and a panel for each plot."""
    from markupsafe import Markup

    def panel(title: str, caption: "str | Markup", svg: str) -> dict[str, "str | Markup"]:
        return {"title": title, "caption": caption, "svg": Markup(svg)}

    beta, alpha_bar = Markup("β<sub>t</sub>"), Markup("ᾱ<sub>t</sub>")
    middle, decoder = Markup("L<sub>1</sub> to L<sub>T−1</sub>"), Markup("L<sub>0</sub>")

    has_others = len(results.arms) > 1
    many_seeds = any(len(arm.jobs) > 1 for arm in results.arms)
    bound = [
        panel(
            "Where the bits go",
            Markup(
                "Bits/dim per unit of log SNR, means over seeds. The area below a curve is the"
                " sum of {}; {} stands apart."
            ).format(middle, decoder),
            figures.density(results),
        )
    ]
    if has_others:
        bound.append(
            panel(
                "Where arms differ",
                Markup(
                    "The same, minus the reference arm: better below zero. Where one of the two"
                    " has no timestep, on the left, its bits are in {}."
                ).format(decoder),
                figures.density_difference(results),
            )
        )
    bound.append(
        panel(
            "Error of the predicted noise",
            "Mean squared error of ε, means over seeds; no line where an arm has no timestep.",
            figures.eps_error(results),
        )
    )
    if has_others:
        bound.append(
            panel(
                "Where the errors differ",
                "The same, divided by the reference arm's: better below one.",
                figures.eps_error_ratio(results),
            )
        )
    ends = [
        panel(
            "Terms of the bound",
            "Bits/dim, means over seeds; each term on a scale of its own.",
            figures.terms(results),
        ),
        panel(
            "Training loss",
            f"Means over seeds{', with a thin line for each seed' * many_seeds}. The first steps"
            " lie above. Another schedule's is another average: compare the errors by log SNR.",
            figures.training_loss(results),
        ),
    ]
    hollow = "; hollow where the interval holds zero"
    of_arms = []
    for name, (heading, unit) in SCORES.items():
        title = f"{heading[0].upper()}{heading[1:]}"
        has_ends = any(math.isfinite(arm.scores[name].mean.high) for arm in results.arms)
        drawn = ["its 95 % interval"] * has_ends + ["a small dot for each seed"] * many_seeds
        of_arms.append(
            panel(
                title,
                f"{unit[0].upper()}{unit[1:]}: the mean{''.join(', ' + what for what in drawn)}.",
                figures.figure_of_arms(results, name),
            )
        )
        if has_others:
            of_arms.append(
                panel(
                    f"{title}: difference to {figures.reference_name(results)}",
                    f"In pairs of equal seeds{hollow * has_ends}.",
                    figures.differences_of_arms(results, name),
                )
            )
    return [
        {
            "id": "figures",
            "heading": "Figures of the arms",
            "about": "Less is better in all of them."
            + (
                f" Values of {results.swept} stand at equal distances, whatever lies between them."
                if results.swept
                else ""
            ),
            "has_legend": results.swept is None,  # else the axis says which arm it is
            "panels": of_arms,
        },
        {
            "id": "log-snr",
            "heading": "By log SNR",
            "about": "On the axis that all schedules share: timesteps of two schedules are not"
            " alike, noise levels are.",
            "has_legend": True,
            "panels": bound,
        },
        {
            "id": "schedules",
            "heading": "Schedules",
            "about": "",
            "has_legend": True,
            "panels": [
                panel(
                    "Noise of each timestep",
                    Markup(
                        "{} on logarithmic axes; at the dotted line its root is one pixel bin."
                    ).format(beta),
                    figures.beta(results),
                ),
                panel(
                    "Noise of the first timestep",
                    f"√β₁ in pixel bins: one is 2/{results.levels - 1}, from a grey level to the"
                    " next.",
                    figures.root_beta_1(results),
                ),
                panel(
                    "Signal that is left",
                    Markup("{}, its share of the variance.").format(alpha_bar),
                    figures.alpha_bar(results),
                ),
                panel(
                    "Signal to noise",
                    Markup(
                        "Natural log of {0} / (1 − {0}); at the dotted line they are equal."
                    ).format(alpha_bar),
                    figures.log_snr(results),
                ),
            ],
        },
        {
            "id": "terms",
            "heading": "Terms and training",
            "about": "",
            "has_legend": True,
            "panels": ends,
        },
    ]


# Samples


def _samples(results: Results) -> list[dict[str, Any]]:
    """For each seed the first samples of every arm, one row of pictures each."""
    seeds = dict.fromkeys(job.seed for arm in results.arms for job in arm.jobs)
    return [
        {"seed": seed, "rows": list(_sample_rows(results, seed)), "labels": _numbers(results, seed)}
        for seed in seeds
    ]


def _numbers(results: Results, seed: int) -> list[int]:
    counts = [len(job.pictures) for arm in results.arms for job in arm.jobs if job.seed == seed]
    return list(range(1, min(max(counts), ROW_PICTURES) + 1))


def _sample_rows(results: Results, seed: int) -> Iterable[dict[str, Any]]:
    longest = len(_numbers(results, seed))
    for arm in results.arms:
        for job in arm.jobs:
            if job.seed == seed and len(job.pictures) > 0:
                pictures = job.pictures[:ROW_PICTURES]
                source, width, height = _data_uri(pictures)
                yield {
                    "arm": arm.name,
                    "is_reference": arm.name == results.reference,
                    "source": source,
                    "width": width,
                    "height": height,
                    "share": len(pictures) / longest,
                    "text": f"{len(pictures)} samples of {arm.name}, seed {seed}",
                }


def _data_uri(pictures: UInt8[np.ndarray, "n h w c"]) -> tuple[str, int, int]:
    image = image_grid(pictures, columns=len(pictures), scale=PICTURE_SCALE)
    png = io.BytesIO()
    image.save(png, format="png")
    return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}", *image.size
