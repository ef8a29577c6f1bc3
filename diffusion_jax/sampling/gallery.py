"""The files that sampling writes into a workdir: arrays, grids of images, animations."""

import functools
import logging
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, UInt8
from PIL import Image
from tqdm import tqdm

from diffusion_jax.data.dataset import Dataset
from diffusion_jax.data.pixels import to_uint8, to_x_0
from diffusion_jax.diffusion import schedules
from diffusion_jax.diffusion.schedules.schedule import Schedule
from diffusion_jax.diffusion.streams import seed_key
from diffusion_jax.drawing.images import (
    draw_points,
    image_grid,
    labelled_grid,
    save_labelled_animation,
)
from diffusion_jax.errors import NonFiniteSampleError
from diffusion_jax.experiment.editing import EditedImages
from diffusion_jax.experiment.sampling import GRID_IMAGES, SamplingPlan
from diffusion_jax.runtime import files
from diffusion_jax.runtime.shards import Shards
from diffusion_jax.sampling.generator import (
    ANIMATED_IMAGES,
    Generator,
    HostTrajectory,
    SampleGrid,
    noising,
    num_animated,
)

LOG = logging.getLogger("diffusion_jax")

FRAME_MILLISECONDS = 80
POINTS_SIZE = 256  # pixels of a picture of 2-D points
POINTS_LIMIT = 1.6  # its axes are from -1.6 to 1.6
COMPARED_IMAGES = 8  # in each row of steps.png
CLASS_IMAGES = 10  # in each row of a conditional model's grid

# Schedules that noising.gif shows beside the run's own. Rescaled, linear ends at noise whatever T
# is; with 20 timesteps or fewer its last beta would reach 1.
NOISING: dict[str, Callable[[int], Schedule]] = {
    "linear": lambda num_timesteps: schedules.linear(num_timesteps, rescale=num_timesteps > 20),
    "cosine": schedules.cosine,
}


def pictures(x_0: Float[np.ndarray, "images ..."], levels: int | None) -> UInt8[np.ndarray, "..."]:
    """Images as uint8 [n, h, w, c]; 2-D points as one picture [1, h, w, 3] of all points."""
    if levels is not None:
        return np.asarray(to_uint8(x_0, levels))
    return draw_points(np.asarray(x_0), POINTS_LIMIT, POINTS_SIZE)[None]


def write_grid(grid: SampleGrid, path: pathlib.Path) -> UInt8[np.ndarray, "h w c"]:
    """Wait for a grid's images and write them as one PNG."""
    path.parent.mkdir(exist_ok=True)
    image = image_grid(pictures(np.concatenate(grid.x_0)[: grid.num_images], grid.levels))
    image.save(path)
    return np.atleast_3d(np.asarray(image))


def grids_in_training(
    generator: Generator, every_steps: int, folder: pathlib.Path
) -> Callable[[int, PyTree], Callable[[], UInt8[np.ndarray, "h w c"]] | None]:
    """The ``on_step`` of a training run: a grid of samples every ``every_steps`` steps (0: none).

    ``on_step`` starts the sampling, which goes on during the training. It returns a function that
    waits for the images, writes them and returns the picture.
    """

    def on_step(step: int, ema: PyTree) -> Callable[[], UInt8[np.ndarray, "h w c"]] | None:
        if not every_steps or step % every_steps:
            return None
        path = folder / f"step_{step:08d}.png"
        return functools.partial(write_grid, generator.grid(ema), path)

    return on_step


class Samples(NamedTuple):
    """The inputs of ``write_samples``: generator, parameters, plan, images to edit if any."""

    generator: Generator
    params: tuple[PyTree, PyTree]  # of the network and of the weak network
    plan: SamplingPlan
    schedule: Schedule
    dataset: Dataset
    edited: EditedImages | None = None


def write_samples(samples: Samples, identity: dict[str, Any], folder: pathlib.Path) -> None:
    """Sample, and write the samples and their pictures into ``folder``.

    Sampling goes on where a killed run with the same ``identity`` stopped. samples.npz has all
    samples. grid.png shows the first ones, those of an edit below its images. denoising.gif shows
    x_t and the predicted x_0 along the chain, noising.gif real data noised by the run's schedule
    and by others, steps.png samples from the same noise by chains of several lengths.

    Raises:
        NonFiniteSampleError: a sample is not finite.
    """
    folder.mkdir(exist_ok=True)
    plan, levels = samples.plan, samples.dataset.levels
    shards = Shards(folder / "shards", "points" if levels is None else "images", identity)
    _sample(samples, shards, folder)
    _draw_grid(shards.first(GRID_IMAGES), samples).save(folder / "grid.png")
    if plan.compared_steps:
        compared = samples.generator.compared(samples.params, COMPARED_IMAGES).items()
        rows = {f"{num_steps} steps": pictures(x_0, levels) for num_steps, x_0 in compared}
        labelled_grid(list(rows.values()), list(rows)).save(folder / "steps.png")
    if plan.num_frames:
        _animate_noising(samples, folder / "noising.gif")
    shards.join(folder / "samples.npz")
    if plan.evaluator_npz:
        _write_for_evaluator(samples, folder)
    LOG.info("%d samples in %s", plan.num_images, folder)


def _write_for_evaluator(samples: Samples, folder: pathlib.Path) -> None:
    """Write the samples for guided-diffusion's evaluator: arr_0 in RGB, and the labels in arr_1."""
    with np.load(folder / "samples.npz") as arrays:
        images = arrays["images"]
    rgb = np.broadcast_to(images, (*images.shape[:-1], 3))
    label = samples.generator.label(np.arange(len(images)))
    arrays = {"arr_0": rgb} | ({} if label is None else {"arr_1": np.asarray(label)})
    with files.replace(folder / "evaluator.npz") as file:
        np.savez(file, **arrays)


def _sample(samples: Samples, shards: Shards, folder: pathlib.Path) -> None:
    """Fill the shards, and animate the first batch."""
    generator, params, plan = samples.generator, samples.params, samples.plan
    levels = samples.dataset.levels
    animation = folder / "denoising.gif"
    if len(shards):
        LOG.info("going on after %d of %d samples", len(shards), plan.num_images)
    else:
        animation.unlink(missing_ok=True)  # it shows other samples
    rows, evaluations = generator.rows(params), generator.num_evaluations(params)
    also = "" if plan.guidance is None else ", and of the weak network in its interval"
    inversion = generator.num_evaluations_of_inversion(params)
    also += f", and {inversion} for each given image, once" if inversion else ""
    LOG.info("%d steps, %d network evaluations per image%s", len(rows), evaluations, also)
    if len(shards) and plan.num_frames and not animation.exists():  # the first start had no frames
        batch = next(generator.batches(params, 0, samples.edited))
        _animate_denoising(batch, rows, samples, animation)
    with tqdm(total=plan.num_images, initial=len(shards), desc="samples", disable=None) as bar:
        for batch in generator.batches(params, len(shards), samples.edited):
            if len(shards) == 0 and plan.num_frames:
                _animate_denoising(batch, rows, samples, animation)
            if not np.isfinite(batch.x_0).all():
                raise NonFiniteSampleError(f"samples from {len(shards)} on: not all are finite")
            shards.add(batch.x_0 if levels is None else pictures(batch.x_0, levels))
            bar.update(len(batch.x_0))
            if bar.disable:
                LOG.info("%d/%d images", len(shards), plan.num_images)


def _animate_denoising(
    batch: HostTrajectory, rows: Schedule, samples: Samples, path: pathlib.Path
) -> None:
    """Animate x_t and the predicted x_0 of the first images, along the chain."""
    states = np.append(rows.timestep[::-1], 0)
    _animate(
        {"x_t": batch.x_t, "predicted\nx_0": batch.predicted_x_0},
        states[np.linspace(0, len(rows), samples.plan.num_frames).round().astype(int)],
        samples.dataset.levels,
        path,
    )


def _animate_noising(samples: Samples, path: pathlib.Path) -> None:
    """Animate the forward process of real data, under the run's schedule and under others."""
    schedule, dataset, num_frames = samples.schedule, samples.dataset, samples.plan.num_frames
    shown = slice(num_animated(dataset.levels))
    real = jnp.asarray(to_x_0((dataset.test or dataset.train).images[shown], dataset.levels))
    compared = {"this run": schedule} | {
        name: function(len(schedule)) for name, function in NOISING.items()
    }
    noised = {name: noising(rows, seed_key(0), real, num_frames) for name, rows in compared.items()}
    states = np.linspace(0, len(schedule), num_frames).round()
    _animate(noised, states, dataset.levels, path)


def _draw_grid(shown: np.ndarray, samples: Samples) -> Image.Image:
    """The first samples: in a row for each class if conditional, below their images if edited."""
    plan, dataset, levels = samples.plan, samples.dataset, samples.dataset.levels
    if levels is None:
        return image_grid(pictures(shown, levels))
    if samples.edited is not None and plan.editing is not None:
        columns = slice(ANIMATED_IMAGES)
        ends = [0, -1] if plan.editing.task == "interpolate" else columns
        begun = pictures(samples.edited.x_0[ends], levels)
        rows = {"image": begun}
        if plan.editing.task == "inpaint":
            rows["known part"] = np.where(samples.edited.mask == 1, np.uint8(128), begun)
        rows = {name: images[columns] for name, images in (rows | {"edit": shown}).items()}
        return labelled_grid(list(rows.values()), list(rows))
    if plan.is_conditional and plan.label is None:
        num_classes = dataset.num_classes or 1
        classes = range(min(num_classes, len(shown)))
        of_classes = [shown[k::num_classes][:CLASS_IMAGES] for k in classes]
        return labelled_grid(of_classes, [str(k) for k in classes])
    return image_grid(shown)


def _animate(
    frames: Mapping[
        str, Float[np.ndarray, "frames images ..."] | Float[Array, "frames images ..."]
    ],
    timesteps: Float[np.ndarray, " frames"],
    levels: int | None,
    path: pathlib.Path,
) -> None:
    pictured = {
        name: np.stack([pictures(np.asarray(frame), levels) for frame in of_row])
        for name, of_row in frames.items()
    }
    titles = [f"t = {timestep:.0f}" for timestep in timesteps]
    save_labelled_animation(pictured, titles, path, FRAME_MILLISECONDS)
