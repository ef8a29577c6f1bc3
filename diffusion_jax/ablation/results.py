"""The results of an ablation: the scores of every arm and seed, and intervals of differences."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from diffusion_jax.ablation import comparison
from diffusion_jax.diffusion.schedules.schedule import Schedule
from diffusion_jax.evaluation.interval import Interval


class JobScores(NamedTuple):
    """The scores of one job, that is of one arm trained with one seed."""

    seed: int
    config_hash: str
    folder: str  # relative to the workdir
    step: int
    steps: Int[np.ndarray, " records"]
    # Each loss is the mean over the steps since the last record. Losses are not comparable across
    # schedules: each schedule averages over different noise levels.
    losses: Float[np.ndarray, " records"]
    bits: Float[np.ndarray, " images"]  # bits/dim of each test image
    terms: dict[str, float]  # of the bound: L_T, L_1 to L_{T-1}, L_0, in bits/dim
    density: Float[np.ndarray, " bins"]  # bits/dim per unit of log SNR (Results.edges), without L_0
    eps_error: Float[np.ndarray, " bins"]  # mean squared error of eps; nan: the bin is empty
    loss: float  # the mean squared error of eps over the log SNRs that every arm has
    quality: Interval  # over the samples
    pictures: UInt8[np.ndarray, "n h w c"]  # the first samples; their noise is the same in all arms


class Score(NamedTuple):
    """A number of an arm over its seeds, and its difference to that of the reference arm."""

    mean: Interval
    difference: Interval | None  # paired; None: this is the reference arm
    mark: str  # "best", "better", "worse" or "", by the intervals of the differences


class ArmScores(NamedTuple):
    """The scores of one arm, over all its jobs."""

    name: str  # "s=0.008"
    fields: dict[str, Any]  # {"schedule.s": 0.008}
    title: str  # the schedule with all its arguments
    schedule: Schedule
    jobs: tuple[JobScores, ...]
    scores: dict[str, Score]  # by the names in SCORES


class Results(NamedTuple):
    """All that a report shows."""

    dataset: str
    levels: int
    reference: str  # the name of an arm
    swept: str | None  # the numeric field, if it is the only one that arms differ in: "schedule.s"
    arms: tuple[ArmScores, ...]
    edges: Float[np.ndarray, " bins_and_1"]  # of the bins of log SNR
    distance: str  # of the sample quality: "frechet", "kernel"
    command: str
    versions: dict[str, str]
    facts: dict[str, str]  # further entries of the record: "parameters": "701,345"
    notes: tuple[str, ...]  # sentences that qualify the scores


class ScoreKind(NamedTuple):
    """A kind of score: its heading in a report, its unit, and its values of a job.

    A job has one value, or one for each test image.
    """

    heading: str
    unit: str
    values: Callable[[JobScores], Float[np.ndarray, " *images"]]


# Lower is better in all of them.
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
    # Not the loss of training, which averages over other log SNRs with every schedule.
    "loss": ScoreKind(
        heading="error of eps",
        unit="mean over the common log SNRs",
        values=lambda job: np.asarray(job.loss, np.float64),
    ),
}


def score_values(
    jobs: Sequence[JobScores], name: str
) -> Float[np.ndarray, " seeds"] | Float[np.ndarray, "seeds images"]:
    """The values of a score: one for each seed, or for each seed and test image."""
    return np.stack([SCORES[name].values(job) for job in jobs])


def score_of_job(job: JobScores, name: str) -> float:
    """A score as one number of a job: a mean over the test images where each has a value."""
    return float(SCORES[name].values(job).mean())


def compare(values: dict[str, np.ndarray], reference: str) -> dict[str, Score]:
    """A score of every arm with its paired difference to the reference arm."""
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
