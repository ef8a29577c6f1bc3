"""The weak network of autoguidance: an earlier checkpoint of the run, or one of another run."""

import logging
import pathlib
from typing import NamedTuple

from jaxtyping import PyTree
from ml_collections import ConfigDict

from diffusion_jax.config.config import differences
from diffusion_jax.diffusion.network import Network
from diffusion_jax.errors import ConfigError, WorkdirError, require
from diffusion_jax.experiment.experiment import Experiment
from diffusion_jax.experiment.objective import create_objective
from diffusion_jax.experiment.training import TrainingPlan
from diffusion_jax.models import create_model
from diffusion_jax.runtime.checkpoint import restore_average, saved_steps
from diffusion_jax.runtime.workdir import Workdir

LOG = logging.getLogger("diffusion_jax")


class Weak(NamedTuple):
    """The weak network of autoguidance, and the checkpoint that has its parameters."""

    network: Network
    workdir: pathlib.Path
    step: int | None  # None: the newest


def create_weak(config: ConfigDict, experiment: Experiment, path: pathlib.Path) -> Weak | None:
    """The weak network of autoguidance; None if config.guidance names none.

    Raises:
        ConfigError: there is no run in its folder; its run has another data set, another schedule
            or other labels; or the schedule of this run is learned.
    """
    fields = config.guidance
    if fields.weak_workdir is None:
        if fields.weak_step is None:
            return None
        return Weak(network=experiment.network, workdir=path, step=fields.weak_step)
    path, where = pathlib.Path(fields.weak_workdir), fields.weak_workdir
    field = "config.guidance.weak_workdir"
    try:
        recorded = Workdir(path).read_record()
    except WorkdirError as error:
        raise ConfigError(f"config.guidance.weak_{error}") from error
    if recorded is None:
        require(False, field, where, "the folder of a run")
    require(config.schedule.name != "learned", field, where, "unset: the schedule was learned")
    for name, (before, now) in differences(config, recorded).items():
        is_data = name.startswith(("config.schedule.", "config.dataset.name"))
        fixed = is_data or name == "config.model.class_conditional"
        require(not fixed, field, where, f"a run with {name} = {now!r}, not {before!r}")
    other = config.copy_and_resolve_references().unlock()
    for section in ("model", "loss"):
        values = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in recorded[section].items()
        }
        base = {} if section == "model" else config[section].to_dict()
        other[section] = ConfigDict(base | values)
    objective = create_objective(other, experiment.schedule, experiment.dataset)
    dataset = experiment.dataset
    model = create_model(
        other.model.to_dict(),
        dataset.shape,
        dataset.num_classes,
        learned_variance=objective.variance.is_learned,
    )
    return Weak(network=Network(model, objective), workdir=path, step=fields.weak_step)


def is_ahead(weak: Weak | None, workdir: Workdir, plan: TrainingPlan) -> bool:
    """Whether the weak network is a checkpoint of this run that is not saved yet.

    Raises:
        ConfigError: this run has not saved that checkpoint and will not save it.
    """
    if weak is None or weak.step is None or plan.keep_step is None:
        return False
    steps, every = saved_steps(workdir.checkpoints), plan.checkpoint_every_steps
    is_saved = weak.step % every == 0 or weak.step == plan.num_steps
    is_coming = is_saved and max(steps, default=0) < weak.step <= plan.num_steps
    allowed = f"one of the checkpoints {steps}, or a later step that is saved: every {every} steps"
    allowed += f", and {plan.num_steps}"
    require(is_coming or weak.step in steps, "config.guidance.weak_step", weak.step, allowed)
    return is_coming


def restore_weak(weak: Weak | None) -> PyTree:
    """The averaged parameters of the weak network; None if there is no weak network.

    Raises:
        ConfigError: there is no such checkpoint.
    """
    if weak is None:
        return None
    template = weak.network.model.template
    try:
        params, step = restore_average(
            template, weak.workdir, weak.step, field="config.guidance.weak_step"
        )
    except WorkdirError as error:
        raise ConfigError(f"config.guidance.weak_{error}") from error
    LOG.info("guided away from step %d of %s", step, weak.workdir)
    return params
