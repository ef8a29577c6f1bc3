"""Write the report of an ablation: report.html, which needs no other file, and ablation.csv."""

import base64
import csv
import io
import math
import pathlib
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import UInt8
from markupsafe import Markup, escape

from diffusion_jax.ablation.comparison import excludes_zero, not_told_apart
from diffusion_jax.ablation.report.arms import create_styles, reference_name, swept_values
from diffusion_jax.ablation.report.figures import root_beta_1_in_bins
from diffusion_jax.ablation.report.formats import decimals, short_number, with_minus
from diffusion_jax.ablation.report.panels import create_sections
from diffusion_jax.ablation.results import (
    SCORES,
    ArmScores,
    JobScores,
    Results,
    Score,
    score_of_job,
    score_values,
)
from diffusion_jax.drawing.images import image_grid
from diffusion_jax.evaluation.interval import Interval
from diffusion_jax.runtime import files

ROW_PICTURES = 16  # the most samples in a row: more would be too small to see
PICTURE_SCALE = 2  # enlargement of a sample; the browser enlarges it further
DASH = "–"  # stands for a missing number
MARKS = {"best": "◆", "better": "▼", "worse": "▲"}  # shown beside the word


def write_report(results: Results, path: pathlib.Path) -> None:
    """Write report.html, which contains all its pictures, styles and scripts."""
    # Imported here, because training does not need jinja2.
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = _breakable
    page = environment.get_template("page.html.jinja").render(_page(results))
    files.replace_text(path, page)


def write_csv(results: Results, path: pathlib.Path) -> None:
    """Write ablation.csv: one row for each arm and seed, with all its scores."""
    rows = [_row(results, arm, job) for arm in results.arms for job in arm.jobs]
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    files.replace_text(path, text.getvalue())


def _row(results: Results, arm: ArmScores, job: JobScores) -> dict[str, Any]:
    return {
        "arm": arm.name,
        **{name: arm.fields.get(name, "") for name in _fields(results)},
        "seed": job.seed,
        "config_hash": job.config_hash,
        "step": job.step,
        "training_loss": float(job.losses[-1]) if len(job.losses) else math.nan,
        "loss": float(job.loss),
        "bits_per_dim": score_of_job(job, "bits_per_dim"),
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


# Text and table


def _page(results: Results) -> dict[str, Any]:
    """The variables of page.html.jinja."""
    styles = create_styles(results)
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
        "reference": reference_name(results),
        "findings": [_finding(results, name) for name in SCORES],
        "columns": list(SCORES.values()),
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
        "plots": create_sections(results),
        "samples": _samples(results),
        "distance": {"frechet": "Fréchet"}.get(results.distance, results.distance),
        "marks": MARKS,
        "dash": DASH,
    }


def _breakable(name: str) -> Markup:
    """A name that may break into lines after its parts: "schedule.", "s=", "0.008,"."""
    parts = re.split(r"(?<=[,=])|(?<=\.)(?=[A-Za-z])", name)
    return Markup("<wbr>").join(escape(part) for part in parts)


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _finding(results: Results, name: str) -> dict[str, Any]:
    """The parts of the sentences about a score: the lowest arm, and the arms that may equal it.

    "lowest" is None if a value is not finite. "equal" is None if the arms cannot be compared with
    the lowest one: with one number per arm, only the differences to the reference have intervals.
    """
    kind = SCORES[name]
    finding: dict[str, Any] = {"heading": kind.heading, "unit": kind.unit, "lowest": None}
    values = {arm.name: score_values(arm.jobs, name) for arm in results.arms}
    if not all(np.isfinite(of_arm).all() for of_arm in values.values()):
        return finding
    equal: list[str] | None
    if all(of_arm.size > 1 for of_arm in values.values()):
        lowest, equal = not_told_apart(values)
    else:
        lowest = min(values, key=lambda arm: float(values[arm].mean()))
        equal = _equal_to_reference(results, name) if lowest == results.reference else None
    score = next(arm for arm in results.arms if arm.name == lowest).scores[name]
    all_means = [arm.scores[name].mean for arm in results.arms]
    finding |= {
        "lowest": lowest,
        "value": _interval(score.mean, decimals(all_means)),
        "is_reference": lowest == results.reference,
        "equal": None if equal is None else [arm.name for arm in results.arms if arm.name in equal],
        "others": len(results.arms) - 1,
        "difference": None,
        "excludes_zero": False,
    }
    if score.difference is not None:
        digits = _difference_decimals(results, name)
        finding["excludes_zero"] = excludes_zero(score.difference)
        finding["difference"] = _interval(score.difference, digits, sign="+")
    return finding


def _equal_to_reference(results: Results, name: str) -> list[str]:
    """The arms whose difference to the reference arm has an interval that contains zero."""
    differences = {arm.name: arm.scores[name].difference for arm in results.arms}
    return [
        arm
        for arm, difference in differences.items()
        if difference is not None and not excludes_zero(difference)
    ]


def _table(results: Results) -> list[dict[str, Any]]:
    """The rows of the table of arms."""
    means = {name: decimals([arm.scores[name].mean for arm in results.arms]) for name in SCORES}
    differences = {name: _difference_decimals(results, name) for name in SCORES}
    rows = []
    for arm, position in zip(results.arms, swept_values(results)):
        root = root_beta_1_in_bins(results, arm)
        alpha_bar = float(arm.schedule.alpha_bar[-1])
        rows.append(
            {
                "name": arm.name,
                "is_reference": arm.name == results.reference,
                "position": repr(position) if results.swept else arm.name,
                "cells": [
                    _cells(arm.scores[name], means[name], differences[name]) for name in SCORES
                ],
                "root": {"text": short_number(root), "sort": repr(root)},
                "alpha_bar": {"text": short_number(alpha_bar), "sort": repr(alpha_bar)},
            }
        )
    return rows


def _difference_decimals(results: Results, name: str) -> int:
    differences = [arm.scores[name].difference for arm in results.arms]
    return decimals([difference for difference in differences if difference is not None])


def _cells(score: Score, mean_decimals: int, difference_decimals: int) -> dict[str, Any]:
    """The cells of a score in a row of the table."""
    difference = score.difference
    return {
        "mark": score.mark,
        "mean": _interval(score.mean, mean_decimals),
        "difference": None
        if difference is None
        else _interval(difference, difference_decimals, sign="+"),
    }


def _interval(interval: Interval, digits: int, sign: str = "") -> dict[str, str | None]:
    """A number, the ends of its interval (None if infinite) and its sorting key, as texts."""

    def text(value: float) -> str:
        if not math.isfinite(value):
            return DASH
        return with_minus(f"{value:{sign}.{digits}f}")

    is_known = math.isfinite(interval.low) and math.isfinite(interval.high)
    return {
        "text": text(interval.value),
        "ends": f"[{text(interval.low)}, {text(interval.high)}]" if is_known else None,
        "sort": repr(float(interval.value)) if math.isfinite(interval.value) else "",
    }


# Samples


def _samples(results: Results) -> list[dict[str, Any]]:
    """A grid for each seed: the first samples of every arm, with one row for each arm."""
    seeds = dict.fromkeys(job.seed for arm in results.arms for job in arm.jobs)
    return [
        {"seed": seed, "rows": list(_sample_rows(results, seed)), "labels": _numbers(results, seed)}
        for seed in seeds
    ]


def _numbers(results: Results, seed: int) -> list[int]:
    """The numbers above the columns of a grid, counted from 1."""
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
    """A row of pictures as the data URI of one PNG, with its width and height in pixels."""
    image = image_grid(pictures, columns=len(pictures), scale=PICTURE_SCALE)
    png = io.BytesIO()
    image.save(png, format="png")
    return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}", *image.size
