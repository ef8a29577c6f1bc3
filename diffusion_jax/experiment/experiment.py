"""The objects of a run, created from its config and checked before anything is written.

This folder turns values of the config into arguments: the library in diffusion/ reads no config.
"""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import PyTree
from ml_collections import ConfigDict

from diffusion_jax.data.dataset import DatasetInfo
from diffusion_jax.diffusion import learned_schedule
from diffusion_jax.diffusion.losses import LossesOf, Objective
from diffusion_jax.diffusion.network import Model, Network
from diffusion_jax.diffusion.objectives import OBJECTIVES
from diffusion_jax.diffusion.schedules.schedule import Schedule
from diffusion_jax.errors import require
from diffusion_jax.experiment.dataset import create_dataset_info
from diffusion_jax.experiment.evaluation import EvaluationPlan, create_evaluation_plan
from diffusion_jax.experiment.objective import create_objective
from diffusion_jax.experiment.sampling import SamplingPlan, create_sampling_plan
from diffusion_jax.experiment.schedule import (
    NamedSchedule,
    create_learned_schedule,
    create_schedule,
)
from diffusion_jax.experiment.training import TrainingPlan, create_training_plan
from diffusion_jax.models import create_model


class Experiment(NamedTuple):
    """The data set's properties, model, objective, schedule and plans of a run."""

    seed: int
    dataset: DatasetInfo
    schedule: Schedule  # a learned one as it is before training
    schedule_title: str
    num_clipped: int
    schedule_of: Callable[[PyTree], Schedule]  # of the parameters, which only a learned one uses
    model: Model
    objective: Objective
    losses_of: LossesOf
    training: TrainingPlan
    sampling: SamplingPlan
    evaluation: EvaluationPlan
    about: dict[str, str]  # what evaluation.json says of the model

    @property
    def network(self) -> Network:
        """The model, with the objective that says what its output means."""
        return Network(model=self.model, objective=self.objective)


def require_batches(config: ConfigDict) -> None:
    """Check the batch sizes, because the number of devices is chosen from them.

    Raises:
        ConfigError: a batch size below 1.
    """
    for section in ("train", "sampling", "evaluate"):
        size = config[section].batch_size
        require(size >= 1, f"config.{section}.batch_size", size, "at least 1")


def create_experiment(config: ConfigDict) -> Experiment:
    """Create and check all objects of a run that do not need the examples of the data set.

    Raises:
        ConfigError: the first field that is wrong by itself or together with others.
    """
    require(0 <= config.seed < 2**63, "config.seed", config.seed, "in [0, 2^63)")
    dataset = create_dataset_info(config)
    recipe = create_learned_schedule(config)
    if recipe is None:
        named = create_schedule(config, dataset.shape[0] if dataset.levels else None)
    else:
        title = f"learned({', '.join(f'{k}={v}' for k, v in recipe._asdict().items())})"
        schedule = learned_schedule.initial(recipe, config.seed)
        named = NamedSchedule(schedule=schedule, title=title, num_clipped=0)
    schedule = named.schedule
    objective = create_objective(config, schedule, dataset)
    model = create_model(
        config.model.to_dict(),
        dataset.shape,
        dataset.num_classes,
        learned_variance=objective.variance.is_learned,
    )
    dropout = objective.label_dropout
    allowed = "0: the network has no labels (config.model.class_conditional = False)"
    is_conditional = config.model.class_conditional
    require(dropout == 0 or is_conditional, "config.loss.label_dropout", dropout, allowed)
    if recipe is None:
        losses_of = OBJECTIVES["discrete_time"](objective, model.apply)

        def schedule_of(params: PyTree) -> Schedule:
            return schedule
    else:
        model = learned_schedule.joint(model, recipe)
        losses_of = OBJECTIVES["continuous_time"](objective, model.apply, recipe)

        def schedule_of(params: PyTree) -> Schedule:
            return learned_schedule.discretise(recipe, params["schedule"])

    return Experiment(
        seed=config.seed,
        dataset=dataset,
        schedule=schedule,
        schedule_title=named.title,
        num_clipped=named.num_clipped,
        schedule_of=schedule_of,
        model=model,
        objective=objective,
        losses_of=losses_of,
        training=create_training_plan(config),
        sampling=create_sampling_plan(config, schedule, dataset),
        evaluation=create_evaluation_plan(config, schedule, dataset),
        about={
            "prediction": config.loss.prediction,
            "weighting": config.loss.weighting,
            "variance": config.loss.variance,
            "schedule": named.title,
        },
    )
