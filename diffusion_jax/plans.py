"""How long a run trains, how it samples, what it evaluates: the plans that a config stands for.

With ``experiment`` this is where values of the config become arguments; nothing deeper reads one.
"""

import inspect
from typing import Any

import optax
from ml_collections import ConfigDict

from diffusion_jax import data, editing, samplers
from diffusion_jax.config import ConfigError, choose, function_arguments, require
from diffusion_jax.evaluate import EvaluationPlan, FlowPlan
from diffusion_jax.generate import GRID_IMAGES, Chain, EditingPlan, Guidance, SamplingPlan
from diffusion_jax.likelihood import DIVERGENCES, SOLVERS
from diffusion_jax.samplers import Sampler
from diffusion_jax.schedules import Schedule
from diffusion_jax.spacings import GRIDS, SPACINGS
from diffusion_jax.train import TrainingPlan
from diffusion_jax.variances import VARIANCES

GRID_STEPS = 50  # of the DDIM grids during training: an ancestral chain would cost minutes
MAX_STEPS_PER_CALL = 10  # on accelerators; more brings nothing and delays the logs
NUM_FRAMES = 40  # of the animations, where there are as many steps
RHO = 7.0  # of EDM's grid (Karras et al. 2022)
UNCONDITIONAL = "unset: the network is told no labels (config.model.class_conditional = False)"


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


def create_sampling_plan(
    config: ConfigDict, schedule: Schedule, dataset: data.DatasetInfo
) -> SamplingPlan:
    """The chain of a config with its sampler, guidance and editing."""
    fields = config.sampling
    require(fields.num_images >= 1, "config.sampling.num_images", fields.num_images, "at least 1")
    is_conditional = config.model.class_conditional
    sampler = _create_sampler(config)
    edit = _create_editing_plan(config, schedule, dataset, is_conditional)
    used = schedule if edit is None else edit.rows(schedule)
    chain = _create_chain(config, used)
    rows = _check_chain(config, used, sampler, chain, "config.sampling.num_steps")
    for num_steps in fields.compared_steps:
        compared = chain._replace(num_steps=num_steps)
        _check_chain(config, used, sampler, compared, "config.sampling.compared_steps")
    if edit is not None:
        _check_editing(config, edit, sampler, rows)
    num_frames = fields.num_frames
    if num_frames is None:
        num_frames = 0 if edit else min(NUM_FRAMES, len(rows) + 1)
    require(
        num_frames == 0 or 2 <= num_frames <= len(rows) + 1,
        "config.sampling.num_frames",
        num_frames,
        f"0 or in 2..{len(rows) + 1} (one more than the steps)",
    )
    if fields.label is not None:
        classes = dataset.num_classes if is_conditional else 0
        allowed = f"a class, in 0..{classes - 1}" if is_conditional else UNCONDITIONAL
        require(0 <= fields.label < classes, "config.sampling.label", fields.label, allowed)
    threshold = fields.dynamic_threshold
    if threshold is not None:
        field = "config.sampling.dynamic_threshold"
        require(dataset.levels is not None, field, threshold, "unset: points have no range")
        require(0 < threshold <= 1, field, threshold, "in (0, 1]")
    is_mu = config.loss.prediction == "mu"
    return SamplingPlan(
        sampler=sampler,
        chain=chain,
        grid_steps=len(schedule) if is_mu else min(GRID_STEPS, len(schedule)),
        grid_images=min(GRID_IMAGES, fields.num_images),
        num_images=fields.num_images,
        batch_size=min(fields.batch_size, fields.num_images),
        clip_x_0=fields.clip_x_0 and dataset.levels is not None,
        dynamic_threshold=threshold,
        num_frames=num_frames,
        compared_steps=fields.compared_steps,
        is_conditional=is_conditional,
        label=fields.label,
        guidance=_create_guidance(config, schedule, is_conditional),
        editing=edit,
    )


def _create_sampler(config: ConfigDict) -> Sampler:
    fields = config.sampling
    function = choose("config.sampling.sampler", fields.sampler, samplers.SAMPLERS, "sampler")
    names = samplers.config_fields()
    own = function_arguments("sampling", fields, names, function, fields.sampler)
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
        return function(**own)
    except ValueError as error:
        raise ConfigError(f"config.sampling.{error}") from error


def _create_chain(config: ConfigDict, schedule: Schedule) -> Chain:
    fields = config.sampling
    choose("config.sampling.spacing", fields.spacing, SPACINGS | GRIDS, "spacing")
    num_steps = len(schedule) if fields.num_steps is None else fields.num_steps
    for name in ("rho", "sigma_min", "sigma_max"):
        takes = fields.spacing in GRIDS and (name != "rho" or fields.spacing == "karras")
        allowed = f"unset: the spacing {fields.spacing} has no such argument"
        require(takes or fields[name] is None, f"config.sampling.{name}", fields[name], allowed)
    rho = RHO if fields.rho is None else fields.rho
    return Chain(num_steps, fields.spacing, rho, fields.sigma_min, fields.sigma_max)


def _check_chain(
    config: ConfigDict, schedule: Schedule, sampler: Sampler, chain: Chain, field: str
) -> Schedule:
    """The rows of a chain, if this network and this sampler can take its steps."""
    fields = config.sampling
    is_grid = fields.spacing in GRIDS
    more = "" if is_grid else " (log_snr and karras go between the timesteps)"
    fits = chain.num_steps >= 1 and (is_grid or chain.num_steps <= len(schedule))
    allowed = "at least 1" if is_grid else f"in 1..{len(schedule)}{more}"
    require(fits, field, chain.num_steps, allowed)
    # what these networks put out belongs to one step of the whole chain
    parameters = inspect.signature(samplers.SAMPLERS[fields.sampler]).parameters
    takes_learned = (
        "variance" in parameters and (fields.variance or config.loss.variance) == "learned"
    )
    is_whole = chain.num_steps == len(schedule)
    for is_tied, why in (
        (config.loss.prediction == "mu", "the network predicts mu"),
        (takes_learned, "the network has learned their variance (learned_range may skip some)"),
    ):
        if is_tied:
            allowed = f"unset, or all {len(schedule)} timesteps: {why}"
            require(is_whole, field, chain.num_steps, allowed)
            allowed = f"one of {', '.join(SPACINGS)}: {why}"
            require(not is_grid, "config.sampling.spacing", fields.spacing, allowed)
            allowed = f"one that stays on the timesteps: {why}"
            stays = not sampler.goes_off_grid
            require(stays, "config.sampling.sampler", fields.sampler, allowed)
    try:
        rows = chain.rows(schedule)
    except ValueError as error:
        raise ConfigError(f"config.sampling.{error}") from error
    require(
        bool(rows.alpha_bar[-1] > 0) or not sampler.needs_signal,
        "config.sampling.sampler",
        fields.sampler,
        "another: its noise levels have no end where the schedule ends at zero SNR",
    )
    return rows


def _create_guidance(
    config: ConfigDict, schedule: Schedule, is_conditional: bool
) -> Guidance | None:
    fields = config.guidance
    if fields.weight is None:
        for name, value in fields.items():
            allowed = "unset: it says how config.guidance.weight is used, which is unset"
            require(value is None, f"config.guidance.{name}", value, allowed)
        return None
    if fields.weak_workdir is None and fields.weak_step is None:
        field = "config.guidance.weight", fields.weight
        require(is_conditional, *field, UNCONDITIONAL)
        require(
            config.loss.label_dropout > 0,
            *field,
            "unset: the network was never trained without a label (config.loss.label_dropout = 0)",
        )
    interval = []
    for name, end in (("interval_start", 1.0), ("interval_end", float(len(schedule)))):
        value = end if fields[name] is None else fields[name]
        allowed = f"a timestep of the schedule, in [1, {len(schedule)}]"
        require(1 <= value <= len(schedule), f"config.guidance.{name}", value, allowed)
        interval.append(value)
    rescale = 0.0 if fields.rescale is None else fields.rescale
    require(fields.weight >= 0, "config.guidance.weight", fields.weight, "at least 0")
    require(0 <= rescale <= 1, "config.guidance.rescale", rescale, "in [0, 1]")
    allowed = f"at least the start, {interval[0]:g}"
    require(interval[0] <= interval[1], "config.guidance.interval_end", interval[1], allowed)
    return Guidance(fields.weight, tuple(interval), rescale)


# The fields of config.editing that each task has beside its images, and what they are if unset.
OF_EDITS: dict[str, dict[str, Any]] = {
    "image_to_image": {"timestep": None},
    "inpaint": {"mask": None, "timestep": None, "num_resamples": 10, "jump_length": 10},
    "interpolate": {"timestep": None},
    "variations": {"timestep": None, "strength": 0.3},
}


def _create_editing_plan(
    config: ConfigDict, schedule: Schedule, dataset: data.DatasetInfo, is_conditional: bool
) -> EditingPlan | None:
    fields, section = config.editing, "config.editing"
    if fields.task is None:
        for name, value in fields.items():
            allowed = "unset: there is no config.editing.task"
            require(value is None, f"{section}.{name}", value, allowed)
        return None
    own = choose(f"{section}.task", fields.task, OF_EDITS, "task")
    allowed = "unset: the data are points"
    require(dataset.levels is not None, f"{section}.task", fields.task, allowed)
    for name, value in fields.items():
        if name not in ("task", "images", *own):
            allowed = f"unset: {fields.task} has no such argument"
            require(value is None, f"{section}.{name}", value, allowed)
    for name in ("images", "mask") if "mask" in own else ("images",):
        require(fields[name] is not None, f"{section}.{name}", fields[name], "the path of a file")
    given = {n: v if fields[n] is None else fields[n] for n, v in own.items()}
    timestep = given["timestep"]
    if fields.task == "image_to_image":
        allowed = "set: the image is noised up to it, and at T nothing is left of it"
        require(timestep is not None, f"{section}.timestep", timestep, allowed)
    if timestep is not None:
        allowed = f"in 1..{len(schedule)}, the timesteps of the schedule"
        require(1 <= timestep <= len(schedule), f"{section}.timestep", timestep, allowed)
    for name in ("compared_steps", "num_frames"):
        value = config.sampling[name]
        allowed = "unset: given images are edited"
        require(not value, f"config.sampling.{name}", value, allowed)
    allowed = "set: given images have one class (config.model.class_conditional = True)"
    label = config.sampling.label
    require(not is_conditional or label is not None, "config.sampling.label", label, allowed)
    return EditingPlan(
        fields.task,
        timestep,
        given.get("strength", 0.0),
        given.get("num_resamples", 1),
        given.get("jump_length", 1),
    )


def _check_editing(config: ConfigDict, plan: EditingPlan, sampler: Sampler, rows: Schedule) -> None:
    named = "config.sampling.sampler", config.sampling.sampler
    if plan.task in ("interpolate", "variations"):
        is_ddim = config.sampling.sampler == "ddim" and not config.sampling.eta
        require(is_ddim, *named, "ddim with eta = 0: the images are inverted by it")
        allowed = "below T: the schedule ends at zero SNR, where nothing can be inverted"
        ends = bool(rows.alpha_bar[-1] > 0)
        require(ends, "config.editing.timestep", plan.timestep, allowed)
    require(0 <= plan.strength <= 1, "config.editing.strength", plan.strength, "in [0, 1]")
    if plan.task == "inpaint":
        allowed = "one without memory, such as ancestral, ddim or heun (inpaint)"
        require(editing.can_wrap(sampler), *named, allowed)
        try:
            editing.check_jumps(plan.num_resamples, plan.jump_length)
            jumps = plan.num_resamples, plan.jump_length
            editing.Inpaint(sampler, None, None, *jumps).path(len(rows))
        except ValueError as error:
            raise ConfigError(f"config.editing.{error}") from error


def create_evaluation_plan(
    config: ConfigDict, schedule: Schedule, dataset: data.DatasetInfo
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
        timesteps_per_call=fields.timesteps_per_call,
        clip_x_0=fields.clip_x_0 and dataset.levels is not None,
        flow=flow,
    )
