"""The guidance of a config: its weight, its interval of timesteps and its rescaling."""

from typing import NamedTuple

from ml_collections import ConfigDict

from diffusion_jax.diffusion.schedules.schedule import Schedule
from diffusion_jax.errors import require

UNCONDITIONAL = "unset: the network has no labels (config.model.class_conditional = False)"


class Guidance(NamedTuple):
    """The numbers of ``guidance.guide``, as leaves: other numbers do not compile a chain again."""

    weight: float
    interval: tuple[float, float]
    rescale: float


def create_guidance(config: ConfigDict, schedule: Schedule) -> Guidance | None:
    """The guidance of a config; None if ``config.guidance.weight`` is unset.

    Raises:
        ConfigError: a number out of its range; a field of guidance without a weight; no weak
            network, and a network that was not trained with label dropout either.
    """
    fields = config.guidance
    if fields.weight is None:
        for name, value in fields.items():
            allowed = "unset: it has no effect, because config.guidance.weight is unset"
            require(value is None, f"config.guidance.{name}", value, allowed)
        return None
    if fields.weak_workdir is None and fields.weak_step is None:
        field = "config.guidance.weight", fields.weight
        require(config.model.class_conditional, *field, UNCONDITIONAL)
        require(
            config.loss.label_dropout > 0,
            *field,
            "unset: the network was never trained without a label (config.loss.label_dropout = 0)",
        )
    ends: list[float] = []
    for name, end in (("interval_start", 1.0), ("interval_end", float(len(schedule)))):
        value = end if fields[name] is None else fields[name]
        allowed = f"a timestep of the schedule, in [1, {len(schedule)}]"
        require(1 <= value <= len(schedule), f"config.guidance.{name}", value, allowed)
        ends.append(value)
    rescale = 0.0 if fields.rescale is None else fields.rescale
    require(fields.weight >= 0, "config.guidance.weight", fields.weight, "at least 0")
    require(0 <= rescale <= 1, "config.guidance.rescale", rescale, "in [0, 1]")
    allowed = f"at least the start, {ends[0]}"
    require(ends[0] <= ends[1], "config.guidance.interval_end", ends[1], allowed)
    return Guidance(weight=fields.weight, interval=(ends[0], ends[1]), rescale=rescale)
