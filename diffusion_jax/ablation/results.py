"""The results of an ablation: the scores of every arm and seed, and how the arms differ."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from diffusion_jax.ablation import comparison
from diffusion_jax.diffusion.schedules.schedule import Schedule
from diffusion_jax.evaluation.interval import Interval


class JobScores(NamedTuple):
    """The scores of one job: one arm trained with one seed."""

    seed: int
    config_hash: str
    folder: str  # the path of the job, relative to the workdir
    step: int
    steps: Int[np.ndarray, " records"]  # of the records in metrics.jsonl
    # Each loss is the mean over the steps since the last record. Losses are not comparable across
    # schedules: each schedule averages over different noise levels.
    losses: Float[np.ndarray, " records"]
    bits: Float[np.ndarray, " images"]  # bits/dim of each test image
    terms: dict[str, float]  # the terms of the bound, "L_T", "L_1 to L_{T-1}", "L_0", in bits/dim
    density: Float[np.ndarray, " bins"]  # bits/dim per unit of log SNR (Results.edges), without L_0
    eps_error: Float[np.ndarray, " bins"]  # mean squared error of eps; nan: no timestep in the bin
    loss: float  # mean squared error of eps over the range of log SNR that all arms share
    quality: Interval  # distance of the samples to the test images, interval over the samples
    pictures: UInt8[np.ndarray, "n h w c"]  # the first samples; all arms start from the same noise


class Score(NamedTuple):
    """A number of an arm: its mean over the seeds, and its difference to the reference arm."""

    mean: Interval
    difference: Interval | None  # paired; None: the arm is the reference arm
    mark: str  # "best", "better", "worse" or "", see ``comparison.marks``


class ArmScores(NamedTuple):
    """The scores of one arm, over all its jobs."""

    name: str  # "schedule.s=0.008"
    fields: dict[str, Any]  # {"schedule.s": 0.008}
    title: str  # the schedule with all its arguments
    schedule: Schedule
    jobs: tuple[JobScores, ...]
    scores: dict[str, Score]  # the keys are those of SCORES


class Results(NamedTuple):
    """Everything that a report shows."""

    dataset: str
    levels: int
    reference: str  # the name of an arm
    swept: str | None  # "schedule.s": the only field that the arms vary, if it is numeric
    arms: tuple[ArmScores, ...]
    edges: Float[np.ndarray, " bins_and_1"]  # of the bins of log SNR
    distance: str  # that measures the sample quality: "frechet", "kernel"
    command: str
    versions: dict[str, str]
    facts: dict[str, str]  # further entries of the record: "parameters": "701,345"
    notes: tuple[str, ...]  # sentences that qualify the scores


class ScoreKind(NamedTuple):
    """A kind of score: its heading in a report, its unit, and a function that reads it from a job.

    ``values`` returns one value, or one value for each test image.
    """

    heading: str
    unit: str
    values: Callable[[JobScores], Float[np.ndarray, " *images"]]


# Lower is better for every score.
SCORES: dict[str, ScoreKind] = {
    "bits_per_dim": ScoreKind(
        heading="bound",
        unit="bits/dim",
        values=lambda job: np.asarray(job.bits, np.float64),
    ),
    "quality": ScoreKind(
        heading="sample quality",
        unit="classifier distance",
        values=lambda job: np.asarray(job.quality.value, np.float64),
    ),
    # The training loss is no score: each schedule averages it over different noise levels.
    "loss": ScoreKind(
        heading="error of eps",
        unit="mean over the common log SNRs",
        values=lambda job: np.asarray(job.loss, np.float64),
    ),
}


def score_values(
    jobs: Sequence[JobScores], name: str
) -> Float[np.ndarray, " seeds"] | Float[np.ndarray, "seeds images"]:
    """The values of a score: one for each seed, or one for each seed and test image."""
    return np.stack([SCORES[name].values(job) for job in jobs])


def score_of_job(job: JobScores, name: str) -> float:
    """A score of a job as one number: the mean over the test images, if each has a value."""
    return float(SCORES[name].values(job).mean())


def compare(values: dict[str, np.ndarray], reference: str) -> dict[str, Score]:
    """The mean of a score for every arm, and its paired difference to the reference arm."""
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
