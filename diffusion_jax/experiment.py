"""What a config stands for: every object of a run, created and checked before anything is done.

This is where values of the config become arguments; nothing deeper reads a config.
"""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import optax
from jaxtyping import PyTree
from ml_collections import ConfigDict

from diffusion_jax import (
    data,
    learned_schedule,
    losses,
    models,
    process,
    samplers,
    schedules,
    timesteps,
    weightings,
)
from diffusion_jax.config import ConfigError, choose, require
from diffusion_jax.evaluate import EvaluationPlan, FlowPlan
from diffusion_jax.generate import GRID_IMAGES, SamplingPlan
from diffusion_jax.learned_schedule import LearnedSchedule
from diffusion_jax.likelihood import DIVERGENCES, SOLVERS
from diffusion_jax.losses import BatchLosses, Objective
from diffusion_jax.models import Model
from diffusion_jax.schedules import Schedule
from diffusion_jax.train import TrainingPlan
from diffusion_jax.variances import VARIANCES

GRID_STEPS = 50  # of the DDIM grids during training: an ancestral chain would cost minutes
LOG_SNR_ENDS = 13.3, -5.0  # where a learned schedule begins (VDM's code)
VLB_SCALE = 1e-3  # of L_vlb in L_hybrid (iDDPM section 3.1)
MAX_STEPS_PER_CALL = 10  # on accelerators; more brings nothing and delays the logs


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


def create_experiment(config: ConfigDict) -> Experiment:
    """Build everything that needs neither the data nor a device.

    Raises:
        ConfigError: the first field that is wrong, alone or with the others.
    """
    require(config.seed >= 0, "config.seed", config.seed, "at least 0")
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
    objective = create_objective(config, schedule, dataset.levels)
    model = models.create_model(
        config.model, dataset.shape, dataset.num_classes, objective.variance.is_learned
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
    sampling = create_sampling_plan(config, schedule, clip_x_0=dataset.levels is not None)
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
        create_evaluation_plan(config, schedule, clip_x_0=dataset.levels is not None),
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
    given = _arguments("schedule", fields, schedules.config_fields(), function, fields.name)
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


def create_objective(config: ConfigDict, schedule: Schedule, levels: int | None) -> Objective:
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
        levels,
    )


def create_weighting(config: ConfigDict) -> weightings.Weighting:
    """The weighting of a config with its own arguments."""
    fields = config.loss
    function = choose("config.loss.weighting", fields.weighting, weightings.WEIGHTINGS, "weighting")
    given = _arguments("loss", fields, weightings.config_fields(), function, fields.weighting)
    try:
        return function(**given)
    except ValueError as error:
        raise ConfigError(f"config.loss.{error}") from error


def _arguments(
    section: str,
    fields: ConfigDict,
    names: Iterable[str],
    function: Callable[..., Any],
    name: str,
) -> dict[str, Any]:
    """The fields among ``names`` that are set, all of them arguments of the function."""
    parameters = inspect.signature(function).parameters
    given = {field: fields[field] for field in names if fields[field] is not None}
    for field, value in given.items():
        allowed = f"unset, {name} has no such argument ({', '.join(parameters) or 'it has none'})"
        require(field in parameters, f"config.{section}.{field}", value, allowed)
    return given


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
    require(fields.num_images >= 1, "config.sampling.num_images", fields.num_images, "at least 1")
    function = choose("config.sampling.sampler", fields.sampler, samplers.SAMPLERS, "sampler")
    own = _arguments("sampling", fields, ("variance", "eta"), function, fields.sampler)
    if fields.variance is not None:
        variance = choose("config.sampling.variance", fields.variance, VARIANCES, "variance")
        require(
            not variance.is_learned or fields.variance == config.loss.variance,
            "config.sampling.variance",
            fields.variance,
            f"beta, posterior or that of the model, which is {config.loss.variance}",
        )
    if "variance" in inspect.signature(function).parameters:
        own = {"variance": config.loss.variance} | own
    try:
        sampler = function(**own)
        num_steps = len(schedule) if fields.num_steps is None else fields.num_steps
        rows = schedules.respace(schedule, num_steps, fields.spacing)
    except ValueError as error:
        raise ConfigError(f"config.sampling.{error}") from error
    # what these networks put out belongs to one step of the whole chain
    is_whole, native = num_steps == len(schedule), f"unset, or all {len(schedule)} timesteps"
    require(
        config.loss.prediction != "mu" or is_whole,
        "config.sampling.num_steps",
        num_steps,
        f"{native}: the network predicts mu",
    )
    require(
        config.loss.variance != "learned" or "variance" not in own or is_whole,
        "config.sampling.num_steps",
        num_steps,
        f"{native}: the network has learned their variance (learned_range may skip some)",
    )
    require(
        fields.num_frames == 0 or 2 <= fields.num_frames <= len(rows) + 1,
        "config.sampling.num_frames",
        fields.num_frames,
        f"0 or in 2..{len(rows) + 1} (one more than the steps)",
    )
    return SamplingPlan(
        sampler=sampler,
        num_steps=len(rows),
        spacing=fields.spacing,
        grid_steps=len(rows) if config.loss.prediction == "mu" else min(GRID_STEPS, len(schedule)),
        grid_images=min(GRID_IMAGES, fields.num_images),
        num_images=fields.num_images,
        batch_size=min(fields.batch_size, fields.num_images),
        clip_x_0=fields.clip_x_0 and clip_x_0,
        num_frames=fields.num_frames,
    )


def create_evaluation_plan(
    config: ConfigDict, schedule: Schedule, clip_x_0: bool
) -> EvaluationPlan:
    """Which images and timesteps an evaluation takes; the split's size is not known yet."""
    fields = config.evaluate
    for name in ("num_examples", "timesteps_per_call", "flow_examples"):
        least = 0 if name == "flow_examples" else 1
        value = fields[name]
        require(
            value is None or value >= least, f"config.evaluate.{name}", value, f"at least {least}"
        )
    num_timesteps = len(schedule) if fields.num_timesteps is None else fields.num_timesteps
    least = min(2, len(schedule))  # L_0 apart
    allowed = f"in {least}..{len(schedule)}, the timesteps of the schedule"
    require(
        least <= num_timesteps <= len(schedule),
        "config.evaluate.num_timesteps",
        num_timesteps,
        allowed,
    )
    for name, options in (("solver", SOLVERS), ("divergence", DIVERGENCES)):
        choose(f"config.evaluate.flow_{name}", fields[f"flow_{name}"], options, name)
    require(fields.flow_steps >= 1, "config.evaluate.flow_steps", fields.flow_steps, "at least 1")
    flow = None
    if fields.flow_examples:
        require(
            config.loss.prediction != "mu",
            "config.evaluate.flow_examples",
            fields.flow_examples,
            "0: a network that predicts mu says nothing off its own timesteps",
        )
        require(
            bool(schedule.alpha_bar[-1] > 0),
            "config.evaluate.flow_examples",
            fields.flow_examples,
            "0: the schedule ends at zero SNR, where the probability flow has no end",
        )
        flow = FlowPlan(
            fields.flow_examples, fields.flow_steps, fields.flow_solver, fields.flow_divergence
        )
    return EvaluationPlan(
        num_examples=fields.num_examples,
        num_timesteps=num_timesteps,
        batch_size=fields.batch_size,
        timesteps_per_call=min(fields.timesteps_per_call, num_timesteps),
        clip_x_0=fields.clip_x_0 and clip_x_0,
        flow=flow,
    )
