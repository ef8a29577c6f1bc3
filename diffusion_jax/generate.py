"""Images out of a trained model: a plan's chain, guidance and editing, over the devices."""

import copy
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from diffusion_jax import (
    data,
    devices,
    editing,
    guidance,
    losses,
    process,
    samplers,
    schedules,
)
from diffusion_jax.config import ConfigError
from diffusion_jax.losses import Objective
from diffusion_jax.models import Model
from diffusion_jax.process import Predict, Prediction
from diffusion_jax.samplers import Sampler, Trajectory
from diffusion_jax.schedules import Schedule

GRID_IMAGES = 64  # the most that a grid shows
ANIMATED_IMAGES, ANIMATED_POINTS = 16, 500


class Network(NamedTuple):
    """A network, and what its output means."""

    model: Model
    objective: Objective


class Chain(NamedTuple):
    """Where the steps of a chain stand, see ``schedules.respace``."""

    num_steps: int
    spacing: str
    rho: float
    sigma_min: float | None
    sigma_max: float | None

    def rows(self, schedule: Schedule) -> Schedule:
        """The rows of the chain."""
        return schedules.respace(schedule, *self)


class Guidance(NamedTuple):
    """The numbers of ``guidance.guide``: leaves, so that others compile nothing anew."""

    weight: float
    interval: tuple[float, float]
    rescale: float


class EditingPlan(NamedTuple):
    """What is done with given images, see EDITS; the images themselves are read later."""

    task: str
    timestep: int | None  # from which the images are denoised; None: all of them, from noise
    strength: float
    num_resamples: int
    jump_length: int

    def rows(self, schedule: Schedule) -> Schedule:
        """The part of the schedule that the chain goes through."""
        return schedule if self.timestep is None else editing.until(schedule, self.timestep)


class EditedImages(NamedTuple):
    """What an edit starts from: x_0, and where it is to be made anew (1), for inpainting."""

    x_0: Float[np.ndarray, "images h w c"]
    mask: Float[np.ndarray, "h w c"]


class SamplingPlan(NamedTuple):
    """Which chain, how many images; grids in training have a short chain of ``grid_steps``."""

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
    is_conditional: bool
    label: int | None  # of all images; None: image i has class i mod num_classes
    guidance: Guidance | None
    editing: EditingPlan | None


class Grid(NamedTuple):
    """Images that a device may still be sampling."""

    x_0: Float[Array, "devices batch ..."]
    num_images: int
    levels: int | None


def num_animated(levels: int | None) -> int:
    """How many images, or points, an animation shows."""
    return ANIMATED_POINTS if levels is None else ANIMATED_IMAGES


def create_predict(network: Network, params: PyTree, label: Int[Array, " batch"] | None) -> Predict:
    """What samplers see of a network: x_t and a row to x_0, eps and the variance."""

    def predict(x_t: Float[Array, "batch ..."], row: Schedule) -> Prediction:
        timestep = jnp.full(len(x_t), row.timestep)
        output = network.model.apply(params, x_t, timestep, label, None)
        return losses.decode_output(network.objective, row, x_t, output)

    return predict


class Generator:
    """Samples of a model, compiled once for each batch shape, on this process's devices.

    Image i depends on the seed and i alone; a conditional model draws class i mod num_classes.
    ``weak`` is the network that guides by being worse, None: the same one without the label.
    """

    def __init__(
        self,
        network: Network,
        weak: Network | None,
        dataset: data.DatasetInfo,
        schedule_of: Callable[[PyTree], Schedule],
        plan: SamplingPlan,
        seed: int,
        used: list[jax.Device],
    ) -> None:
        self._network = network
        self._weak = weak
        self._dataset = dataset
        self._schedule_of = schedule_of
        self._plan = plan
        self._devices = [d for d in used if d.process_index == jax.process_index()]
        # not a key of training: no image is made from the noise of a training step
        self._key = jax.random.fold_in(jax.random.key(seed), 2)
        self._trajectory = jax.pmap(
            self._of_device,
            axis_name="device",
            in_axes=(None, None, None, None, None, None, 0, 0, None),
            static_broadcasted_argnums=8,
            devices=self._devices,
        )

    def of_schedule(self, schedule_of: Callable[[PyTree], Schedule], seed: int) -> "Generator":
        """The same for another schedule and seed, which are arguments of what is compiled."""
        other = copy.copy(self)
        other._schedule_of = schedule_of
        other._key = jax.random.fold_in(jax.random.key(seed), 2)
        return other

    def label(self, indices: Int[Array, "..."] | Int[np.ndarray, "..."]) -> Array | None:
        """The class of each image; None where the network is told none."""
        if not self._plan.is_conditional:
            return None
        if self._plan.label is not None:
            return jnp.full_like(indices, self._plan.label)
        return jnp.asarray(indices % self._dataset.num_classes)

    def _predict(self, params: PyTree, guided: Guidance | None, label: Array | None) -> Predict:
        """The network with the plan's guidance, and then its threshold."""
        params, weak_params = params
        predict = create_predict(self._network, params, label)
        if guided is not None:
            if self._weak is None:
                nothing = jnp.full_like(label, self._dataset.num_classes)
                weak = create_predict(self._network, params, nothing)
            else:
                weak = create_predict(self._weak, weak_params, label)
            predict = guidance.guide(predict, weak, *guided)
        if self._plan.dynamic_threshold is not None:
            return guidance.dynamic_threshold(predict, self._plan.dynamic_threshold)
        return guidance.static_threshold(predict) if self._plan.clip_x_0 else predict

    def _of_device(
        self,
        params: PyTree,
        rows: Schedule,
        native: Schedule,
        sampler: Sampler,
        guided: Guidance | None,
        key: Key[Array, ""],
        indices: Int[Array, " batch"],
        given: PyTree,
        num_frames: int,
    ) -> Trajectory:
        predict = self._predict(params, guided, self.label(indices))
        shape = (len(indices), *self._dataset.shape)
        x_T = None
        if given is not None:
            # of their own, not those of the chain's noise
            edit_key, key = jax.random.split(key)
            keys = jax.vmap(jax.random.fold_in, (None, 0))(edit_key, indices)
            edit = EDITS[self._plan.editing.task]
            sampler, x_T = edit(self._plan.editing, keys, predict, rows, sampler, given)
        return samplers.trajectory(
            key, predict, rows, sampler, shape, num_frames, x_T, indices, native
        )

    def _run(
        self,
        params: PyTree,
        rows: Schedule,
        sampler: Sampler,
        guided: Guidance | None,
        first: int,
        batch_size: int,
        num_frames: int,
        given: EditedImages | None = None,
    ) -> Trajectory:
        # an uneven batch is filled up with images past its end, which are left out later
        per_device = -(-batch_size // len(self._devices))
        indices = first + np.arange(per_device * len(self._devices))
        indices = indices.reshape(len(self._devices), per_device)
        native = self._schedule_of(params[0])
        shared = (params, rows, native, sampler, guided, self._key)
        shared = devices.replicate(shared, self._devices)
        given = None if given is None else self._given(given, indices)
        return self._trajectory(*shared, indices, given, num_frames)

    def _given(self, images: EditedImages, indices: Int[np.ndarray, "..."]) -> dict[str, Array]:
        """What each image is made from: given image i mod n, or the first and the last of them."""
        last, shape = max(self._plan.num_images - 1, 1), images.x_0.shape[1:]
        return {
            "x_0": images.x_0[indices % len(images.x_0)],
            "mask": np.broadcast_to(images.mask, (*indices.shape, *images.mask.shape)),
            "fraction": np.minimum(indices / last, 1).astype(np.float32),
            "ends": np.broadcast_to(
                images.x_0[[0, -1]][:, None], (len(indices), 2, indices.shape[1], *shape)
            ),
        }

    def grid(self, params: PyTree) -> Grid:
        """Start a small DDIM grid and do not wait for it (save for a learned schedule's rows)."""
        plan = self._plan
        rows = schedules.respace(self._schedule_of(params), plan.grid_steps)
        # unguided: the weak network is read when training is over
        params = params, None
        found = self._run(params, rows, samplers.ddim(eta=0.0), None, 0, plan.grid_images, 0)
        return Grid(found.x_0, plan.grid_images, self._dataset.levels)

    def rows(self, params: PyTree) -> Schedule:
        """The rows of the plan's chain: those up to its timestep, if it edits images."""
        return self._chain_rows(params, self._plan.chain)

    def _chain_rows(self, params: PyTree, chain: Chain) -> Schedule:
        schedule, edit = self._schedule_of(params[0]), self._plan.editing
        try:
            return chain.rows(schedule if edit is None else edit.rows(schedule))
        except ValueError as error:  # of a learned schedule, whose end was not known before
            raise ConfigError(f"config.sampling.{error}") from error

    def num_evaluations(self, params: PyTree) -> int:
        """Evaluations of the network for each image, those of inversions too.

        Guidance has the weak network evaluated beside it, in its interval.
        """
        plan, sampler, num_steps = self._plan, self._plan.sampler, len(self.rows(params))
        task = None if plan.editing is None else plan.editing.task
        if task == "inpaint":
            jumps = plan.editing.num_resamples, plan.editing.jump_length
            sampler = editing.Inpaint(sampler, None, None, *jumps)
        inverted = {"interpolate": 2, "variations": 1}.get(task, 0)  # images for each
        inversions = inverted * samplers.INVERSION_ROUNDS * num_steps + (task == "variations")
        return sampler.num_evaluations(num_steps) + inversions

    def batches(
        self, params: PyTree, first: int, given: EditedImages | None
    ) -> Iterator[Trajectory]:
        """The images of the plan from number ``first`` on, a batch at a time: [image, ...].

        ``params`` are those of the network and of the weak one. The frames [frame, image, ...] are
        of the first images of the batch.
        """
        plan, rows = self._plan, self.rows(params)
        for start in range(first, plan.num_images, plan.batch_size):
            found = self._run(
                params,
                rows,
                plan.sampler,
                plan.guidance,
                start,
                plan.batch_size,
                plan.num_frames,
                given,
            )
            size = min(plan.batch_size, plan.num_images - start)
            shown = min(size, num_animated(self._dataset.levels))
            frames = (np.concatenate(part[:, :, :shown], axis=1)[:, :shown] for part in found[1:])
            yield Trajectory(np.concatenate(found.x_0)[:size], *frames)

    def compared(self, params: PyTree, num_images: int) -> dict[int, np.ndarray]:
        """The first images by chains of each number of steps that the plan compares: one noise."""
        plan, found = self._plan, {}
        for num_steps in plan.compared_steps:
            rows = self._chain_rows(params, plan.chain._replace(num_steps=num_steps))
            x_0 = self._run(params, rows, plan.sampler, plan.guidance, 0, num_images, 0).x_0
            found[num_steps] = np.concatenate(x_0)[:num_images]
        return found


def noising(
    schedule: Schedule, key: Key[Array, ""], x_0: Float[Array, "batch ..."], num_frames: int
) -> Float[Array, "frames batch ..."]:
    """Real data on its way to noise: x_t at evenly spaced timesteps, the same eps all the way."""
    eps = jax.random.normal(key, x_0.shape)
    timesteps = np.linspace(0, len(schedule), num_frames)[1:].round().astype(int)
    rows = schedule[timesteps - 1]
    x_t = jax.vmap(process.q_sample, (0, None, None))(rows, x_0, eps)
    return jnp.concatenate([x_0[None], x_t])


# What can be done with given images: (plan, keys, predict, rows, sampler, given) -> the sampler
# and the x_T that make it. ``rows`` end at the plan's timestep.

Start = tuple[Sampler, Float[Array, "batch ..."] | None]


def _image_to_image(
    plan: EditingPlan,
    keys: Key[Array, " batch"],
    predict: Predict,
    rows: Schedule,
    sampler: Sampler,
    given: dict[str, Array],
) -> Start:
    """SDEdit: noise the image up to a timestep and denoise it."""
    return sampler, editing.diffuse(keys, rows[-1], given["x_0"])


def _inpaint(
    plan: EditingPlan,
    keys: Key[Array, " batch"],
    predict: Predict,
    rows: Schedule,
    sampler: Sampler,
    given: dict[str, Array],
) -> Start:
    """RePaint, from pure noise or from the noised image."""
    sampler = editing.inpaint(
        sampler, given["x_0"], given["mask"], plan.num_resamples, plan.jump_length
    )
    begun = None if plan.timestep is None else editing.diffuse(keys, rows[-1], given["x_0"])
    return sampler, begun


def _interpolate(
    plan: EditingPlan,
    keys: Key[Array, " batch"],
    predict: Predict,
    rows: Schedule,
    sampler: Sampler,
    given: dict[str, Array],
) -> Start:
    """The latents of the first and the last image, joined by an arc."""
    first, last = (samplers.invert(predict, rows, x_0) for x_0 in given["ends"])

    def join(first: Array, last: Array, fraction: Array) -> Array:
        return editing.slerp(first[None], last[None], fraction[None])[0, 0]

    return sampler, jax.vmap(join)(first, last, given["fraction"])


def _variations(
    plan: EditingPlan,
    keys: Key[Array, " batch"],
    predict: Predict,
    rows: Schedule,
    sampler: Sampler,
    given: dict[str, Array],
) -> Start:
    """The latent of the image with part of its noise drawn anew."""
    x_T = samplers.invert(predict, rows, given["x_0"])
    return sampler, editing.vary(keys, rows[-1], x_T, predict(x_T, rows[-1]), plan.strength)


EDITS: dict[str, Callable[..., Start]] = {
    "image_to_image": _image_to_image,
    "inpaint": _inpaint,
    "interpolate": _interpolate,
    "variations": _variations,
}
