"""The arms of an ablation, and the training runs that they are: what a config's grid means."""

import hashlib
import itertools
import json
import re
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from diffusion_jax import config as configuration
from diffusion_jax import quality
from diffusion_jax.checkpoint import digest, flatten
from diffusion_jax.config import ConfigError, choose, require
from diffusion_jax.experiment import Experiment, create_experiment

FIELD = "config.ablate.grid"
PARALLEL = ("auto", "device", "sequence", "vmap")
# What arms may differ in: data, batches and the number of steps are the same for all of them.
SECTIONS = ("schedule", "loss", "model", "optimizer", "ema")
# What the figures of a run do not depend on.
OF_THE_MACHINE = ("num_devices", "distributed", "compilation_cache", "ablate")
PLACES = ("archives", "data_dir")  # of the data set


class Arm(NamedTuple):
    """One choice of the fields that are ablated."""

    name: str  # "schedule.s=0.008", and its folder
    fields: dict[str, Any]  # {"schedule.s": 0.008}


class Job(NamedTuple):
    """One arm with one seed: a training run like any other, with a config of its own."""

    arm: Arm
    seed: int
    config: ConfigDict
    experiment: Experiment

    @property
    def config_hash(self) -> str:
        """Twelve digits that stand for every field that its figures depend on."""
        fields = self.config.to_dict()
        fields["dataset"] = {k: v for k, v in fields["dataset"].items() if k not in PLACES}
        kept = {name: value for name, value in fields.items() if name not in OF_THE_MACHINE}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def static_choices(self) -> str:
        """What a compiled training step depends on: jobs that have it in common share one.

        The seed is an argument of the step, and so is the schedule, T included, unless the state
        has a part of it: losses of each timestep, or the parameters of a learned one.
        """
        fields = {n: v for n, v in self.config.to_dict().items() if n not in OF_THE_MACHINE}
        schedule = fields.pop("schedule")
        del fields["seed"]
        if schedule["name"] == "learned":
            fields["schedule"] = schedule
        elif self.config.loss.timesteps == "importance":
            fields["num_timesteps"] = len(self.experiment.schedule)
        return json.dumps(fields, sort_keys=True)


class Ablation(NamedTuple):
    """What an ablation trains, where, and what its arms are compared to."""

    jobs: tuple[Job, ...]  # all of them
    mine: tuple[Job, ...]  # the share of this shard
    is_shard: bool
    reference: str  # the name of an arm
    parallel: str
    arms_per_device: int | None
    distance: str


def count_jobs(config: ConfigDict) -> int:
    """How many jobs a grid has, before anything is created.

    Raises:
        ConfigError: there is no grid, or it cannot be read.
    """
    text = config.ablate.grid
    require(text is not None, FIELD, text, "set to ablate, to schedule.s=0,0.008 for example")
    return len(config.ablate.seeds) * sum(len(_choices(part)) for part in text.split("|"))


def create_ablation(config: ConfigDict) -> Ablation:
    """All of ``config.ablate``.

    Raises:
        ConfigError: the first field that is wrong, alone or with the others.
    """
    fields = config.ablate
    jobs = create_jobs(config)
    choose("config.ablate.parallel", fields.parallel, PARALLEL, "way to run jobs")
    choose("config.ablate.distance", fields.distance, quality.DISTANCES, "distance")
    per_device = fields.arms_per_device
    only = "unset: only vmap has several arms on a device"
    allowed = "at least 1" if fields.parallel in ("vmap", "auto") else only
    fits = per_device is None or (per_device >= 1 and fields.parallel in ("vmap", "auto"))
    require(fits, "config.ablate.arms_per_device", per_device, allowed)
    names = [job.arm.name for job in jobs]
    reference = names[0]
    if fields.reference is not None:
        reference = fields.reference.replace(" ", "")
        choose("config.ablate.reference", reference, sorted(set(names)), "arm")
    for name, value in (
        ("distributed", config.distributed or None),  # shards are for several machines
        ("editing.task", config.editing.task),
        ("guidance.weak_workdir", config.guidance.weak_workdir),
        ("guidance.weak_step", config.guidance.weak_step),
    ):
        require(value is None, f"config.{name}", value, "unset in an ablation")
    dataset = jobs[0].experiment.dataset
    require(
        dataset.levels is not None and dataset.num_classes is not None,
        "config.dataset.name",
        config.dataset.name,
        "a set of images with labels, for the classifier that compares samples",
    )
    index, num_shards = _shard(fields.shard, len(jobs))
    mine = tuple(jobs[index::num_shards])
    return Ablation(
        tuple(jobs),
        mine,
        fields.shard is not None,
        reference,
        fields.parallel,
        per_device,
        fields.distance,
    )


def _shard(text: str | None, num_jobs: int) -> tuple[int, int]:
    """Which of how many shards, counted from 0; "2/3" is the second of three."""
    if text is None:
        return 0, 1
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    numbers = tuple(map(int, found.groups())) if found else (0, 0)
    allowed = f"i/n, with i in 1..n and n at most the {num_jobs} jobs"
    require(1 <= numbers[0] <= numbers[1] <= num_jobs, "config.ablate.shard", text, allowed)
    return numbers[0] - 1, numbers[1]


def create_jobs(config: ConfigDict) -> list[Job]:
    """Every arm of ``config.ablate.grid`` with every seed, all arms of the first seed first.

    A grid is a product of lists, ``a=1,2; b=x,y`` (four arms), or some, ``a=1,2 | b=x`` (three).

    Raises:
        ConfigError: a field that there is not or that no arm may change, a list without values, an
            arm whose config is wrong, two that mean the same, no seeds.
    """
    seeds = config.ablate.seeds
    require(len(seeds) > 0, "config.ablate.seeds", seeds, "one seed at least")
    require(len(set(seeds)) == len(seeds), "config.ablate.seeds", seeds, "without repetitions")
    choices = [c for product in config.ablate.grid.split("|") for c in _choices(product)]
    jobs, names = [], {}
    for seed, choice in itertools.product(seeds, choices):
        where = f"{FIELD}, {', '.join('='.join(pair) for pair in choice)}"
        try:
            of_job = configuration.override(config, (*choice, ("seed", str(seed))))
            job = Job(_arm(of_job, choice), seed, of_job, create_experiment(of_job))
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
        meaning = seed, job.static_choices, digest(flatten(job.experiment.schedule))
        if meaning in names:
            raise ConfigError(f"{where}: the same as the arm {names[meaning]}")
        names[meaning] = job.arm.name
        jobs.append(job)
    return jobs


def _choices(product: str) -> list[tuple[tuple[str, str], ...]]:
    """Every choice of one value from each list of a product, as fields and texts."""
    axes: dict[str, list[str]] = {}
    for axis in product.split(";"):
        name, _, values = (part.strip() for part in axis.partition("="))
        listed = [value.strip() for value in re.split(r",(?![^(]*\))", values)]
        if not (name and all(listed)):
            form = "FIELD=VALUE,VALUE or several of that with ; between them"
            raise ConfigError(f"{FIELD}: {axis.strip()!r} lacks a value: must be {form}")
        known = [f"{section}." for section in SECTIONS]
        if not name.startswith(tuple(known)):
            raise ConfigError(f"{FIELD}: {name!r} cannot be ablated: must be in {', '.join(known)}")
        if name in axes:
            raise ConfigError(f"{FIELD}: {name} is twice in {product.strip()!r}")
        axes[name] = listed
    return [tuple(zip(axes, values)) for values in itertools.product(*axes.values())]


def _arm(config: ConfigDict, choice: tuple[tuple[str, str], ...]) -> Arm:
    """The arm of a choice, with one name however its values were spelt."""
    fields = {name: configuration.value(config, name) for name, _ in choice}
    return Arm(",".join(f"{name}={_write(value)}" for name, value in fields.items()), fields)


def _write(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return str(value).replace(" ", "")
