"""What sampling leaves in a workdir: arrays, grids of images, animations."""

import logging
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, UInt8
from PIL import Image
from tqdm import tqdm

from diffusion_jax import data, plots, schedules
from diffusion_jax.config import RunError
from diffusion_jax.generate import (
    ANIMATED_IMAGES,
    GRID_IMAGES,
    EditedImages,
    Generator,
    Grid,
    SamplingPlan,
    noising,
    num_animated,
)
from diffusion_jax.schedules import Schedule
from diffusion_jax.shards import Shards

LOG = logging.getLogger("diffusion_jax")

FRAME_MILLISECONDS = 80
POINTS_SIZE = 256  # pixels of a picture of 2-D points
POINTS_LIMIT = 1.6  # its axes
COMPARED_IMAGES = 8  # in each row of steps.png
CLASS_IMAGES = 10  # in each row of a conditional model's grid

# Beside a run's own schedule in noising.gif; linear ends at noise for any T if it is rescaled.
NOISING: dict[str, Callable[[int], Schedule]] = {
    "linear": lambda num_timesteps: schedules.linear(num_timesteps, rescale=num_timesteps > 20),
    "cosine": schedules.cosine,
}


class NonFiniteSampleError(RunError):
    """A sample that is not a number: the network or the sampler has diverged."""


def pictures(x_0: Float[np.ndarray, "images ..."], levels: int | None) -> UInt8[np.ndarray, "..."]:
    """Images as PNGs hold them [n h w c]; 2-D points become one picture of all of them."""
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
    plan: SamplingPlan,
    schedule: Schedule,
    dataset: data.Dataset,
    given: EditedImages | None,
    job: dict,
    folder: pathlib.Path,
) -> None:
    """Sample, from where a killed job with the same ``job`` stopped, and write everything.

    samples.npz holds all samples, grid.png the first, of an edit beside what it began from.
    denoising.gif is the way of x_t and of the predicted x_0, noising.gif that of real data under
    the run's schedule and others, steps.png the same noise by chains of several lengths.
    """
    folder.mkdir(exist_ok=True)
    levels = dataset.levels
    shards = Shards(folder / "shards", "points" if levels is None else "images", job)
    if len(shards):
        LOG.info("going on after %d of %d samples", len(shards), plan.num_images)
    rows, evaluations = generator.rows(params), generator.num_evaluations(params)
    also = "" if plan.guidance is None else ", and of the weak network in its interval"
    LOG.info("%d steps, %d network evaluations per image%s", len(rows), evaluations, also)
    with tqdm(total=plan.num_images, initial=len(shards), desc="samples", disable=None) as bar:
        for batch in generator.batches(params, len(shards), given):
            if len(shards) == 0 and plan.num_frames:
                states = np.append(rows.timestep[::-1], 0)
                _animate(
                    {"x_t": batch.x_t, "predicted\nx_0": batch.predicted_x_0},
                    states[np.linspace(0, len(rows), plan.num_frames).round().astype(int)],
                    levels,
                    folder / "denoising.gif",
                )
            if not np.isfinite(batch.x_0).all():
                raise NonFiniteSampleError(f"samples from {len(shards)} on: not all are finite")
            shards.add(batch.x_0 if levels is None else pictures(batch.x_0, levels))
            bar.update(len(batch.x_0))
            if bar.disable:
                LOG.info("%d/%d images", len(shards), plan.num_images)

    shown = shards.first(GRID_IMAGES)
    _grid(shown, plan, given, dataset).save(folder / "grid.png")
    if plan.compared_steps:
        compared = generator.compared(params, COMPARED_IMAGES).items()
        rows = {f"{num_steps} steps": pictures(x_0, levels) for num_steps, x_0 in compared}
        plots.labelled_grid(list(rows.values()), list(rows)).save(folder / "steps.png")
    if plan.num_frames:
        shown = slice(num_animated(levels))
        real = data.to_x_0((dataset.test or dataset.train).images[shown], levels)
        compared = {"this run": schedule} | {
            name: function(len(schedule)) for name, function in NOISING.items()
        }
        noised = {
            name: noising(rows, jax.random.key(0), jnp.asarray(real), plan.num_frames)
            for name, rows in compared.items()
        }
        states = np.linspace(0, len(schedule), plan.num_frames).round()
        _animate(noised, states, levels, folder / "noising.gif")
    shards.join(folder / "samples.npz")
    LOG.info("%d samples in %s", plan.num_images, folder)


def _grid(
    shown: np.ndarray, plan: SamplingPlan, given: EditedImages | None, dataset: data.Dataset
) -> Image.Image:
    """The first samples: of a conditional model a row for each class, of an edit what it is of."""
    levels = dataset.levels
    if levels is None:
        return plots.image_grid(pictures(shown, levels))
    if given is not None:
        columns = slice(ANIMATED_IMAGES)
        ends = [0, -1] if plan.editing.task == "interpolate" else columns
        begun = pictures(given.x_0[ends], levels)
        rows = {"given": begun}
        if plan.editing.task == "inpaint":
            rows["kept"] = np.where(given.mask == 1, np.uint8(128), begun)
        rows = {name: images[columns] for name, images in (rows | {"made": shown}).items()}
        return plots.labelled_grid(list(rows.values()), list(rows))
    if plan.is_conditional and plan.label is None:
        classes = range(min(dataset.num_classes, len(shown)))
        rows = [shown[k :: dataset.num_classes][:CLASS_IMAGES] for k in classes]
        return plots.labelled_grid(rows, [str(k) for k in classes])
    return plots.image_grid(shown)


def _animate(
    frames: dict[str, Float[np.ndarray, "frames images ..."] | Float[Array, "frames images ..."]],
    timesteps: Float[np.ndarray, " frames"],
    levels: int | None,
    path: pathlib.Path,
) -> None:
    pictured = {
        name: np.stack([pictures(np.asarray(frame), levels) for frame in of_row])
        for name, of_row in frames.items()
    }
    titles = [f"t = {timestep:.0f}" for timestep in timesteps]
    plots.save_labelled_animation(pictured, titles, path, FRAME_MILLISECONDS)
