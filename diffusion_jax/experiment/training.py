"""The training plan of a config: numbers of steps, batch size, optimizer and EMA."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import optax
from ml_collections import ConfigDict

from diffusion_jax.config.config import differences
from diffusion_jax.errors import choose, require
from diffusion_jax.experiment.devices import create_precision

MAX_STEPS_PER_CALL = 10  # on accelerators; more are not faster, and delay the logs


class TrainingPlan(NamedTuple):
    """The number of steps, the batch size, the intervals of records, the optimizer and the EMA."""

    num_steps: int
    batch_size: int
    steps_per_call: int | None
    steps_per_call_of_accelerators: int
    log_every_steps: int
    sample_every_steps: int
    checkpoint_every_steps: int
    keep_last: int
    keep_best: int
    keep_step: int | None  # the checkpoint of the weak network that guides this run's samples
    optimizer: optax.GradientTransformation
    ema_decay: float
    ema_warmup: bool
    flip: bool
    precision: str  # of products


def create_training_plan(config: ConfigDict) -> TrainingPlan:
    """The training plan of a config.

    Raises:
        ConfigError: a number out of its range, or calls that do not end at every recorded step.
    """
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
        keep_step=config.guidance.weak_step if config.guidance.weak_workdir is None else None,
        optimizer=create_optimizer(config),
        ema_decay=config.ema.decay,
        ema_warmup=config.ema.warmup,
        flip=config.dataset.flip,
        precision=create_precision(config, "precision"),
    )


def describe_changes(config: ConfigDict, recorded: Mapping[str, Any] | None) -> list[str]:
    """Warnings about a cosine decay if a resumed run has another number of steps than before."""
    changed = {} if recorded is None else differences(config, recorded)
    if config.optimizer.decay != "cosine" or "config.train.num_steps" not in changed:
        return []
    before, now = changed["config.train.num_steps"]
    return [
        f"config.train.num_steps = {now}, it was {before}: the cosine decay of the learning rate "
        f"now ends at step {now}, so the steps that were taken had other rates than those of a run "
        f"of {now} steps"
    ]


def create_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """Clipping of the gradient's global norm, then Adam or AdamW with a linear warm-up.

    Raises:
        ConfigError: an unknown optimizer or decay, or a number out of its range.
    """
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
