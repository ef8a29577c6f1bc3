"""The editing plan of a config: the task, the images and mask, and where the chain starts."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from diffusion_jax.data.dataset import DatasetInfo
from diffusion_jax.data.pictures import read_images
from diffusion_jax.data.pixels import from_uint8
from diffusion_jax.diffusion import editing
from diffusion_jax.diffusion.samplers.base import Sampler
from diffusion_jax.diffusion.schedules.schedule import Schedule
from diffusion_jax.errors import ConfigError, choose, in_section, require

# The fields of config.editing that each task has besides its images, with their defaults.
OF_EDITS: dict[str, dict[str, Any]] = {
    "image_to_image": {"timestep": None},
    "inpaint": {"mask": None, "timestep": None, "num_resamples": 10, "jump_length": 10},
    "interpolate": {"timestep": None},
    "variations": {"timestep": None, "strength": 0.3},
}


class EditingPlan(NamedTuple):
    """An edit of images, see ``sampling.edits.EDITS``; the images are read later."""

    task: str
    timestep: int | None  # where the chain starts; None: T
    strength: float
    num_resamples: int
    jump_length: int

    def rows(self, schedule: Schedule) -> Schedule:
        """The part of the schedule that the chain goes through."""
        return schedule if self.timestep is None else editing.until(schedule, self.timestep)


class EditedImages(NamedTuple):
    """The images x_0 of an edit, and the mask of inpainting: 1 is generated, 0 is kept."""

    x_0: Float[np.ndarray, "images h w c"]
    mask: Float[np.ndarray, "h w c"]


def create_edited_images(config: ConfigDict, dataset: DatasetInfo) -> EditedImages | None:
    """Read the images and the mask of config.editing; None without a task.

    Raises:
        ConfigError: a file that cannot be read, too few images, or a mask that is not one image of
            black and white pixels.
    """
    fields = config.editing
    if fields.task is None:
        return None
    shapes = {"images": dataset.shape, "mask": (*dataset.shape[:2], 1)}
    read = {}
    for name, shape in shapes.items():
        if fields[name] is not None:
            try:
                read[name] = read_images(fields[name], shape)
            except ValueError as error:
                raise ConfigError(f"config.editing.{name} = {fields[name]!r}: {error}") from error
    mask = read.get("mask", np.full((1, *shapes["mask"]), 255, np.uint8))
    allowed = "one image of black (kept) and white (generated) pixels only"
    require(
        len(mask) == 1 and np.isin(mask, (0, 255)).all(),
        "config.editing.mask",
        fields.mask,
        allowed,
    )
    least = 2 if fields.task == "interpolate" else 1
    allowed = f"at least {least} images, in an .npz"
    require(len(read["images"]) >= least, "config.editing.images", fields.images, allowed)
    assert dataset.levels is not None  # create_editing_plan refuses points
    x_0 = from_uint8(read["images"], dataset.levels)
    return EditedImages(x_0=x_0, mask=(mask[0] / 255).astype(np.float32))


def create_editing_plan(
    config: ConfigDict, schedule: Schedule, dataset: DatasetInfo
) -> EditingPlan | None:
    """The editing plan of a config; None without a task.

    Raises:
        ConfigError: a field that the task does not have, a field that is missing, or a value out
            of its range.
    """
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
    arguments = {n: v if fields[n] is None else fields[n] for n, v in own.items()}
    timestep = arguments["timestep"]
    if fields.task == "image_to_image":
        allowed = "set: the image is noised up to this timestep, and at T nothing is left of it"
        require(timestep is not None, f"{section}.timestep", timestep, allowed)
    if timestep is not None:
        allowed = f"in 1..{len(schedule)}, the timesteps of the schedule"
        require(1 <= timestep <= len(schedule), f"{section}.timestep", timestep, allowed)
    for name in ("compared_steps", "num_frames"):
        value = config.sampling[name]
        allowed = "unset: this run edits images"
        require(not value, f"config.sampling.{name}", value, allowed)
    allowed = "set: edited images have one class (config.model.class_conditional = True)"
    label = config.sampling.label
    is_conditional = config.model.class_conditional
    require(not is_conditional or label is not None, "config.sampling.label", label, allowed)
    return EditingPlan(
        task=fields.task,
        timestep=timestep,
        strength=arguments.get("strength", 0.0),
        num_resamples=arguments.get("num_resamples", 1),
        jump_length=arguments.get("jump_length", 1),
    )


def check_editing(config: ConfigDict, plan: EditingPlan, sampler: Sampler, rows: Schedule) -> None:
    """Refuse an edit that this sampler or this chain cannot make.

    Raises:
        ConfigError: naming the field.
    """
    section = "config.editing"
    named = "config.sampling.sampler", config.sampling.sampler
    if plan.task in ("interpolate", "variations"):
        is_ddim = config.sampling.sampler == "ddim" and not config.sampling.eta
        require(is_ddim, *named, "ddim with eta = 0, which inverts the images")
        allowed = "below T: the schedule ends at zero SNR, where nothing can be inverted"
        ends = bool(rows.alpha_bar[-1] > 0)
        require(ends, "config.editing.timestep", plan.timestep, allowed)
    require(0 <= plan.strength <= 1, "config.editing.strength", plan.strength, "in [0, 1]")
    if plan.task == "inpaint":
        allowed = "one without memory, such as ancestral, ddim or heun (inpaint)"
        require(editing.can_wrap(sampler), *named, allowed)
        with in_section(section):
            editing.check_jumps(plan.num_resamples, plan.jump_length)
            jumps = plan.num_resamples, plan.jump_length
            # the path depends on neither the images nor the mask
            inpaint = editing.Inpaint(sampler, None, None, *jumps)  # type: ignore[arg-type]  # unused
            inpaint.path(len(rows))
