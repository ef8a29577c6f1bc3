"""The weaker network of autoguidance: an earlier checkpoint, or another run."""

import pathlib
from typing import NamedTuple

from ml_collections import ConfigDict

from diffusion_jax.config.config import differences
from diffusion_jax.diffusion.network import Network
from diffusion_jax.errors import require
from diffusion_jax.experiment.experiment import Experiment
from diffusion_jax.experiment.objective import create_objective
from diffusion_jax.models import create_model
from diffusion_jax.runtime.workdir import Workdir


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
        if fields.weak_step is None:
            return None
        return Weak(network=experiment.network, workdir=path, step=fields.weak_step)
    path, where = pathlib.Path(fields.weak_workdir), fields.weak_workdir
    field = "config.guidance.weak_workdir"
    recorded = Workdir(path).read_record()
    require(recorded is not None, field, where, "the folder of a run")
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
