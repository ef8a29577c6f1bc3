"""The sampling plan of a config: its sampler, the steps of its chain, the number of images."""

import inspect
from typing import Any, NamedTuple

from jaxtyping import PyTree
from ml_collections import ConfigDict

from diffusion_jax.config.config import relevant_fields
from diffusion_jax.config.default import FIELDS
from diffusion_jax.data.dataset import DatasetInfo
from diffusion_jax.diffusion import samplers, schedules
from diffusion_jax.diffusion.samplers.base import Sampler
from diffusion_jax.diffusion.schedules.schedule import Schedule
from diffusion_jax.diffusion.schedules.spacings import GRIDS, SPACINGS
from diffusion_jax.diffusion.variances import VARIANCES
from diffusion_jax.errors import choose, in_section, require
from diffusion_jax.experiment.arguments import arguments_of
from diffusion_jax.experiment.devices import create_precision
from diffusion_jax.experiment.editing import (
    EditedImages,
    EditingPlan,
    check_editing,
    create_editing_plan,
)
from diffusion_jax.experiment.guidance import UNCONDITIONAL, Guidance, create_guidance
from diffusion_jax.runtime.checkpoint import digest, flatten

GRID_STEPS = 50  # of the DDIM grids during training: an ancestral chain would cost minutes
NUM_FRAMES = 40  # of an animation, or as many as the chain has states
RHO = 7.0  # of EDM's grid (Karras et al. 2022)
GRID_IMAGES = 64  # the most images that a grid shows


class Chain(NamedTuple):
    """The number of steps of a chain and their spacing: the arguments of ``schedules.respace``."""

    num_steps: int
    spacing: str
    rho: float
    sigma_min: float | None
    sigma_max: float | None

    def rows(self, schedule: Schedule) -> Schedule:
        """The schedule respaced to the steps of the chain."""
        return schedules.respace(
            schedule,
            self.num_steps,
            self.spacing,
            rho=self.rho,
            sigma_min=self.sigma_min,
            sigma_max=self.sigma_max,
        )


class SamplingPlan(NamedTuple):
    """How images are sampled; grids during training have a chain of ``grid_steps`` instead."""

    sampler: Sampler
    chain: Chain
    grid_steps: int
    grid_images: int
    num_images: int
    batch_size: int
    clip_x_0: bool
    dynamic_threshold: float | None
    num_frames: int
    compared_steps: tuple[int, ...]
    evaluator_npz: bool
    is_conditional: bool
    label: int | None  # of all images; None: image i has class i mod num_classes
    precision: str  # of products
    guidance: Guidance | None
    editing: EditingPlan | None


def create_sampling_plan(
    config: ConfigDict, schedule: Schedule, dataset: DatasetInfo
) -> SamplingPlan:
    """The sampling plan of a config: its chain, sampler, guidance and editing.

    Raises:
        ConfigError: a value out of its range, or steps that the network or sampler cannot take.
    """
    fields = config.sampling
    require(fields.num_images >= 1, "config.sampling.num_images", fields.num_images, "at least 1")
    is_conditional = config.model.class_conditional
    sampler = _create_sampler(config)
    edit = create_editing_plan(config, schedule, dataset)
    passed = schedule if edit is None else edit.rows(schedule)
    chain = _create_chain(config, passed)
    rows = _check_chain(config, passed, sampler, chain, "config.sampling.num_steps")
    for num_steps in fields.compared_steps:
        compared = chain._replace(num_steps=num_steps)
        _check_chain(config, passed, sampler, compared, "config.sampling.compared_steps")
    if edit is not None:
        check_editing(config, edit, sampler, rows)
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
        classes = (dataset.num_classes or 0) if is_conditional else 0
        allowed = f"a class, in 0..{classes - 1}" if is_conditional else UNCONDITIONAL
        require(0 <= fields.label < classes, "config.sampling.label", fields.label, allowed)
    threshold = fields.dynamic_threshold
    if threshold is not None:
        field = "config.sampling.dynamic_threshold"
        require(dataset.levels is not None, field, threshold, "unset: points have no range")
        require(0 < threshold <= 1, field, threshold, "in (0, 1]")
    is_allowed = dataset.levels is not None or not fields.evaluator_npz
    require(is_allowed, "config.sampling.evaluator_npz", fields.evaluator_npz, "False: points")
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
        evaluator_npz=fields.evaluator_npz,
        is_conditional=is_conditional,
        label=fields.label,
        precision=create_precision(config, "sampling.precision"),
        guidance=create_guidance(config, schedule),
        editing=edit,
    )


def _create_sampler(config: ConfigDict) -> Sampler:
    fields = config.sampling
    function = choose("config.sampling.sampler", fields.sampler, samplers.SAMPLERS, "sampler")
    own = arguments_of(samplers.SAMPLERS, fields.sampler, "sampling", fields)
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
    with in_section("config.sampling"):
        return function(**own)


def _create_chain(config: ConfigDict, schedule: Schedule) -> Chain:
    fields = config.sampling
    choose("config.sampling.spacing", fields.spacing, SPACINGS | GRIDS, "spacing")
    num_steps = len(schedule) if fields.num_steps is None else fields.num_steps
    for name in ("rho", "sigma_min", "sigma_max"):
        takes = fields.spacing in GRIDS and (name != "rho" or fields.spacing == "karras")
        allowed = f"unset: the spacing {fields.spacing} has no such argument"
        require(takes or fields[name] is None, f"config.sampling.{name}", fields[name], allowed)
    rho = RHO if fields.rho is None else fields.rho
    return Chain(
        num_steps=num_steps,
        spacing=fields.spacing,
        rho=rho,
        sigma_min=fields.sigma_min,
        sigma_max=fields.sigma_max,
    )


def require_unset_ends(config: ConfigDict) -> None:
    """Refuse the ends of a chain in training with a learned schedule, whose ends are not known yet.

    Raises:
        ConfigError: naming the field.
    """
    for name in ("sigma_min", "sigma_max"):
        value = config.sampling[name]
        allowed = "unset in training, where the schedule is learned; --mode=sample takes it"
        is_known = config.schedule.name != "learned"
        require(is_known or value is None, f"config.sampling.{name}", value, allowed)


def _check_chain(
    config: ConfigDict, schedule: Schedule, sampler: Sampler, chain: Chain, field: str
) -> Schedule:
    """The rows of a chain; refuses steps that this network or this sampler cannot take."""
    fields = config.sampling
    is_grid = fields.spacing in GRIDS
    has_between = is_grid and len(schedule) > 1
    fits = chain.num_steps >= 1 and (has_between or chain.num_steps <= len(schedule))
    allowed = f"in 1..{len(schedule)} (log_snr and karras go between the timesteps)"
    if len(schedule) == 1:
        allowed = "1: the schedule has a single noise level"
    require(fits, field, chain.num_steps, "at least 1" if has_between else allowed)
    # mu and a learned variance are those of steps between neighbouring timesteps
    parameters = inspect.signature(samplers.SAMPLERS[fields.sampler]).parameters
    takes_learned = (
        "variance" in parameters and (fields.variance or config.loss.variance) == "learned"
    )
    is_whole = chain.num_steps == len(schedule)
    for is_tied, why in (
        (config.loss.prediction == "mu", "the network predicts mu"),
        (takes_learned, "the variance was learned for these steps (learned_range may skip some)"),
    ):
        if is_tied:
            allowed = f"unset, or all {len(schedule)} timesteps: {why}"
            require(is_whole, field, chain.num_steps, allowed)
            allowed = f"one of {', '.join(SPACINGS)}: {why}"
            require(not is_grid, "config.sampling.spacing", fields.spacing, allowed)
            allowed = f"one that stays on the timesteps: {why}"
            stays = not sampler.goes_off_grid
            require(stays, "config.sampling.sampler", fields.sampler, allowed)
    if config.schedule.name == "learned":  # its ends are known after training: Generator checks
        chain = chain._replace(sigma_min=None, sigma_max=None)
    with in_section("config.sampling"):
        rows = chain.rows(schedule)
    require(
        bool(rows.alpha_bar[-1] > 0) or not sampler.needs_signal,
        "config.sampling.sampler",
        fields.sampler,
        "another sampler: the schedule ends at zero SNR, where the sigma of this one is infinite",
    )
    return rows


def identity_of_samples(
    config: ConfigDict, params: PyTree, edited: EditedImages | None
) -> dict[str, Any]:
    """Everything that the samples of a run depend on: a resumed run must have the same identity.

    ``params`` are those of the network and of the weak network.
    """
    fields = relevant_fields(config)
    sections = {section: fields[section] for section in ("sampling", "guidance", "editing")}
    precision = create_precision(config, "sampling.precision")
    if precision != FIELDS["precision"].default:
        sections["precision"] = precision
    return {"seed": config.seed, "digest": digest(flatten((params, edited))), **sections}
