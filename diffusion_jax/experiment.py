"""What a config stands for: every object of a run, created and checked before anything is done.

This is where values of the config become arguments; nothing deeper reads a config.
"""

import inspect
from typing import NamedTuple

import numpy as np
import optax
from ml_collections import ConfigDict

from diffusion_jax import data, losses, models, process, samplers, schedules
from diffusion_jax.config import ConfigError, choose, require
from diffusion_jax.generate import GRID_IMAGES, SamplingPlan
from diffusion_jax.losses import Objective
from diffusion_jax.models import Model
from diffusion_jax.schedules import Schedule
from diffusion_jax.train import TrainingPlan

GRID_STEPS = 50  # of the DDIM grids during training: an ancestral chain would cost minutes
MAX_STEPS_PER_CALL = 10  # on accelerators; more brings nothing and delays the logs


class Experiment(NamedTuple):
    """All that a run is made of."""

    seed: int
    dataset: data.DatasetInfo
    schedule: Schedule
    schedule_title: str
    num_clipped: int
    model: Model
    objective: Objective
    training: TrainingPlan
    sampling: SamplingPlan


def create_experiment(config: ConfigDict) -> Experiment:
    """Build everything that needs neither the data nor a device.

    Raises:
        ConfigError: the first field that is wrong, alone or with the others.
    """
    require(config.seed >= 0, "config.seed", config.seed, "at least 0")
    dataset = data.describe(config.dataset)
    height = dataset.shape[0] if dataset.levels else None
    schedule, title, num_clipped = create_schedule(config, height)
    model = models.create_model(config.model, dataset.shape, dataset.num_classes)
    objective = create_objective(config, schedule)
    training = create_training_plan(config)
    sampling = create_sampling_plan(config, schedule, clip_x_0=dataset.levels is not None)
    return Experiment(
        config.seed,
        dataset,
        schedule,
        title,
        num_clipped,
        model,
        objective,
        training,
        sampling,
    )


def create_schedule(config: ConfigDict, height: int | None) -> tuple[Schedule, str, int]:
    """The schedule of a config, its name with all arguments, and how many betas were clipped."""
    fields = config.schedule
    function = choose("config.schedule.name", fields.name, schedules.SCHEDULES, "schedule")
    parameters = inspect.signature(function).parameters
    given = {name: fields[name] for name in schedules.config_fields() if fields[name] is not None}
    for name in given:
        require(
            name in parameters,
            f"config.schedule.{name}",
            given[name],
            f"unset, {fields.name} has no such argument ({', '.join(parameters)})",
        )
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


def create_objective(config: ConfigDict, schedule: Schedule) -> Objective:
    """The objective of a config; the schedule decides what can be predicted at all."""
    name = config.loss.prediction
    parametrisation = choose("config.loss.prediction", name, process.PREDICTIONS, "prediction")
    require(
        name not in process.NEEDS_SIGNAL or bool(schedule.alpha_bar[-1] > 0),
        "config.loss.prediction",
        name,
        "x_0, v or mu: the schedule ends at zero SNR, where x_t says nothing of x_0",
    )
    choose("config.loss.variance", config.loss.variance, process.VARIANCES, "variance")
    return Objective(
        parametrisation,
        choose("config.loss.weighting", config.loss.weighting, losses.WEIGHTINGS, "weighting"),
        choose(
            "config.loss.timesteps",
            config.loss.timesteps,
            losses.TIMESTEP_SAMPLERS,
            "timestep sampler",
        ),
    )


def create_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """Clipping of the gradient's global norm, then Adam or AdamW with a warmed-up rate."""
    fields = config.optimizer
    for name in ("learning_rate", "clip_norm"):
        require(fields[name] > 0, f"config.optimizer.{name}", fields[name], "above 0")
    for name in ("b1", "b2"):
        require(0 <= fields[name] < 1, f"config.optimizer.{name}", fields[name], "in [0, 1)")
    warmup = "config.optimizer.warmup_steps", fields.warmup_steps
    require(fields.warmup_steps >= 0, *warmup, "at least 0")
    adamw = fields.name == "adamw"
    require(
        fields.weight_decay >= 0 and (adamw or fields.weight_decay == 0),
        "config.optimizer.weight_decay",
        fields.weight_decay,
        "at least 0" if adamw else "0, adam has none",
    )
    after_warmup = {
        "constant": optax.constant_schedule(fields.learning_rate),
        "cosine": optax.cosine_decay_schedule(
            fields.learning_rate, max(config.train.num_steps - fields.warmup_steps, 1)
        ),
    }
    rate = optax.join_schedules(
        [
            optax.linear_schedule(0.0, fields.learning_rate, fields.warmup_steps),
            choose("config.optimizer.decay", fields.decay, after_warmup, "decay"),
        ],
        [fields.warmup_steps],
    )
    optimizers = {
        "adamw": lambda: optax.adamw(rate, fields.b1, fields.b2, weight_decay=fields.weight_decay),
        "adam": lambda: optax.adam(rate, fields.b1, fields.b2),
    }
    optimizer = choose("config.optimizer.name", fields.name, optimizers, "optimizer")
    return optax.chain(optax.clip_by_global_norm(fields.clip_norm), optimizer())


def create_training_plan(config: ConfigDict) -> TrainingPlan:
    """How long, how large, how often."""
    train, checkpoint = config.train, config.checkpoint
    for section, name, least in (
        ("train", "num_steps", 1),
        ("train", "log_every_steps", 1),
        ("train", "sample_every_steps", 0),
        ("checkpoint", "every_steps", 1),
        ("checkpoint", "keep_last", 1),
        ("checkpoint", "keep_best", 0),
    ):
        value = config[section][name]
        require(value >= least, f"config.{section}.{name}", value, f"at least {least}")
    require(0 <= config.ema.decay < 1, "config.ema.decay", config.ema.decay, "in [0, 1)")
    # a call of several steps must end at every step that logs, samples or saves
    events = {
        "train.num_steps": train.num_steps,
        "train.log_every_steps": train.log_every_steps,
        "train.sample_every_steps": train.sample_every_steps,
        "checkpoint.every_steps": checkpoint.every_steps,
    }
    if train.steps_per_call is not None:
        field = "config.train.steps_per_call"
        require(train.steps_per_call >= 1, field, train.steps_per_call, "at least 1")
        for name, every in events.items():
            require(
                every % train.steps_per_call == 0,
                field,
                train.steps_per_call,
                f"a divisor of config.{name} = {every}",
            )
    fitting = (
        n for n in range(MAX_STEPS_PER_CALL, 0, -1) if not any(e % n for e in events.values())
    )
    return TrainingPlan(
        num_steps=train.num_steps,
        batch_size=train.batch_size,
        steps_per_call=train.steps_per_call,
        steps_per_call_of_accelerators=next(fitting),
        log_every_steps=train.log_every_steps,
        sample_every_steps=train.sample_every_steps,
        checkpoint_every_steps=checkpoint.every_steps,
        keep_last=checkpoint.keep_last,
        keep_best=checkpoint.keep_best,
        optimizer=create_optimizer(config),
        ema_decay=config.ema.decay,
        ema_warmup=config.ema.warmup,
        flip=config.dataset.flip,
    )


def create_sampling_plan(config: ConfigDict, schedule: Schedule, clip_x_0: bool) -> SamplingPlan:
    """The sampler of a config on its respaced schedule; ``clip_x_0`` only where it makes sense."""
    fields = config.sampling
    for name in ("num_images", "batch_size"):
        require(fields[name] >= 1, f"config.sampling.{name}", fields[name], "at least 1")
    require(0 <= fields.eta <= 1, "config.sampling.eta", fields.eta, "in [0, 1]")
    choose("config.sampling.sampler", fields.sampler, samplers.SAMPLERS, "sampler")
    if fields.variance is not None:
        choose("config.sampling.variance", fields.variance, process.VARIANCES, "variance")
    try:
        sampler = create_sampler(config)
        num_steps = len(schedule) if fields.num_steps is None else fields.num_steps
        rows = schedules.respace(schedule, num_steps, fields.spacing)
    except ValueError as error:
        raise ConfigError(f"config.sampling.{error}") from error
    require(
        fields.num_frames == 0 or 2 <= fields.num_frames <= len(rows) + 1,
        "config.sampling.num_frames",
        fields.num_frames,
        f"0 or in 2..{len(rows) + 1} (one more than the steps)",
    )
    return SamplingPlan(
        schedule=rows,
        sampler=sampler,
        grid_schedule=schedules.respace(schedule, min(GRID_STEPS, len(schedule))),
        grid_images=min(GRID_IMAGES, fields.num_images),
        num_images=fields.num_images,
        batch_size=min(fields.batch_size, fields.num_images),
        clip_x_0=fields.clip_x_0 and clip_x_0,
        num_frames=fields.num_frames,
    )


def create_sampler(config: ConfigDict) -> samplers.Sampler:
    """The sampler of a config with its own arguments."""
    arguments = {
        "variance": config.sampling.variance or config.loss.variance,
        "eta": config.sampling.eta,
    }
    function = samplers.SAMPLERS[config.sampling.sampler]
    return function(**{name: arguments[name] for name in inspect.signature(function).parameters})
