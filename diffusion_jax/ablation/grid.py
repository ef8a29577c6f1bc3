"""Read ``config.ablate.grid``: the arms that it lists, and a job for each arm and seed."""

import contextlib
import itertools
import re
from typing import Any

from ml_collections import ConfigDict

from diffusion_jax.ablation.jobs import Ablation, Arm, Job
from diffusion_jax.config.config import override, value_of
from diffusion_jax.config.default import FIELDS, Effect, effect_of
from diffusion_jax.errors import ConfigError, choose, require
from diffusion_jax.evaluation.distances import DISTANCES
from diffusion_jax.experiment.experiment import create_experiment
from diffusion_jax.runtime.checkpoint import digest, flatten

FIELD = "config.ablate.grid"
PARALLEL = ("auto", "device", "sequence", "vmap")

# The fields in which arms may differ. All arms have the same data, batches and number of steps.
ABLATED = {Effect.MODEL, Effect.TRAINING}
LONGEST_NAME = 200  # bytes of an arm's name, which is the name of a folder


def count_jobs(config: ConfigDict) -> int:
    """The number of jobs of a grid, or of this shard of it, without creating the jobs.

    Raises:
        ConfigError: the grid is unset, the grid or the shard cannot be parsed, or
            config.distributed is true.
    """
    text = config.ablate.grid
    require(text is not None, FIELD, text, "set to ablate, to schedule.s=0,0.008 for example")
    allowed = "false: config.ablate.shard divides the jobs of an ablation among processes"
    require(not config.distributed, "config.distributed", config.distributed, allowed)
    num_jobs = len(config.ablate.seeds) * sum(len(_choices(part)) for part in text.split("|"))
    index, num_shards = _shard(config.ablate.shard, num_jobs)
    return len(range(index, num_jobs, num_shards))


def create_ablation(config: ConfigDict) -> Ablation:
    """The ablation that a config describes.

    Raises:
        ConfigError: a field has a wrong value, or the arms cannot be compared.
    """
    fields = config.ablate
    jobs = create_jobs(config)
    choose("config.ablate.parallel", fields.parallel, PARALLEL, "way to run jobs")
    choose("config.ablate.distance", fields.distance, DISTANCES, "distance")
    per_device = fields.arms_per_device
    if fields.parallel in ("vmap", "auto"):
        fits, allowed = per_device is None or per_device >= 1, "at least 1"
    else:
        fits, allowed = per_device is None, "unset: only vmap has several arms on a device"
    require(fits, "config.ablate.arms_per_device", per_device, allowed)
    reference = _reference(config, [job.arm.name for job in jobs])
    _require_comparable(config, jobs)
    index, num_shards = _shard(fields.shard, len(jobs))
    return Ablation(
        jobs=tuple(jobs),
        mine=tuple(jobs[index::num_shards]),
        is_shard=fields.shard is not None,
        reference=reference,
        parallel=fields.parallel,
        arms_per_device=per_device,
        distance=fields.distance,
    )


def _reference(config: ConfigDict, names: list[str]) -> str:
    """The name of the reference arm: the first one, unless the config names another."""
    text = config.ablate.reference
    if text is None:
        return names[0]
    # The name of an arm has one spelling, but a user may spell its values in other ways. A text
    # that cannot be parsed as one choice stays as it is, and ``choose`` refuses it.
    with contextlib.suppress(ValueError):
        (choice,) = _choices(text)
        text = _arm(override(config, choice), choice).name
    return choose("config.ablate.reference", text, sorted(set(names)), "arm")


def _require_comparable(config: ConfigDict, jobs: list[Job]) -> None:
    """Refuse jobs whose samples or schedules cannot be compared."""
    for name, value in (
        ("editing.task", config.editing.task),
        ("guidance.weak_workdir", config.guidance.weak_workdir),
        ("guidance.weak_step", config.guidance.weak_step),
    ):
        require(value is None, f"config.{name}", value, "unset in an ablation")
    num_images = config.sampling.num_images
    require(num_images >= 2, "config.sampling.num_images", num_images, "at least 2, to be scored")
    for job in jobs:
        learned = job.config.schedule.name == "learned"
        require(not learned, FIELD, job.arm.name, "a fixed schedule: each seed would learn another")
    dataset = jobs[0].experiment.dataset
    require(
        dataset.levels is not None and dataset.num_classes is not None,
        "config.dataset.name",
        config.dataset.name,
        "a set of images with labels, to train the classifier that scores samples",
    )


def _shard(text: str | None, num_jobs: int) -> tuple[int, int]:
    """The index of a shard, from 0, and the number of shards: (1, 3) for "2/3"."""
    if text is None:
        return 0, 1
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    numbers = tuple(map(int, match.groups())) if match else (0, 0)
    allowed = f"i/n, with i in 1..n and n at most the {num_jobs} jobs"
    require(1 <= numbers[0] <= numbers[1] <= num_jobs, "config.ablate.shard", text, allowed)
    return numbers[0] - 1, numbers[1]


def create_jobs(config: ConfigDict) -> list[Job]:
    """Create a job for every arm of ``config.ablate.grid`` and every seed, ordered by seed first.

    A grid is a product of lists, ``a=1,2; b=x,y`` (four arms), or a union of products,
    ``a=1,2 | b=x`` (three arms).

    Raises:
        ConfigError: a field is unknown, is in a product twice, or must not differ between arms; a
            list has no values; the config of an arm is wrong; the name of an arm cannot be the
            name of a folder; two arms are the same; or the seeds are empty, repeated or negative.
    """
    seeds = config.ablate.seeds
    require(len(seeds) > 0, "config.ablate.seeds", seeds, "one seed at least")
    require(len(set(seeds)) == len(seeds), "config.ablate.seeds", seeds, "without repetitions")
    fits = all(0 <= seed < 2**63 for seed in seeds)
    require(fits, "config.ablate.seeds", seeds, "in [0, 2^63)")
    arms: list[Job] = []
    names: dict[Any, str] = {}
    for choice in (c for product in config.ablate.grid.split("|") for c in _choices(product)):
        where = f"{FIELD}, {', '.join('='.join(pair) for pair in choice)}"
        try:
            of_arm = override(config, choice)
            job = Job(
                arm=_arm(of_arm, choice),
                seed=config.seed,
                config=of_arm,
                experiment=create_experiment(of_arm),
            )
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
        name = job.arm.name
        fits = "/" not in name and len(name.encode()) <= LONGEST_NAME
        require(fits, FIELD, name, f"at most {LONGEST_NAME} bytes without /, to name a folder")
        meaning = job.static_choices, digest(flatten(job.experiment.schedule))
        if meaning in names:
            raise ConfigError(f"{where}: the same as the arm {names[meaning]}")
        names[meaning] = name
        arms.append(job)
    return [
        job._replace(
            seed=seed,
            config=override(job.config, [("seed", str(seed))]),
            experiment=job.experiment._replace(seed=seed),
        )
        for seed, job in itertools.product(seeds, arms)
    ]


def _choices(product: str) -> list[tuple[tuple[str, str], ...]]:
    """The choices of a product: one value from each list, as pairs of a field and a text."""
    axes: dict[str, list[str]] = {}
    for axis in product.split(";"):
        name, _, values = (part.strip() for part in axis.partition("="))
        listed = [value.strip() for value in re.split(r",(?![^(]*\))", values)]
        if not (name and all(listed)):
            form = "FIELD=VALUE,VALUE or several of these with ; between them"
            raise ConfigError(f"{FIELD}: {axis.strip()!r} lacks a value: must be {form}")
        is_section = "." not in name and name not in FIELDS
        if is_section or effect_of(name) not in ABLATED:
            fitting = (other for other, field in FIELDS.items() if field.effect in ABLATED)
            known = dict.fromkeys("".join(other.partition(".")[:2]) for other in fitting)
            raise ConfigError(f"{FIELD}: {name!r} cannot be ablated: must be in {', '.join(known)}")
        if name in axes:
            raise ConfigError(f"{FIELD}: {name} is twice in {product.strip()!r}")
        axes[name] = listed
    return [tuple(zip(axes, values)) for values in itertools.product(*axes.values())]


def _arm(config: ConfigDict, choice: tuple[tuple[str, str], ...]) -> Arm:
    """The arm of a choice; its name does not depend on how the user spelt the values."""
    fields = {name: value_of(config, name) for name, _ in choice}
    return Arm(",".join(f"{name}={_write(value)}" for name, value in fields.items()), fields)


def _write(value: Any) -> str:
    """The text of a value in the name of an arm: a short, exact spelling without spaces."""
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return str(value).replace(" ", "")
