"""The evaluation plan of a config: images of the test split, timesteps, probability flow."""

from typing import NamedTuple

from ml_collections import ConfigDict

from diffusion_jax.data.dataset import DatasetInfo, Split
from diffusion_jax.diffusion.likelihood import DIVERGENCES, SOLVERS
from diffusion_jax.diffusion.schedules.schedule import Schedule
from diffusion_jax.errors import ConfigError, choose, require
from diffusion_jax.experiment.devices import create_precision


class FlowPlan(NamedTuple):
    """How the likelihood of the probability flow is computed, and for how many images."""

    num_examples: int
    num_steps: int
    solver: str
    divergence: str


class EvaluationPlan(NamedTuple):
    """The images and timesteps of an evaluation, and how many are evaluated at once."""

    num_examples: int | None  # spread evenly over the split; None: all
    num_timesteps: int  # of each image: one is drawn in each of as many strata of 1..T
    batch_size: int  # images of all devices together
    timesteps_per_call: int | None  # of each image in one call; None: the platform's fastest
    clip_x_0: bool
    precision: str  # of products
    flow: FlowPlan | None

    @property
    def num_images(self) -> int:
        """The number of images; only a plan that ``fit`` returned knows it."""
        assert self.num_examples is not None
        return self.num_examples


def create_evaluation_plan(
    config: ConfigDict, schedule: Schedule, dataset: DatasetInfo
) -> EvaluationPlan:
    """The evaluation plan of a config, before the size of the test split is known.

    Raises:
        ConfigError: a number out of its range, or a flow that this model or schedule cannot have.
    """
    fields = config.evaluate
    for name in ("num_examples", "timesteps_per_call", "flow_examples"):
        least = 0 if name == "flow_examples" else 1
        value = fields[name]
        require(
            value is None or value >= least, f"config.evaluate.{name}", value, f"at least {least}"
        )
    num_timesteps = len(schedule) if fields.num_timesteps is None else fields.num_timesteps
    least = min(2, len(schedule))  # L_0 has a stratum of its own
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
            "0: a network that predicts mu is defined at its own timesteps only",
        )
        require(
            bool(schedule.alpha_bar[-1] > 0),
            "config.evaluate.flow_examples",
            fields.flow_examples,
            "0: the schedule ends at zero SNR, where the probability flow has no end point",
        )
        flow = FlowPlan(
            num_examples=fields.flow_examples,
            num_steps=fields.flow_steps,
            solver=fields.flow_solver,
            divergence=fields.flow_divergence,
        )
    return EvaluationPlan(
        num_examples=fields.num_examples,
        num_timesteps=num_timesteps,
        batch_size=fields.batch_size,
        timesteps_per_call=fields.timesteps_per_call,
        clip_x_0=fields.clip_x_0 and dataset.levels is not None,
        precision=create_precision(config, "evaluate.precision"),
        flow=flow,
    )


def fit(plan: EvaluationPlan, split: Split | None) -> EvaluationPlan:
    """Complete a plan with the number of images of the test split.

    Raises:
        ConfigError: there is no test split, or it has fewer images than the plan needs.
    """
    if split is None:
        raise ConfigError("config.dataset.name: a set without a test split cannot be evaluated")
    size = len(split.images)
    numbers = {"num_examples": plan.num_examples}
    if plan.flow is not None:
        numbers["flow_examples"] = plan.flow.num_examples
    most = {"num_examples": size, "flow_examples": plan.num_examples or size}
    for name, value in numbers.items():
        allowed = f"at most {most[name]}, of a test split of {size}"
        require(value is None or value <= most[name], f"config.evaluate.{name}", value, allowed)
    return plan._replace(num_examples=plan.num_examples or size)
