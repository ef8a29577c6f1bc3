"""Sampling from a trained model, by a plan's chain, guidance and editing, on all devices."""

import copy
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from diffusion_jax.diffusion import editing, guidance, process, samplers, schedules
from diffusion_jax.diffusion.network import Network, create_predict
from diffusion_jax.diffusion.process import Predict
from diffusion_jax.diffusion.samplers.base import Sampler
from diffusion_jax.diffusion.samplers.chain import Trajectory
from diffusion_jax.diffusion.schedules.schedule import Schedule
from diffusion_jax.diffusion.streams import Stream, stream_key
from diffusion_jax.errors import in_section
from diffusion_jax.experiment.editing import EditedImages
from diffusion_jax.experiment.experiment import Experiment
from diffusion_jax.experiment.guidance import Guidance
from diffusion_jax.experiment.sampling import Chain
from diffusion_jax.runtime import devices
from diffusion_jax.runtime.compilation import named
from diffusion_jax.runtime.numerics import in_precision
from diffusion_jax.sampling.edits import EDITS, EditInputs
from diffusion_jax.sampling.latents import Latents

ANIMATED_IMAGES, ANIMATED_POINTS = 16, 500


class SampleGrid(NamedTuple):
    """Images that a device may still be sampling."""

    x_0: Float[Array, "devices batch ..."]
    num_images: int
    levels: int | None


class ChainInputs(NamedTuple):
    """The inputs of a chain that are the same for all images, replicated on every device."""

    params: tuple[PyTree, PyTree]  # of the network and of the weak network
    rows: Schedule
    native: Schedule  # the schedule before it is respaced to ``rows``
    sampler: Sampler
    guidance: Guidance | None
    key: Key[Array, ""]


class HostTrajectory(NamedTuple):
    """The images of a batch, and the frames of its first images, see ``Trajectory``."""

    x_0: Float[np.ndarray, "batch ..."]
    x_t: Float[np.ndarray, "frames shown ..."]
    predicted_x_0: Float[np.ndarray, "frames shown ..."]


def num_animated(levels: int | None) -> int:
    """The number of images or points that an animation shows."""
    return ANIMATED_POINTS if levels is None else ANIMATED_IMAGES


class Generator:
    """Draws samples of a model on this process's devices.

    Image i depends on the seed and i alone. Without a label in the plan, a conditional model draws
    image i of class i mod num_classes. ``weak`` is the weak network of autoguidance; None: guidance
    uses the same network without the label. A chain is compiled again for another batch size,
    length or number of frames.
    """

    def __init__(
        self, experiment: Experiment, weak: Network | None, used_devices: list[jax.Device]
    ) -> None:
        self._network = experiment.network
        self._weak = weak
        self._dataset = experiment.dataset
        self._schedule_of = experiment.schedule_of
        self._plan = experiment.sampling
        self._devices = [d for d in used_devices if d.process_index == jax.process_index()]
        self._key = stream_key(experiment.seed, Stream.SAMPLING)
        precision = self._plan.precision
        trajectory = jax.pmap(
            in_precision(precision, self._of_device),
            axis_name="device",
            in_axes=(None, 0, 0, None),
            static_broadcasted_argnums=3,
            devices=self._devices,
        )
        inverse = jax.pmap(
            in_precision(precision, self._invert_on_device),
            axis_name="device",
            in_axes=(None, 0),
            devices=self._devices,
        )
        self._trajectory = named("the reverse chain", trajectory)
        self._inverse = named("the inversion", inverse)

    def of_schedule(self, schedule_of: Callable[[PyTree], Schedule], seed: int) -> "Generator":
        """A generator for another schedule and seed, which shares the compiled chains."""
        other = copy.copy(self)
        other._schedule_of = schedule_of
        other._key = stream_key(seed, Stream.SAMPLING)
        return other

    def label(self, indices: Int[Array, "..."] | Int[np.ndarray, "..."]) -> Array | None:
        """The class of each image; None if the model is not conditional."""
        if not self._plan.is_conditional:
            return None
        if self._plan.label is not None:
            return jnp.full_like(indices, self._plan.label)
        num_classes = self._num_classes
        return jnp.asarray(indices % num_classes)

    @property
    def _num_classes(self) -> int:
        """The number of classes of the data set, which a conditional model has."""
        assert self._dataset.num_classes is not None
        return self._dataset.num_classes

    def _predict(self, inputs: ChainInputs, label: Array | None) -> Predict:
        """The network as samplers see it: guided, and x_0 then thresholded as the plan says."""
        params, weak_params = inputs.params
        predict = create_predict(self._network, params, label)
        if inputs.guidance is not None:
            if self._weak is None:
                assert label is not None  # create_guidance requires it
                nothing = jnp.full_like(label, self._num_classes)
                weak = create_predict(self._network, params, nothing)
            else:
                weak = create_predict(self._weak, weak_params, label)
            predict = guidance.guide(predict, weak, *inputs.guidance)
        if self._plan.dynamic_threshold is not None:
            return guidance.dynamic_threshold(predict, self._plan.dynamic_threshold)
        return guidance.static_threshold(predict) if self._plan.clip_x_0 else predict

    def _of_device(
        self,
        inputs: ChainInputs,
        indices: Int[Array, " batch"],
        edited: PyTree,
        num_frames: int,
    ) -> Trajectory:
        predict = self._predict(inputs, self.label(indices))
        shape = (len(indices), *self._dataset.shape)
        key, sampler, x_T = inputs.key, inputs.sampler, None
        plan = self._plan.editing
        if edited is not None and plan is not None:
            # the noise of the edit must be independent of that of the chain
            edit_key, key = jax.random.split(key)
            keys = jax.vmap(jax.random.fold_in, (None, 0))(edit_key, indices)
            sampler, x_T = EDITS[plan.task].start(
                EditInputs(
                    plan=plan,
                    keys=keys,
                    predict=predict,
                    rows=inputs.rows,
                    sampler=sampler,
                    images=edited,
                )
            )
        return samplers.trajectory(
            key,
            predict,
            inputs.rows,
            sampler,
            shape,
            num_frames=num_frames,
            x_T=x_T,
            indices=indices,
            native=inputs.native,
        )

    def _invert_on_device(
        self, inputs: ChainInputs, x_0: Float[Array, "batch h w c"]
    ) -> Float[Array, "batch h w c"]:
        label = self.label(jnp.zeros(len(x_0), int))  # all images of an edit have one class
        return samplers.invert(self._predict(inputs, label), inputs.rows, x_0)

    def _run(
        self,
        inputs: ChainInputs,
        images: range,
        *,
        num_frames: int = 0,
        edited: EditedImages | None = None,
        latents: Latents | None = None,
    ) -> Trajectory:
        """Run the chains of the images of these numbers, the same number on each device."""
        # an uneven batch is filled up with images past its end, which the caller drops
        per_device = -(-len(images) // len(self._devices))
        numbers = images.start + np.arange(per_device * len(self._devices))
        indices = numbers.reshape(len(self._devices), per_device)
        made_from = None if edited is None else self._edited(edited, latents, indices)
        return self._trajectory(inputs, indices, made_from, num_frames)

    def _inputs(self, params: tuple[PyTree, PyTree], chain: Chain) -> ChainInputs:
        """The inputs of a chain with the plan's sampler and guidance, on the devices."""
        inputs = ChainInputs(
            params=params,
            rows=self._chain_rows(params, chain),
            native=self._schedule_of(params[0]),
            sampler=self._plan.sampler,
            guidance=self._plan.guidance,
            key=self._key,
        )
        return devices.replicate(inputs, self._devices)

    def _latents(self, inputs: ChainInputs, edited: EditedImages | None) -> Latents | None:
        """The latents of the edited images; None if the plan's edit needs none."""
        plan = self._plan.editing
        numbers_of = None if plan is None else EDITS[plan.task].inverted
        if edited is None or numbers_of is None:
            return None
        invert = functools.partial(self._inverse, inputs)
        num_devices = len(self._devices)
        return Latents(invert, edited.x_0, numbers_of=numbers_of, num_devices=num_devices)

    def _edited(
        self, images: EditedImages, latents: Latents | None, indices: Int[np.ndarray, "..."]
    ) -> dict[str, Array]:
        """The inputs of the edit of each index i: image i mod n of the file, and its latents."""
        last = max(self._plan.num_images - 1, 1)
        made_from = {
            "x_0": images.x_0[indices % len(images.x_0)],
            "mask": np.broadcast_to(images.mask, (*indices.shape, *images.mask.shape)),
            "fraction": np.minimum(indices / last, 1).astype(np.float32),
        }
        if latents is not None:
            made_from["latents"] = latents.of(indices)
        return made_from

    def grid(self, params: PyTree) -> SampleGrid:
        """Start sampling a small DDIM grid; it waits for the rows of a learned schedule only."""
        plan, native = self._plan, self._schedule_of(params)
        inputs = ChainInputs(
            params=(params, None),
            rows=schedules.respace(native, plan.grid_steps),
            native=native,
            sampler=samplers.ddim(eta=0.0),
            guidance=None,  # the weak network is restored only after the training
            key=self._key,
        )
        x_0 = self._run(devices.replicate(inputs, self._devices), range(plan.grid_images)).x_0
        return SampleGrid(x_0=x_0, num_images=plan.grid_images, levels=self._dataset.levels)

    def rows(self, params: PyTree) -> Schedule:
        """The rows of the plan's chain; those of an edit end at its timestep."""
        return self._chain_rows(params, self._plan.chain)

    def _chain_rows(self, params: PyTree, chain: Chain) -> Schedule:
        schedule, edit = self._schedule_of(params[0]), self._plan.editing
        with in_section("config.sampling"):  # the ends of a learned schedule are checked here
            return chain.rows(schedule if edit is None else edit.rows(schedule))

    def num_evaluations(self, params: PyTree) -> int:
        """Evaluations of the network for each sample, without those of inversions.

        Evaluations of the weak network, in the interval of the guidance, are not counted.
        """
        plan, sampler, num_steps = self._plan, self._plan.sampler, len(self.rows(params))
        task = "" if plan.editing is None else plan.editing.task
        if plan.editing is not None and task == "inpaint":
            jumps = plan.editing.num_resamples, plan.editing.jump_length
            # the number depends on neither the images nor the mask
            sampler = editing.Inpaint(sampler, None, None, *jumps)  # type: ignore[arg-type]  # unused
        return sampler.num_evaluations(num_steps) + (task == "variations")

    def num_evaluations_of_inversion(self, params: PyTree) -> int:
        """Evaluations of the network to invert one image; 0 if the plan inverts no images."""
        plan = self._plan.editing
        if plan is None or EDITS[plan.task].inverted is None:
            return 0
        return samplers.INVERSION_ROUNDS * len(self.rows(params))

    def batches(
        self, params: PyTree, first: int, edited: EditedImages | None
    ) -> Iterator[HostTrajectory]:
        """Sample the images of the plan from number ``first`` on, a batch [image, ...] at a time.

        ``params`` are those of the network and of the weak network. The frames [frame, image, ...]
        are those of the first images of the batch.
        """
        plan = self._plan
        inputs = self._inputs(params, plan.chain)
        latents = self._latents(inputs, edited)
        for start in range(first, plan.num_images, plan.batch_size):
            images = range(start, start + plan.batch_size)
            chains = self._run(
                inputs, images, num_frames=plan.num_frames, edited=edited, latents=latents
            )
            size = min(plan.batch_size, plan.num_images - start)
            shown = min(size, num_animated(self._dataset.levels))
            yield HostTrajectory(
                x_0=np.concatenate(chains.x_0)[:size],
                x_t=_first(chains.x_t, shown),
                predicted_x_0=_first(chains.predicted_x_0, shown),
            )

    def compared(self, params: PyTree, num_images: int) -> dict[int, np.ndarray]:
        """The first images by a chain of each length in ``compared_steps``, from the same noise."""
        images = {}
        for num_steps in self._plan.compared_steps:
            inputs = self._inputs(params, self._plan.chain._replace(num_steps=num_steps))
            x_0 = self._run(inputs, range(num_images)).x_0
            images[num_steps] = np.concatenate(x_0)[:num_images]
        return images


def _first(frames: Float[Array, "..."], shown: int) -> Float[np.ndarray, "frames shown ..."]:
    """The frames [device, frame, image, ...] of the first images, as [frame, image, ...]."""
    return np.concatenate(frames[:, :, :shown], axis=1)[:, :shown]


def noising(
    schedule: Schedule, key: Key[Array, ""], x_0: Float[Array, "batch ..."], num_frames: int
) -> Float[Array, "frames batch ..."]:
    """Frames of the forward process: x_t at evenly spaced timesteps, with the same eps in all."""
    eps = jax.random.normal(key, x_0.shape)
    timesteps = np.linspace(0, len(schedule), num_frames).round().astype(int)
    rows = schedules.with_terminal_row(schedule)[timesteps]
    return jax.vmap(process.q_sample, (0, None, None))(rows, x_0, eps)
