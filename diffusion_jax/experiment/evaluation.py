"""What of a test split is evaluated: how many images, timesteps, and the probability flow."""

from typing import NamedTuple

from ml_collections import ConfigDict

from diffusion_jax.data.dataset import DatasetInfo, Split
from diffusion_jax.diffusion.likelihood import DIVERGENCES, SOLVERS
from diffusion_jax.diffusion.schedules.schedule import Schedule
from diffusion_jax.errors import ConfigError, choose, require


class FlowPlan(NamedTuple):
    """How the probability flow's likelihood is computed, and of how many images."""

    num_examples: int
    num_steps: int
    solver: str
    divergence: str


class EvaluationPlan(NamedTuple):
    """Which images and timesteps, and how many at once."""

    num_examples: int | None  # spread evenly over the split; None: all
    num_timesteps: int  # of T, one drawn in each of as many strata
    batch_size: int  # images of all devices together
    timesteps_per_call: int | None  # of each image at once; None: what is fastest
    clip_x_0: bool
    flow: FlowPlan | None

    @property
    def num_images(self) -> int:
        """The number of images, which ``fit`` has settled."""
        assert self.num_examples is not None
        return self.num_examples


def create_evaluation_plan(
    config: ConfigDict, schedule: Schedule, dataset: DatasetInfo
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
        flow=flow,
    )


def fit(plan: EvaluationPlan, split: Split | None) -> EvaluationPlan:
    """The plan with the number of images settled.

    Raises:
        ConfigError: there is no test split, or it has fewer images than are asked for.
    """
    if split is None:
        raise ConfigError("config.dataset.name: a set without a test split cannot be evaluated")
    size = len(split.images)
    asked = {"num_examples": plan.num_examples}
    if plan.flow is not None:
        asked["flow_examples"] = plan.flow.num_examples
    most = {"num_examples": size, "flow_examples": plan.num_examples or size}
    for name, value in asked.items():
        allowed = f"at most {most[name]}, of a test split of {size}"
        require(value is None or value <= most[name], f"config.evaluate.{name}", value, allowed)
    return plan._replace(num_examples=plan.num_examples or size)
