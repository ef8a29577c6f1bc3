"""The jobs of an ablation: what they are, where they lie, and whether they are finished."""

import hashlib
import importlib.metadata
import json
import logging
import pathlib
import platform
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from diffusion_jax.data.dataset import Dataset
from diffusion_jax.errors import RunError
from diffusion_jax.experiment.experiment import Experiment
from diffusion_jax.runtime.checkpoint import digest, flatten
from diffusion_jax.runtime.workdir import Workdir

LOG = logging.getLogger("diffusion_jax")


# What the scores of a run do not depend on: the machine, how often something is written, and the
# batch sizes of sampling and evaluation, where every image has its own PRNG key.
WITHOUT_EFFECT = (
    "ablate",
    "checkpoint",
    "compilation_cache",
    "dataset.archives",
    "dataset.data_dir",
    "distributed",
    "evaluate.batch_size",
    "evaluate.timesteps_per_call",
    "num_devices",
    "sampling.batch_size",
    "sampling.compared_steps",
    "sampling.num_frames",
    "train.log_every_steps",
    "train.sample_every_steps",
    "train.steps_per_call",
)


class Arm(NamedTuple):
    """One choice of the fields that are ablated."""

    name: str  # "schedule.s=0.008", and its folder
    fields: dict[str, Any]  # {"schedule.s": 0.008}


class Job(NamedTuple):
    """One arm with one seed: a training run like any other, with a config of its own."""

    arm: Arm
    seed: int
    config: Any  # a ConfigDict
    experiment: Experiment

    @property
    def config_hash(self) -> str:
        """Twelve digits that stand for every field that its scores depend on."""
        # betas may come from a file
        parts = self.relevant_fields(), digest(flatten(self.experiment.schedule))
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def static_choices(self) -> str:
        """What a compiled training step depends on: jobs that have it in common share one.

        The seed is an argument of the step, and so is the schedule, T included, unless the state
        has a loss history of each timestep.
        """
        fields = self.relevant_fields()
        del fields["schedule"], fields["seed"]
        if self.config.loss.timesteps == "importance":
            fields["num_timesteps"] = len(self.experiment.schedule)
        return json.dumps(fields, sort_keys=True)

    def relevant_fields(self) -> dict[str, Any]:
        """The fields that its scores depend on."""
        fields = self.config.to_dict()
        for name in WITHOUT_EFFECT:
            section, _, leaf = name.rpartition(".")
            del (fields[section] if section else fields)[leaf]
        return fields


class Ablation(NamedTuple):
    """What an ablation trains, where, and what its arms are compared to."""

    jobs: tuple[Job, ...]  # all of them
    mine: tuple[Job, ...]  # the share of this shard
    is_shard: bool
    reference: str  # the name of an arm
    parallel: str
    arms_per_device: int | None
    distance: str


# What the scores of a job are read from.
SCORED_FILES = (
    "metrics.jsonl",
    "evaluation.json",
    "evaluation.csv",
    "evaluation.npz",
    "samples/samples.npz",
)


class Site(NamedTuple):
    """Where the jobs of an ablation run: on which data and devices, in which folder."""

    dataset: Dataset
    path: pathlib.Path
    devices: list[jax.Device]


class FailedJobsError(RunError):
    """Some jobs could not be trained; the others are."""


def folder_of(job: Job, path: pathlib.Path) -> Workdir:
    """Where a job lies in the folder of an ablation."""
    return Workdir(Workdir(path).arms / job.arm.name / f"seed_{job.seed}")


def title_of(job: Job) -> str:
    """What a job is called in what a run prints."""
    return f"{job.arm.name}, seed {job.seed}"


def versions() -> dict[str, str]:
    """Of the libraries that scores may depend on, and what they run on."""
    names = ("diffusion_jax", "jax", "jaxlib", "flax", "optax", "numpy")
    libraries = {name: importlib.metadata.version(name) for name in names}
    device = f"{jax.local_device_count()} {jax.devices()[0].device_kind}"
    return libraries | {"python": platform.python_version(), "devices": device}


def record_of(job: Job, path: pathlib.Path) -> pathlib.Path:
    """The file that says by which config a job was finished."""
    return folder_of(job, path).path / "finished.json"


def is_finished(job: Job, path: pathlib.Path) -> bool:
    """Whether the job is trained, evaluated and sampled from by this very config.

    Its files must be those that were scored then: a run of another mode in its folder may have
    written others.
    """
    record = record_of(job, path)
    if not record.exists():
        return False
    try:
        finished = json.loads(record.read_text())
        is_same = finished["config_hash"] == job.config_hash
        return is_same and finished["files"] == digests_of(record.parent)
    except (ValueError, KeyError, OSError) as error:
        LOG.warning("%s: %r; scoring anew", record, error)
        return False


def digests_of(folder: pathlib.Path) -> dict[str, str]:
    """The sums of the files that scores are read from."""
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in SCORED_FILES}


def group_jobs(
    jobs: Sequence[Job], also: Callable[[Job], object] = lambda job: None
) -> list[list[Job]]:
    """Together the jobs that have all static choices in common, and what ``also`` says of them."""
    groups: dict[object, list[Job]] = {}
    for job in jobs:
        groups.setdefault((job.static_choices, also(job)), []).append(job)
    return list(groups.values())


def fail(job: Job, error: Exception, failed: dict[str, str]) -> None:
    """Remember by its title that a job failed, and why."""
    LOG.error("%s: %s", title_of(job), error)
    failed[title_of(job)] = str(error)
