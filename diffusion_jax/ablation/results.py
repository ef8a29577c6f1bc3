"""What an ablation found: the scores of every arm and seed, and how sure their differences are."""

import csv
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from diffusion_jax.ablation import comparison
from diffusion_jax.ablation.jobs import Ablation, Job, folder_of
from diffusion_jax.data.dataset import Dataset
from diffusion_jax.data.pixels import from_uint8, to_x_0
from diffusion_jax.diffusion.bound import stratify
from diffusion_jax.diffusion.schedules.schedule import Schedule
from diffusion_jax.errors import RunError
from diffusion_jax.evaluation.classifier import Classifier
from diffusion_jax.evaluation.classifier import features as classifier_features
from diffusion_jax.evaluation.distances import paired_difference, with_interval
from diffusion_jax.evaluation.interval import Interval

BIN = 1.0  # of log SNR
SHOWN_IMAGES = 16


class JobScores(NamedTuple):
    """One arm trained with one seed, and what came of it."""

    seed: int
    config_hash: str
    folder: str  # relative to the workdir
    step: int
    steps: Int[np.ndarray, " records"]
    # in training, means over the steps since the last record. Not comparable across schedules: each
    # averages over different noise levels.
    losses: Float[np.ndarray, " records"]
    bits: Float[np.ndarray, " images"]  # bits/dim of each test image
    terms: dict[str, float]  # of the bound: L_T, L_1 to L_{T-1}, L_0, in bits/dim
    density: Float[np.ndarray, " bins"]  # bits/dim per unit of log SNR (Results.edges), L_0 apart
    eps_error: Float[np.ndarray, " bins"]  # mean squared error of eps; nan: no timestep there
    loss: float  # the mean squared error of eps over the log SNRs that every arm has
    quality: Interval  # over the samples
    pictures: UInt8[np.ndarray, "n h w c"]  # the first samples: equal noise in every arm


class Score(NamedTuple):
    """A number of an arm, over its seeds, and how far it is from that of the reference arm."""

    mean: Interval
    difference: Interval | None  # to the reference arm, in pairs; None: it is the reference arm
    mark: str  # "best", "better", "worse" or "": what the intervals of differences allow to say


class ArmScores(NamedTuple):
    """One choice of the fields that are ablated."""

    name: str  # "s=0.008"
    fields: dict[str, Any]  # {"schedule.s": 0.008}
    title: str  # the schedule with all its arguments
    schedule: Schedule
    jobs: tuple[JobScores, ...]
    scores: dict[str, Score]  # of SCORES; smaller is better for each


class Results(NamedTuple):
    """All that a report shows."""

    dataset: str
    levels: int
    reference: str  # the name of an arm
    swept: str | None  # the one field, a number, that arms differ in: "schedule.s"
    arms: tuple[ArmScores, ...]
    edges: Float[np.ndarray, " bins_and_1"]  # of the bins of log SNR
    distance: str  # of the sample quality: "frechet", "kernel"
    command: str
    versions: dict[str, str]
    facts: dict[str, str]  # what else belongs to the record: "parameters": "701,345"
    notes: tuple[str, ...]  # sentences that qualify the scores


class About(NamedTuple):
    """What belongs to the record of an ablation beside its scores."""

    command: str
    versions: dict[str, str]
    facts: dict[str, str]
    notes: tuple[str, ...]


# Of each arm, the heading of a report and its unit; in all of them less is better.
SCORES: dict[str, tuple[str, str]] = {
    "bits_per_dim": ("bound", "bits/dim"),
    "quality": ("sample quality", "classifier distance"),
    # not the loss of training, which is an average over other log SNRs with every schedule
    "loss": ("error of eps", "mean over the common log SNRs"),
}


def collect(
    ablation: Ablation, dataset: Dataset, classifier: Classifier, path: pathlib.Path, about: About
) -> Results:
    """Read what the jobs left in their folders below ``path``, and compare the arms.

    Raises:
        RunError: no log SNR is common to all arms.
    """
    all_schedules = [job.experiment.schedule for job in ablation.jobs]
    real = to_x_0(dataset.test.images[:], dataset.levels)
    reading = _Reading(
        path=path,
        edges=bin_edges(all_schedules),
        common=common_range(all_schedules),
        distance=ablation.distance,
        classifier=classifier,
        real=classifier_features(classifier, real),
    )
    scores, features = zip(*(_read(job, reading) for job in ablation.jobs))
    names = [job.arm.name for job in ablation.jobs]
    by_arm = {name: [job for job, n in zip(scores, names) if n == name] for name in names}
    compared = _compare_arms(by_arm, ablation.reference)
    num_seeds = len(by_arm[names[0]])
    if num_seeds == 1:  # the samples themselves are paired, and say something
        compared["quality"] = _compare_samples(
            {name: arm[0].quality for name, arm in by_arm.items()},
            dict(zip(names, features)),
            reading,
            ablation.reference,
        )
    first = {job.arm.name: job for job in reversed(ablation.jobs)}
    arms = tuple(
        ArmScores(
            name=name,
            fields=first[name].arm.fields,
            title=first[name].experiment.schedule_title,
            schedule=first[name].experiment.schedule,
            jobs=tuple(by_arm[name]),
            scores={score: of_arms[name] for score, of_arms in compared.items()},
        )
        for name in by_arm
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
    """Every score of every arm, and how far it is from the reference arm's."""
    values = {
        "bits_per_dim": {n: np.stack([job.bits for job in arm]) for n, arm in by_arm.items()},
        "quality": {n: np.array([job.quality.value for job in arm]) for n, arm in by_arm.items()},
        "loss": {n: np.array([job.loss for job in arm]) for n, arm in by_arm.items()},
    }
    return {name: compare(of_arms, reference) for name, of_arms in values.items()}


def bin_edges(all_schedules: Sequence[Schedule]) -> Float[np.ndarray, " edges"]:
    """Bins of log SNR that hold every timestep of every schedule, ends at whole numbers."""
    log_snr = np.concatenate([np.asarray(schedule.log_snr) for schedule in all_schedules])
    log_snr = log_snr[np.isfinite(log_snr)]  # zero terminal SNR
    start, stop = math.floor(log_snr.min() / BIN), math.ceil(log_snr.max() / BIN)
    return BIN * np.arange(start, max(stop, start + 1) + 1)


def common_range(all_schedules: Sequence[Schedule]) -> tuple[float, float]:
    """The log SNRs between the timesteps of every schedule.

    Raises:
        RunError: there are none.
    """
    ends = [(schedule.log_snr[-1], schedule.log_snr[0]) for schedule in all_schedules]
    low, high = (float(end) for end in (max(e[0] for e in ends), min(e[1] for e in ends)))
    if not low < high:
        raise RunError("no log SNR is common to all arms: they cannot be compared")
    return low, high


def mean_over(
    low: float,
    high: float,
    log_snr: Float[np.ndarray, " timesteps"],
    values: Float[np.ndarray, " timesteps"],
) -> float:
    """The mean of values over log SNR from low to high, straight between falling timesteps."""
    inside = (log_snr > low) & (log_snr < high)
    at = np.concatenate([[low], log_snr[inside][::-1], [high]])
    interpolated = np.interp(at, log_snr[::-1], values[::-1])
    return float(np.trapezoid(interpolated, at) / (high - low))


def density(
    edges: Float[np.ndarray, " edges"],
    log_snr: Float[np.ndarray, " timesteps"],
    bits: Float[np.ndarray, " timesteps"],
) -> Float[np.ndarray, " bins"]:
    """The bits of t = 2 .. T per unit of log SNR, the term of t spread from SNR(t) to SNR(t-1).

    Its integral is their sum, whatever the schedule: that of the bound in continuous time, in which
    only the ends of a schedule count (Kingma et al. 2021, VDM, eq. 18).
    """
    inside = np.clip(log_snr, edges[0], edges[-1])
    low, high = inside[1:], inside[:-1]
    overlap = np.minimum(high[:, None], edges[1:]) - np.maximum(low[:, None], edges[:-1])
    share = np.maximum(overlap, 0) / np.maximum(high - low, 1e-12)[:, None]
    return bits[1:] @ share / np.diff(edges)


class _Reading(NamedTuple):
    """What the scores of all jobs are computed with."""

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
    """The terms of a job's bound on the axis that all schedules share."""

    density: Float[np.ndarray, " bins"]
    eps_error: Float[np.ndarray, " bins"]
    loss: float


def _read_terms(
    job: Job, folder: pathlib.Path, report: dict[str, Any], reading: _Reading
) -> _ByLogSnr:
    with (folder / "evaluation.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = {name: np.array([float(row[name] or "nan") for row in rows]) for name in rows[0]}
    schedule, edges = job.experiment.schedule, reading.edges
    log_snr = np.asarray(schedule.log_snr, np.float64)
    timestep = columns["t"].astype(int) - 1
    # a timestep stands for its stratum, of which each image saw one
    strata = stratify(len(schedule), report["num_timesteps_per_example"])
    size = np.repeat(strata.size, strata.size)
    bits_of = np.zeros(len(schedule))
    drawn = columns["images"] * size[timestep] / report["num_examples"]
    bits_of[timestep] = columns["bits_per_dim"] * drawn
    place = np.clip(np.digitize(log_snr[timestep], edges) - 1, 0, len(edges) - 2)
    weight = np.bincount(place, drawn, len(edges) - 1)
    error = np.bincount(place, drawn * columns["mse_eps"], len(edges) - 1)
    with np.errstate(invalid="ignore"):
        eps_error = error / weight
    finite = np.isfinite(log_snr[timestep])  # but for zero terminal SNR
    loss = mean_over(*reading.common, log_snr[timestep][finite], columns["mse_eps"][finite])
    return _ByLogSnr(density=density(edges, log_snr, bits_of), eps_error=eps_error, loss=loss)


def compare(values: dict[str, np.ndarray], reference: str) -> dict[str, Score]:
    """A score of every arm, and how far it is from the reference arm's."""
    marks = comparison.marks(values, reference)
    return {
        name: Score(
            mean=comparison.mean_interval(of_arm),
            difference=None
            if name == reference
            else comparison.paired_difference(of_arm, values[reference]),
            mark=marks[name],
        )
        for name, of_arm in values.items()
    }


def _compare_samples(
    means: dict[str, Interval],
    features: dict[str, np.ndarray],
    reading: _Reading,
    reference: str,
) -> dict[str, Score]:
    """As ``compare``, of one seed: intervals over the samples, which have the same noise."""
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
    """The one field in which all arms differ, if it is a number."""
    fields = {tuple(arm.fields) for arm in arms}
    if len(fields) != 1 or len(arms[0].fields) != 1:
        return None
    (name,) = arms[0].fields
    values = [arm.fields[name] for arm in arms]
    is_number = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    return name if is_number else None


def _notes(num_seeds: int, dataset: Dataset, common: tuple[float, float]) -> tuple[str, ...]:
    """What a reader has to know of the scores."""
    notes = [
        f"Pixels have {dataset.levels} levels: a pixel bin is 2/{dataset.levels - 1} wide, in x_0 "
        "from -1 to 1, and is what sqrt(beta_1) is to be seen beside.",
        "Test images are the same for all arms, and so is the noise they are given at a timestep "
        f"of one number. The error of eps is a mean over log SNR from {common[0]:.1f} to "
        f"{common[1]:.1f}, where all of these arms have timesteps.",
    ]
    if num_seeds == 1:
        notes.append(
            "There is one seed: the intervals are over test images or samples alone, and say "
            "nothing of how much two trainings of the same arm differ."
        )
    return tuple(notes)
