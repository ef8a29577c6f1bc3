"""Pictures and arrays out of a trained model: batches of images over the devices, files."""

import logging
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree, UInt8

from diffusion_jax import data, devices, losses, plots, process, samplers, schedules
from diffusion_jax.losses import Objective
from diffusion_jax.models import Model
from diffusion_jax.process import Predict, Prediction
from diffusion_jax.samplers import Sampler
from diffusion_jax.schedules import Schedule

LOG = logging.getLogger("diffusion_jax")

GRID_IMAGES = 64  # the most that a grid shows
NUM_ANIMATED = 16  # images in an animation
FRAME_MILLISECONDS = 80
POINTS_SIZE = 256  # pixels of a picture of 2-D points
POINTS_LIMIT = 1.6  # its axes


class SamplingPlan(NamedTuple):
    """Which chain, how many images; grids in training have a short chain of ``grid_steps``."""

    sampler: Sampler
    num_steps: int
    spacing: str
    grid_steps: int
    grid_images: int
    num_images: int
    batch_size: int
    clip_x_0: bool
    num_frames: int


class Grid(NamedTuple):
    """Images that a device may still be sampling."""

    x_0: Float[Array, "devices batch ..."]
    num_images: int
    levels: int | None


def create_predict(
    model: Model,
    objective: Objective,
    clip_x_0: bool,
    params: PyTree,
    label: Int[Array, " batch"] | None,
) -> Predict:
    """What samplers see of a network: x_t and a row to x_0, eps and the variance."""

    def predict(x_t: Float[Array, "batch ..."], row: Schedule) -> Prediction:
        timestep = jnp.full(len(x_t), row.timestep)
        output = model.apply(params, x_t, timestep, label, None)
        prediction = losses.decode_output(objective, row, x_t, output)
        return process.clip_x_0(row, x_t, prediction) if clip_x_0 else prediction

    return predict


class Generator:
    """Samples of a model, compiled once for each batch shape, on this process's devices.

    Image i depends on the seed and i alone; a conditional model draws class i mod num_classes.
    """

    def __init__(
        self,
        model: Model,
        objective: Objective,
        dataset: data.DatasetInfo,
        schedule_of: Callable[[PyTree], Schedule],
        plan: SamplingPlan,
        seed: int,
        used: list[jax.Device],
    ) -> None:
        self._model = model
        self._objective = objective
        self._dataset = dataset
        self._schedule_of = schedule_of
        self._plan = plan
        self._devices = [d for d in used if d.process_index == jax.process_index()]
        # not a key of training: no image is made from the noise of a training step
        self._key = jax.random.fold_in(jax.random.key(seed), 2)
        self._trajectory = jax.pmap(
            self._of_device,
            axis_name="device",
            in_axes=(None, None, None, None, 0, None),
            static_broadcasted_argnums=5,
            devices=self._devices,
        )

    def _of_device(
        self,
        params: PyTree,
        schedule: Schedule,
        sampler: Sampler,
        key: Key[Array, ""],
        indices: Int[Array, " batch"],
        num_frames: int,
    ) -> tuple[Float[Array, "batch ..."], Float[Array, "frames batch ..."]]:
        classes = self._dataset.num_classes
        label = None if classes is None else indices % classes
        predict = create_predict(self._model, self._objective, self._plan.clip_x_0, params, label)
        shape = (len(indices), *self._dataset.shape)
        return samplers.trajectory(
            key, predict, schedule, sampler, shape, num_frames, indices=indices
        )

    def _run(
        self,
        params: PyTree,
        schedule: Schedule,
        sampler: Sampler,
        first: int,
        batch_size: int,
        num_frames: int,
    ) -> tuple[Array, Array]:
        # an uneven batch is filled up with images past its end, which are left out later
        per_device = -(-batch_size // len(self._devices))
        indices = first + np.arange(per_device * len(self._devices))
        indices = indices.reshape(len(self._devices), per_device)
        shared = devices.replicate((params, schedule, sampler, self._key), self._devices)
        return self._trajectory(*shared, indices, num_frames)

    def grid(self, params: PyTree) -> Grid:
        """Start a small DDIM grid and do not wait for it (save for a learned schedule's rows)."""
        plan = self._plan
        sampler = samplers.ddim(eta=0.0)
        rows = schedules.respace(self._schedule_of(params), plan.grid_steps)
        x_0, _ = self._run(params, rows, sampler, 0, plan.grid_images, 0)
        return Grid(x_0, plan.grid_images, self._dataset.levels)

    def images(self, params: PyTree) -> tuple[np.ndarray, np.ndarray]:
        """All images of the plan, x_0 [image, ...], and frames [frame, image, ...] of the first."""
        plan, parts, frames = self._plan, [], None
        rows = schedules.respace(self._schedule_of(params), plan.num_steps, plan.spacing)
        for first in range(0, plan.num_images, plan.batch_size):
            x_0, of_batch = self._run(
                params, rows, plan.sampler, first, plan.batch_size, plan.num_frames
            )
            parts.append(np.concatenate(x_0)[: plan.batch_size])
            if frames is None:  # of the first batch
                frames = np.concatenate(of_batch, axis=1)[:, :NUM_ANIMATED]
            done = min(first + plan.batch_size, plan.num_images)
            LOG.info("%d/%d images", done, plan.num_images)
        return np.concatenate(parts)[: plan.num_images], frames


def noising(
    schedule: Schedule, key: Key[Array, ""], x_0: Float[Array, "batch ..."], num_frames: int
) -> Float[Array, "frames batch ..."]:
    """Real data on its way to noise: x_t at evenly spaced timesteps, the same eps all the way."""
    eps = jax.random.normal(key, x_0.shape)
    timesteps = np.linspace(0, len(schedule), num_frames)[1:].round().astype(int)
    rows = schedule[timesteps - 1]
    x_t = jax.vmap(process.q_sample, (0, None, None))(rows, x_0, eps)
    return jnp.concatenate([x_0[None], x_t])


def pictures(x_0: Float[Array, "images ..."], levels: int | None) -> UInt8[np.ndarray, "n h w c"]:
    """Images as PNGs hold them; 2-D points become one picture of all of them."""
    if levels is not None:
        return np.asarray(data.to_uint8(x_0, levels))
    return plots.draw_points(np.asarray(x_0), POINTS_LIMIT, POINTS_SIZE)[None]


def write_grid(grid: Grid, path: pathlib.Path) -> UInt8[np.ndarray, "h w c"]:
    """Wait for a grid's images and write them as one PNG."""
    path.parent.mkdir(exist_ok=True)
    image = plots.image_grid(pictures(np.concatenate(grid.x_0)[: grid.num_images], grid.levels))
    image.save(path)
    return np.atleast_3d(np.asarray(image))


def write_samples(
    generator: Generator,
    params: PyTree,
    schedule: Schedule,
    dataset: data.Dataset,
    num_frames: int,
    folder: pathlib.Path,
) -> None:
    """Sample, and write grid.png, samples.npz, denoising.gif and, of real data, noising.gif."""
    folder.mkdir(exist_ok=True)
    x_0, frames = generator.images(params)
    levels = dataset.levels
    plots.image_grid(pictures(x_0[:GRID_IMAGES], levels)).save(folder / "grid.png")
    arrays = {"points": x_0} if levels is None else {"images": pictures(x_0, levels)}
    np.savez(folder / "samples.npz", **arrays)
    if num_frames:
        _animate(frames, levels, folder / "denoising.gif")
        real = data.to_x_0((dataset.test or dataset.train).images[: frames.shape[1]], levels)
        noised = noising(schedule, jax.random.key(0), jnp.asarray(real), num_frames)
        _animate(noised, levels, folder / "noising.gif")
    LOG.info("%d samples in %s", len(x_0), folder)


def _animate(
    frames: Float[Array, "frames images ..."], levels: int | None, path: pathlib.Path
) -> None:
    pictured = np.stack([pictures(frame, levels) for frame in frames])
    plots.save_animation(pictured, path, FRAME_MILLISECONDS)
