"""What a config stands for: every object of a run, created and checked before anything is done.

This is where values of the config become arguments; nothing deeper reads a config.
"""

import functools
import inspect
import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import PyTree
from ml_collections import ConfigDict

from diffusion_jax import config as configuration
from diffusion_jax import (
    data,
    learned_schedule,
    losses,
    models,
    process,
    schedules,
    timesteps,
    weightings,
)
from diffusion_jax.checkpoint import digest, flatten
from diffusion_jax.config import ConfigError, choose, function_arguments, require
from diffusion_jax.evaluate import EvaluationPlan
from diffusion_jax.generate import EditedImages, Network, SamplingPlan
from diffusion_jax.learned_schedule import LearnedSchedule
from diffusion_jax.losses import BatchLosses, Objective
from diffusion_jax.models import Model
from diffusion_jax.plans import (
    create_evaluation_plan,
    create_sampling_plan,
    create_training_plan,
)
from diffusion_jax.schedules import Schedule
from diffusion_jax.train import TrainingPlan
from diffusion_jax.variances import VARIANCES

LOG_SNR_ENDS = 13.3, -5.0  # where a learned schedule begins (VDM's code)
VLB_SCALE = 1e-3  # of L_vlb in L_hybrid (iDDPM section 3.1)


class Experiment(NamedTuple):
    """All that a run is made of."""

    seed: int
    dataset: data.DatasetInfo
    schedule: Schedule  # of a learned one, what it is before training
    schedule_title: str
    num_clipped: int
    schedule_of: Callable[[PyTree], Schedule]  # the parameters: only a learned one asks for them
    model: Model
    objective: Objective
    batch_losses: Callable[..., BatchLosses]
    training: TrainingPlan
    sampling: SamplingPlan
    evaluation: EvaluationPlan


def require_batches(config: ConfigDict) -> None:
    """Refuse batches of nothing, which the number of devices is chosen by.

    Raises:
        ConfigError: a batch size below 1.
    """
    for section in ("train", "sampling", "evaluate"):
        size = config[section].batch_size
        require(size >= 1, f"config.{section}.batch_size", size, "at least 1")


def create_experiment(config: ConfigDict) -> Experiment:
    """Build everything that needs neither the data nor a device.

    Raises:
        ConfigError: the first field that is wrong, alone or with the others.
    """
    require(0 <= config.seed < 2**63, "config.seed", config.seed, "in [0, 2^63)")
    dataset = data.describe(config.dataset)
    height = dataset.shape[0] if dataset.levels else None
    recipe = create_learned_schedule(config)
    if recipe is None:
        schedule, title, num_clipped = create_schedule(config, height)
    else:
        schedule = learned_schedule.initial(recipe, config.seed)
        title, num_clipped = (
            f"learned({', '.join(f'{k}={v}' for k, v in recipe._asdict().items())})",
            0,
        )
    objective = create_objective(config, schedule, dataset)
    model = models.create_model(
        config.model, dataset.shape, dataset.num_classes, objective.variance.is_learned
    )
    require(
        objective.label_dropout == 0 or config.model.class_conditional,
        "config.loss.label_dropout",
        objective.label_dropout,
        "0: the network is told no labels (config.model.class_conditional = False)",
    )
    if recipe is None:
        batch_losses = functools.partial(losses.batch_losses, objective, model.apply)

        def schedule_of(params: PyTree) -> Schedule:
            return schedule
    else:
        model = learned_schedule.joint(model, recipe)
        batch_losses = functools.partial(
            learned_schedule.batch_losses, objective, recipe, model.apply
        )

        def schedule_of(params: PyTree) -> Schedule:
            return learned_schedule.discretise(recipe, params["schedule"])

    training = create_training_plan(config)
    sampling = create_sampling_plan(config, schedule, dataset)
    return Experiment(
        config.seed,
        dataset,
        schedule,
        title,
        num_clipped,
        schedule_of,
        model,
        objective,
        batch_losses,
        training,
        sampling,
        create_evaluation_plan(config, schedule, dataset),
    )


def create_learned_schedule(config: ConfigDict) -> LearnedSchedule | None:
    """The recipe of schedule "learned"; every other name is a function in schedules.py.

    It is trained by the bound in continuous time, which settles other fields.
    """
    fields = config.schedule
    ends = {"log_snr_start": fields.log_snr_start, "log_snr_end": fields.log_snr_end}
    if fields.name != "learned":
        for name, value in ends.items():
            require(value is None, f"config.schedule.{name}", value, "unset: only learned has it")
        return None
    start, end = (
        default if value is None else value for default, value in zip(LOG_SNR_ENDS, ends.values())
    )
    require(-20 < start <= 20, "config.schedule.log_snr_start", start, "in (-20, 20]")
    require(-20 <= end < start, "config.schedule.log_snr_end", end, f"in [-20, {start})")
    require(
        fields.num_timesteps >= 2,
        "config.schedule.num_timesteps",
        fields.num_timesteps,
        "at least 2",
    )
    for name in (*schedules.config_fields(), "base_resolution"):
        require(
            fields[name] is None,
            f"config.schedule.{name}",
            fields[name],
            "unset: learned has no such argument",
        )
    for field, value, wanted in (
        ("schedule.zero_terminal_snr", fields.zero_terminal_snr, (False,)),
        ("loss.weighting", config.loss.weighting, ("vlb",)),
        ("loss.variance", config.loss.variance, ("beta", "posterior")),
        ("loss.timesteps", config.loss.timesteps, ("low_discrepancy",)),
        ("loss.prediction", config.loss.prediction, ("eps", "x_0", "v", "score")),
    ):
        allowed = (
            f"{' or '.join(map(str, wanted))}: a learned schedule is trained in continuous time"
        )
        require(value in wanted, f"config.{field}", value, allowed)
    return LearnedSchedule(fields.num_timesteps, start, end)


def create_schedule(config: ConfigDict, height: int | None) -> tuple[Schedule, str, int]:
    """The schedule of a config, its name with all arguments, and how many betas were clipped."""
    fields = config.schedule
    names = schedules.SCHEDULES | {"learned": None}  # which create_learned_schedule has seen to
    function = choose("config.schedule.name", fields.name, names, "schedule")
    parameters = inspect.signature(function).parameters
    given = function_arguments("schedule", fields, schedules.config_fields(), function, fields.name)
    title = {"num_timesteps": fields.num_timesteps} if "num_timesteps" in parameters else {}
    title |= {n: p.default for n, p in parameters.items() if p.default is not p.empty} | given
    if "betas" in parameters:
        given["betas"] = _read_betas(fields.betas)
    elif "num_timesteps" in parameters:
        given["num_timesteps"] = fields.num_timesteps
    try:
        schedule = function(**given)
        clips = [np.float32(title[name]) for name in ("max_beta", "min_beta") if name in title]
        num_clipped = int(np.isin(schedule.beta, [clip for clip in clips if clip > 0]).sum())
        if fields.base_resolution is not None:
            require(
                height is not None,
                "config.schedule.base_resolution",
                fields.base_resolution,
                "unset: the data have no resolution",
            )
            schedule = schedules.shift_log_snr(schedule, height, fields.base_resolution)
        if fields.zero_terminal_snr:
            schedule = schedules.zero_terminal_snr(schedule)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"config.schedule.{error}") from error
    text = f"{fields.name}({', '.join(f'{name}={value}' for name, value in title.items())})"
    return schedule, text, num_clipped


def _read_betas(path: str | None) -> np.ndarray:
    require(path is not None, "config.schedule.betas", path, "the path of a .npy file")
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"config.schedule.betas = {path!r}: {error}") from error


def create_objective(
    config: ConfigDict, schedule: Schedule, dataset: data.DatasetInfo
) -> Objective:
    """The objective of a config; the schedule decides what can be predicted at all."""
    fields = config.loss
    parametrisation = choose(
        "config.loss.prediction", fields.prediction, process.PREDICTIONS, "prediction"
    )
    require(
        fields.prediction not in process.NEEDS_SIGNAL or bool(schedule.alpha_bar[-1] > 0),
        "config.loss.prediction",
        fields.prediction,
        "x_0, v or mu: the schedule ends at zero SNR, where x_t says nothing of x_0",
    )
    variance = choose("config.loss.variance", fields.variance, VARIANCES, "variance")
    weighting = create_weighting(config)
    is_vlb = fields.weighting == "vlb"
    if fields.vlb_scale is not None:
        require(
            variance.is_learned and not is_vlb,
            "config.loss.vlb_scale",
            fields.vlb_scale,
            "unset: only a weighted error beside a learned variance has L_vlb added to it",
        )
        require(fields.vlb_scale > 0, "config.loss.vlb_scale", fields.vlb_scale, "above 0")
    dropout = fields.label_dropout
    require(0 <= dropout < 1, "config.loss.label_dropout", dropout, "in [0, 1)")
    return Objective(
        parametrisation,
        weighting,
        is_vlb,
        variance,
        VLB_SCALE if fields.vlb_scale is None else fields.vlb_scale,
        choose(
            "config.loss.timesteps",
            fields.timesteps,
            timesteps.TIMESTEP_SAMPLERS,
            "timestep sampler",
        ),
        dataset.levels,
        dataset.num_classes,
        dropout,
    )


def create_weighting(config: ConfigDict) -> weightings.Weighting:
    """The weighting of a config with its own arguments."""
    fields = config.loss
    function = choose("config.loss.weighting", fields.weighting, weightings.WEIGHTINGS, "weighting")
    given = function_arguments(
        "loss", fields, weightings.config_fields(), function, fields.weighting
    )
    try:
        return function(**given)
    except ValueError as error:
        raise ConfigError(f"config.loss.{error}") from error


def create_edited_images(config: ConfigDict, dataset: data.DatasetInfo) -> EditedImages | None:
    """The files of config.editing, as x_0; None where it has no task."""
    fields = config.editing
    if fields.task is None:
        return None
    shapes = {"images": dataset.shape, "mask": (*dataset.shape[:2], 1)}
    read = {}
    for name, shape in shapes.items():
        if fields[name] is not None:
            try:
                read[name] = data.read_images(fields[name], shape)
            except ValueError as error:
                raise ConfigError(f"config.editing.{name} = {fields[name]!r}: {error}") from error
    mask = read.get("mask", np.full((1, *shapes["mask"]), 255, np.uint8))
    allowed = "one image, black (kept) and white (made anew) alone"
    require(
        len(mask) == 1 and np.isin(mask, (0, 255)).all(),
        "config.editing.mask",
        fields.mask,
        allowed,
    )
    least = 2 if fields.task == "interpolate" else 1
    allowed = f"at least {least} images, in an .npz"
    require(len(read["images"]) >= least, "config.editing.images", fields.images, allowed)
    x_0 = data.from_uint8(read["images"], dataset.levels)
    return EditedImages(x_0, np.float32(mask[0] / 255))


class Weak(NamedTuple):
    """The network that guides by being worse, and where its parameters are."""

    network: Network
    workdir: pathlib.Path
    step: int | None  # None: the newest


def create_weak(config: ConfigDict, experiment: Experiment, path: pathlib.Path) -> Weak | None:
    """The weak network of autoguidance; None where config.guidance names none.

    Raises:
        ConfigError: there is no run in its folder, or one on other data or another schedule.
    """
    fields = config.guidance
    if fields.weak_workdir is None:
        network = Network(experiment.model, experiment.objective)
        return None if fields.weak_step is None else Weak(network, path, fields.weak_step)
    path, where = pathlib.Path(fields.weak_workdir), fields.weak_workdir
    record = path / "config.json"
    require(record.is_file(), "config.guidance.weak_workdir", where, "the folder of a run")
    recorded = json.loads(record.read_text())
    field = "config.guidance.weak_workdir"
    require(config.schedule.name != "learned", field, where, "unset: the schedule was learned")
    for name, (before, now) in configuration.differences(config, recorded).items():
        is_data = name.startswith(("config.schedule.", "config.dataset.name"))
        fixed = is_data or name == "config.model.class_conditional"
        require(not fixed, field, where, f"a run with {name} = {now!r}, not {before!r}")
    other = config.copy_and_resolve_references().unlock()
    for section in ("model", "loss"):
        values = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in recorded[section].items()
        }
        kept = {} if section == "model" else config[section].to_dict()
        other[section] = ConfigDict(kept | values)
    objective = create_objective(other, experiment.schedule, experiment.dataset)
    dataset = experiment.dataset
    model = models.create_model(
        other.model, dataset.shape, dataset.num_classes, objective.variance.is_learned
    )
    return Weak(Network(model, objective), path, fields.weak_step)


def create_job(config: ConfigDict, params: PyTree, given: EditedImages | None) -> dict[str, Any]:
    """What the samples of a run depend on, for a killed job to go on with the same."""
    sections = {name: config[name].to_dict() for name in ("sampling", "guidance", "editing")}
    for name in ("batch_size", "num_frames", "compared_steps"):
        del sections["sampling"][name]
    return {"seed": config.seed, "digest": digest(flatten((params, given))), **sections}
