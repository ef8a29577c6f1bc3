"""The schedule of a config: a function of schedules.SCHEDULES, or one that is learned."""

import inspect
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from diffusion_jax.data.arrays import read_array
from diffusion_jax.diffusion import schedules
from diffusion_jax.diffusion.learned_schedule import LearnedSchedule
from diffusion_jax.diffusion.schedules.schedule import Schedule
from diffusion_jax.errors import ConfigError, choose, in_section, require
from diffusion_jax.experiment.arguments import arguments_of, names_of_arguments

LOG_SNR_ENDS = 13.3, -5.0  # of a learned schedule before training, at u = 0 and 1 (VDM's code)


def create_learned_schedule(config: ConfigDict) -> LearnedSchedule | None:
    """The recipe of a learned schedule (VDM); None for the schedules of SCHEDULES.

    A learned schedule is trained by the bound in continuous time, which fixes other fields.

    Raises:
        ConfigError: a field that a learned schedule does not have or does not allow.
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
    for name in (*names_of_arguments(schedules.SCHEDULES), "base_resolution"):
        require(
            fields[name] is None,
            f"config.schedule.{name}",
            fields[name],
            "unset: learned has no such argument",
        )
    for field, value, options in (
        ("schedule.zero_terminal_snr", fields.zero_terminal_snr, (False,)),
        ("loss.weighting", config.loss.weighting, ("vlb",)),
        ("loss.variance", config.loss.variance, ("beta", "posterior")),
        ("loss.timesteps", config.loss.timesteps, ("low_discrepancy",)),
        ("loss.prediction", config.loss.prediction, ("eps", "x_0", "v", "score")),
    ):
        allowed = (
            f"{' or '.join(map(str, options))}: a learned schedule is trained in continuous time"
        )
        require(value in options, f"config.{field}", value, allowed)
    return LearnedSchedule(num_timesteps=fields.num_timesteps, log_snr_start=start, log_snr_end=end)


class NamedSchedule(NamedTuple):
    """A schedule, with the title and the number of clipped betas that a run prints."""

    schedule: Schedule
    title: str  # "cosine(num_timesteps=1000, s=0.008, ...)"
    num_clipped: int  # betas that were held at max_beta or min_beta


def create_schedule(config: ConfigDict, height: int | None) -> NamedSchedule:
    """The schedule of a config; ``height`` is that of the images in pixels, None for points.

    Raises:
        ConfigError: an unknown schedule, or an argument that it does not have or allow.
    """
    fields = config.schedule
    names = schedules.SCHEDULES | {"learned": None}  # create_learned_schedule handles this name
    function = choose("config.schedule.name", fields.name, names, "schedule")
    parameters = inspect.signature(function).parameters
    arguments = arguments_of(schedules.SCHEDULES, fields.name, "schedule", fields)
    shown = {"num_timesteps": fields.num_timesteps} if "num_timesteps" in parameters else {}
    shown |= {n: p.default for n, p in parameters.items() if p.default is not p.empty} | arguments
    if "betas" in parameters:
        arguments["betas"] = _read_betas(fields.betas)
    elif "num_timesteps" in parameters:
        arguments["num_timesteps"] = fields.num_timesteps
    with in_section("config.schedule"):
        schedule = function(**arguments)
    allowed = f"{len(schedule)}, the number of betas in {fields.betas}"
    is_whole = len(schedule) == fields.num_timesteps
    require(is_whole, "config.schedule.num_timesteps", fields.num_timesteps, allowed)
    clips = [np.float32(shown[name]) for name in ("max_beta", "min_beta") if name in shown]
    num_clipped = int(np.isin(schedule.beta, [clip for clip in clips if clip > 0]).sum())
    base = fields.base_resolution
    if base is not None:
        allowed = "unset: the data have no resolution"
        if height is None:
            require(False, "config.schedule.base_resolution", base, allowed)
        with in_section("config.schedule"):
            schedule = schedules.shift_log_snr(schedule, height, base)
    if fields.zero_terminal_snr:
        with in_section("config.schedule"):
            schedule = schedules.zero_terminal_snr(schedule)
    title = f"{fields.name}({', '.join(f'{name}={value}' for name, value in shown.items())})"
    return NamedSchedule(schedule=schedule, title=title, num_clipped=num_clipped)


def _read_betas(path: str | None) -> np.ndarray:
    field = "config.schedule.betas"
    if path is None:
        require(False, field, path, "the path of a .npy file")
    try:
        betas = read_array(path, "betas")
    except ValueError as error:
        raise ConfigError(f"{field} = {path!r}: {error}") from error
    allowed = f"a file of real numbers, not of {betas.dtype}"
    require(np.issubdtype(betas.dtype, np.floating), field, path, allowed)
    return betas
