"""Read the results of an ablation from the folders of its jobs."""

import csv
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from diffusion_jax.ablation import comparison
from diffusion_jax.ablation.jobs import Ablation, Job, folder_of
from diffusion_jax.ablation.results import (
    SCORES,
    ArmScores,
    JobScores,
    Results,
    Score,
    compare,
    score_values,
)
from diffusion_jax.data.dataset import Dataset
from diffusion_jax.data.pixels import from_uint8, to_x_0
from diffusion_jax.diffusion.bound import stratify
from diffusion_jax.diffusion.schedules.schedule import Schedule
from diffusion_jax.errors import RunError
from diffusion_jax.evaluation.classifier import Classifier
from diffusion_jax.evaluation.classifier import features as classifier_features
from diffusion_jax.evaluation.distances import paired_difference, with_interval
from diffusion_jax.evaluation.interval import Interval

BIN = 1.0  # width of a bin of log SNR
SHOWN_IMAGES = 16  # samples of each job that a report shows


class About(NamedTuple):
    """How the scores were made: the command, versions, facts and notes of a report."""

    command: str
    versions: dict[str, str]
    facts: dict[str, str]
    notes: tuple[str, ...]


def collect(
    ablation: Ablation, dataset: Dataset, classifier: Classifier, path: pathlib.Path, about: About
) -> Results:
    """Read the scores of all jobs from their folders below ``path``, and compare the arms.

    Raises:
        RunError: the schedules of the arms have no log SNR in common.
    """
    all_schedules = [job.experiment.schedule for job in ablation.jobs]
    assert dataset.test is not None  # check_data has required it
    assert dataset.levels is not None
    real = to_x_0(dataset.test.images[:], dataset.levels)
    reading = _Reading(
        path=path,
        edges=bin_edges(all_schedules),
        common=common_range(all_schedules),
        distance=ablation.distance,
        classifier=classifier,
        real=classifier_features(classifier, real),
    )
    by_arm: dict[str, list[JobScores]] = {}
    features: dict[str, np.ndarray] = {}  # by arm, of the samples of its last seed
    for job in ablation.jobs:
        scores, features[job.arm.name] = _read(job, reading)
        by_arm.setdefault(job.arm.name, []).append(scores)
    num_seeds = len(by_arm[ablation.reference])
    compared = _compare_arms(by_arm, ablation.reference)
    if num_seeds == 1:  # the interval is over pairs of samples, not over seeds
        means = {name: jobs[0].quality for name, jobs in by_arm.items()}
        compared["quality"] = _compare_samples(means, features, reading, ablation.reference)
    arms = tuple(
        ArmScores(
            name=job.arm.name,
            fields=job.arm.fields,
            title=job.experiment.schedule_title,
            schedule=job.experiment.schedule,
            jobs=tuple(by_arm[job.arm.name]),
            scores={score: of_arms[job.arm.name] for score, of_arms in compared.items()},
        )
        for job in ablation.jobs[: len(by_arm)]  # the jobs of the first seed: one for each arm
    )
    return Results(
        dataset=dataset.name,
        levels=dataset.levels,
        reference=ablation.reference,
        swept=_swept(arms),
        arms=arms,
        edges=reading.edges,
        distance=ablation.distance,
        command=about.command,
        versions=about.versions,
        facts=about.facts,
        notes=(*about.notes, *_notes(num_seeds, dataset, reading.common)),
    )


def _compare_arms(
    by_arm: dict[str, list[JobScores]], reference: str
) -> dict[str, dict[str, Score]]:
    """Every score of every arm, with its intervals over the seeds."""
    return {
        score: compare(
            {name: score_values(jobs, score) for name, jobs in by_arm.items()}, reference
        )
        for score in SCORES
    }


def bin_edges(all_schedules: Sequence[Schedule]) -> Float[np.ndarray, " edges"]:
    """The edges of bins that contain every finite log SNR of every schedule.

    The edges are multiples of ``BIN``.
    """
    log_snr = np.concatenate([np.asarray(schedule.log_snr) for schedule in all_schedules])
    log_snr = log_snr[np.isfinite(log_snr)]  # it is -inf at zero terminal SNR
    start, stop = math.floor(log_snr.min() / BIN), math.ceil(log_snr.max() / BIN)
    return BIN * np.arange(start, max(stop, start + 1) + 1)


def common_range(all_schedules: Sequence[Schedule]) -> tuple[float, float]:
    """The interval of log SNR that the timesteps of every schedule span.

    Raises:
        RunError: no log SNR is common to all schedules.
    """
    ends = [(schedule.log_snr[-1], schedule.log_snr[0]) for schedule in all_schedules]
    low, high = (float(end) for end in (max(e[0] for e in ends), min(e[1] for e in ends)))
    if not low < high:
        raise RunError("no log SNR is common to all arms: their errors cannot be compared")
    return low, high


def mean_over(
    low: float,
    high: float,
    log_snr: Float[np.ndarray, " timesteps"],
    values: Float[np.ndarray, " timesteps"],
) -> float:
    """The mean over log SNR, from low to high, of values that are interpolated linearly.

    ``log_snr`` must decrease with the timestep.
    """
    inside = (log_snr > low) & (log_snr < high)
    at = np.concatenate([[low], log_snr[inside][::-1], [high]])
    interpolated = np.interp(at, log_snr[::-1], values[::-1])
    return float(np.trapezoid(interpolated, at) / (high - low))


def density(
    edges: Float[np.ndarray, " edges"],
    log_snr: Float[np.ndarray, " timesteps"],
    bits: Float[np.ndarray, " timesteps"],
) -> Float[np.ndarray, " bins"]:
    """The bits of the timesteps 2..T (L_1 to L_{T-1}) per unit of log SNR.

    The bits of timestep t are spread evenly over the interval from log SNR(t) to log SNR(t-1), so
    the integral over log SNR is the sum of the bits. In continuous time this integral depends on
    the schedule only through its first and last SNR (Kingma et al. 2021, VDM, eq. 18).
    """
    inside = np.clip(log_snr, edges[0], edges[-1])
    low, high = inside[1:], inside[:-1]
    overlap = np.minimum(high[:, None], edges[1:]) - np.maximum(low[:, None], edges[:-1])
    share = np.maximum(overlap, 0) / np.maximum(high - low, 1e-12)[:, None]
    return bits[1:] @ share / np.diff(edges)


class _Reading(NamedTuple):
    """The inputs that ``_read`` needs for every job."""

    path: pathlib.Path
    edges: Float[np.ndarray, " edges"]
    common: tuple[float, float]
    distance: str
    classifier: Classifier
    real: Float[np.ndarray, "m d"]  # features of the test images


def _read(job: Job, reading: _Reading) -> tuple[JobScores, Float[np.ndarray, "n d"]]:
    """The scores of a job, and the features of its samples."""
    folder = folder_of(job, reading.path).path
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    report = json.loads((folder / "evaluation.json").read_text())
    with np.load(folder / "evaluation.npz") as arrays:
        bits = arrays["prior"] + arrays["middle"] + arrays["decoder"]
    by_log_snr = _read_terms(job, folder, report, reading)
    with np.load(folder / "samples" / "samples.npz") as arrays:
        pictures = arrays["images"]
    classifier = reading.classifier
    features = classifier_features(classifier, from_uint8(pictures, classifier.levels))
    scores = JobScores(
        seed=job.seed,
        config_hash=job.config_hash,
        folder=str(folder.relative_to(reading.path)),
        step=report["step"],
        steps=np.array([record["step"] for record in records]),
        losses=np.array([record["loss"] for record in records]),
        bits=bits,
        terms={name: term["bits_per_dim"] for name, term in report["terms"].items()},
        density=by_log_snr.density,
        eps_error=by_log_snr.eps_error,
        loss=by_log_snr.loss,
        quality=with_interval(reading.distance, features, reading.real, seed=0),
        pictures=pictures[:SHOWN_IMAGES],
    )
    return scores, features


class _ByLogSnr(NamedTuple):
    """The bits and the error of eps of a job by log SNR, an axis that all schedules share."""

    density: Float[np.ndarray, " bins"]
    eps_error: Float[np.ndarray, " bins"]
    loss: float


def _read_terms(
    job: Job, folder: pathlib.Path, report: dict[str, Any], reading: _Reading
) -> _ByLogSnr:
    """Read evaluation.csv, with one row per evaluated timestep, and sort its terms into bins."""
    with (folder / "evaluation.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = {name: np.array([float(row[name] or "nan") for row in rows]) for name in rows[0]}
    schedule, edges = job.experiment.schedule, reading.edges
    log_snr = np.asarray(schedule.log_snr, np.float64)
    timestep = columns["t"].astype(int) - 1
    # Each image was evaluated at one timestep per stratum. The weight of an image there is the
    # size of the stratum, so the sum over timesteps estimates the sum over the whole chain.
    strata = stratify(len(schedule), report["num_timesteps_per_example"])
    size = np.repeat(strata.size, strata.size)
    bits = np.zeros(len(schedule))
    weight = columns["images"] * size[timestep] / report["num_examples"]
    bits[timestep] = columns["bits_per_dim"] * weight
    place = np.clip(np.digitize(log_snr[timestep], edges) - 1, 0, len(edges) - 2)
    bin_weight = np.bincount(place, weight, len(edges) - 1)
    bin_error = np.bincount(place, weight * columns["mse_eps"], len(edges) - 1)
    with np.errstate(invalid="ignore"):
        eps_error = bin_error / bin_weight
    finite = np.isfinite(log_snr[timestep])  # log SNR is -inf at zero terminal SNR
    loss = mean_over(*reading.common, log_snr[timestep][finite], columns["mse_eps"][finite])
    return _ByLogSnr(density=density(edges, log_snr, bits), eps_error=eps_error, loss=loss)


def _compare_samples(
    means: dict[str, Interval],
    features: dict[str, np.ndarray],
    reading: _Reading,
    reference: str,
) -> dict[str, Score]:
    """The sample quality of arms with one seed; samples of the same initial noise are paired."""
    differences = {
        name: paired_difference(
            reading.distance, features[name], features[reference], reading.real, seed=0
        )
        for name in means
        if name != reference
    }
    marks = comparison.marks_of(differences, reference)
    return {
        name: Score(mean=means[name], difference=differences.get(name), mark=marks[name])
        for name in means
    }


def _swept(arms: Sequence[ArmScores]) -> str | None:
    """The name of the field in which the arms differ, if there is one field and it is numeric."""
    fields = {tuple(arm.fields) for arm in arms}
    if len(fields) != 1 or len(arms[0].fields) != 1:
        return None
    (name,) = arms[0].fields
    values = [arm.fields[name] for arm in arms]
    is_number = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    return name if is_number else None


def _notes(num_seeds: int, dataset: Dataset, common: tuple[float, float]) -> tuple[str, ...]:
    """The sentences below the table of a report."""
    assert dataset.levels is not None
    notes = [
        f"Pixels have {dataset.levels} grey levels. With x_0 in [-1, 1], a pixel bin is "
        f"2/{dataset.levels - 1} wide: compare sqrt(beta_1) with this width.",
        "All arms are evaluated on the same test images. At the same timestep, an image has the "
        "same noise in every arm. The error of eps is a mean over log SNR from "
        f"{common[0]:.1f} to {common[1]:.1f}, where every arm has timesteps.",
    ]
    if num_seeds == 1:
        notes.append(
            "There is one seed, so the intervals are over test images or samples alone. They do "
            "not show how much two trainings of the same arm differ."
        )
    return tuple(notes)
