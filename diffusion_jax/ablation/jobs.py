"""The jobs of an ablation: their configs, their folders, and whether they are finished."""

import hashlib
import importlib.metadata
import json
import logging
import pathlib
import platform
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from diffusion_jax.config.config import relevant_fields
from diffusion_jax.data.dataset import Dataset
from diffusion_jax.errors import RunError
from diffusion_jax.experiment.experiment import Experiment
from diffusion_jax.runtime.checkpoint import digest, flatten
from diffusion_jax.runtime.workdir import Workdir

LOG = logging.getLogger("diffusion_jax")


class Arm(NamedTuple):
    """One value for each field that an ablation varies."""

    name: str  # "schedule.s=0.008", which is also the name of its folder
    fields: dict[str, Any]  # {"schedule.s": 0.008}


class Job(NamedTuple):
    """One arm with one seed: a training run with a config of its own."""

    arm: Arm
    seed: int
    config: Any  # a ConfigDict
    experiment: Experiment

    @property
    def config_hash(self) -> str:
        """A hash of every field that the scores depend on, as twelve hexadecimal digits."""
        # The schedule is hashed too, because its betas may come from a file.
        parts = self.relevant_fields(), digest(flatten(self.experiment.schedule))
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def static_choices(self) -> str:
        """The fields that a compiled training step depends on; jobs with equal fields share it.

        The seed and the schedule, including T, are arguments of the step. With importance sampling
        T is static, because the state has a loss history for each timestep.
        """
        fields = self.relevant_fields()
        del fields["schedule"], fields["seed"]
        if self.config.loss.timesteps == "importance":
            fields["num_timesteps"] = len(self.experiment.schedule)
        return json.dumps(fields, sort_keys=True)

    def relevant_fields(self) -> dict[str, Any]:
        """The fields that the scores depend on."""
        return relevant_fields(self.config)


class Ablation(NamedTuple):
    """The jobs of an ablation, how they run, and which arm the others are compared to."""

    jobs: tuple[Job, ...]  # of all shards
    mine: tuple[Job, ...]  # of this shard
    is_shard: bool
    reference: str  # the name of an arm
    parallel: str  # "auto", "device", "sequence" or "vmap"
    arms_per_device: int | None
    distance: str  # of the sample quality: "frechet", "kernel"


# The files of a job that its scores are read from.
SCORED_FILES = (
    "metrics.jsonl",
    "evaluation.json",
    "evaluation.csv",
    "evaluation.npz",
    "samples/samples.npz",
)


class Parallel(NamedTuple):
    """How jobs run: "device", "sequence" or "vmap", and how many run at once on a device."""

    way: str
    per_device: int


class Site(NamedTuple):
    """The data, folder and devices of an ablation, and how its jobs run on the devices."""

    dataset: Dataset
    path: pathlib.Path
    devices: list[jax.Device]
    parallel: Parallel


class FailedJobsError(RunError):
    """Some jobs could not be trained or scored; all other jobs are finished."""


def folder_of(job: Job, path: pathlib.Path) -> Workdir:
    """The folder of a job, below the folder ``path`` of its ablation."""
    return Workdir(Workdir(path).arms / job.arm.name / f"seed_{job.seed}")


def title_of(job: Job) -> str:
    """The name of a job in messages."""
    return f"{job.arm.name}, seed {job.seed}"


def versions() -> dict[str, str]:
    """The versions of the libraries that scores may depend on, and the devices."""
    names = ("diffusion_jax", "jax", "jaxlib", "flax", "optax", "numpy")
    libraries = {name: importlib.metadata.version(name) for name in names}
    device = f"{jax.local_device_count()} {jax.devices()[0].device_kind}"
    return libraries | {"python": platform.python_version(), "devices": device}


def record_of(job: Job, path: pathlib.Path) -> pathlib.Path:
    """The file finished.json, which a job gets when it is scored."""
    return folder_of(job, path).path / "finished.json"


def is_finished(job: Job, path: pathlib.Path) -> bool:
    """Whether the job was trained and scored with the same config hash.

    The files that were scored must be unchanged: a run of another mode in the folder of the job
    may have replaced them.
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
    """The SHA-256 digests of the files that scores are read from."""
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in SCORED_FILES}


def group_jobs(
    jobs: Sequence[Job], key: Callable[[Job], object] = lambda job: None
) -> list[list[Job]]:
    """Group the jobs by their static choices and by their values of ``key``."""
    groups: dict[object, list[Job]] = {}
    for job in jobs:
        groups.setdefault((job.static_choices, key(job)), []).append(job)
    return list(groups.values())


def fail(job: Job, error: Exception, failed: dict[str, str]) -> None:
    """Log why a job failed, and put the reason into ``failed`` under the title of the job."""
    LOG.error("%s: %s", title_of(job), error)
    failed[title_of(job)] = str(error)
