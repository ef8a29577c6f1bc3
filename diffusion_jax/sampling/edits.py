"""The edits of images: each is a sampler, and the x_T that its chain starts from."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Key

from diffusion_jax.diffusion import editing
from diffusion_jax.diffusion.process import Predict
from diffusion_jax.diffusion.samplers.base import Sampler
from diffusion_jax.diffusion.schedules.schedule import Schedule
from diffusion_jax.experiment.editing import EditingPlan


class EditInputs(NamedTuple):
    """The inputs of an edit; ``rows`` end at the plan's timestep."""

    plan: EditingPlan
    keys: Key[Array, " batch"]
    predict: Predict
    rows: Schedule
    sampler: Sampler
    images: dict[str, Array]  # x_0, mask, fraction and latents, see Generator


# The sampler of an edit, and the x_T that its chain starts from; None: x_T ~ N(0, I).
Start = tuple[Sampler, Float[Array, "batch ..."] | None]


def _image_to_image(inputs: EditInputs) -> Start:
    """SDEdit: noise the image up to the plan's timestep, then denoise it."""
    begun = editing.diffuse(inputs.keys, inputs.rows[-1], inputs.images["x_0"])
    return inputs.sampler, begun


def _inpaint(inputs: EditInputs) -> Start:
    """RePaint, from pure noise or from the image noised up to the plan's timestep."""
    plan, x_0 = inputs.plan, inputs.images["x_0"]
    jumps = plan.num_resamples, plan.jump_length
    sampler = editing.inpaint(inputs.sampler, x_0, inputs.images["mask"], *jumps)
    if plan.timestep is None:
        return sampler, None
    return sampler, editing.diffuse(inputs.keys, inputs.rows[-1], x_0)


def _interpolate(inputs: EditInputs) -> Start:
    """Spherical interpolation between the latents of the first and the last image."""
    latents = inputs.images["latents"]

    def join(first: Array, last: Array, fraction: Array) -> Array:
        return editing.slerp(first[None], last[None], fraction[None])[0, 0]

    x_T = jax.vmap(join)(latents[:, 0], latents[:, 1], inputs.images["fraction"])
    return inputs.sampler, x_T


def _variations(inputs: EditInputs) -> Start:
    """The latent of the image, with its noise rotated towards fresh noise, see ``editing.vary``."""
    x_T, last = inputs.images["latents"][:, 0], inputs.rows[-1]
    prediction = inputs.predict(x_T, last)
    return inputs.sampler, editing.vary(inputs.keys, last, x_T, prediction, inputs.plan.strength)


def _ends(indices: Int[np.ndarray, "..."], num_images: int) -> Int[np.ndarray, "... 2"]:
    """The numbers of the first and the last image, for every index."""
    return np.broadcast_to([0, num_images - 1], (*indices.shape, 2))


def _own(indices: Int[np.ndarray, "..."], num_images: int) -> Int[np.ndarray, "... 1"]:
    """The number i mod n of an image, for each index i."""
    return indices[..., None] % num_images


class Edit(NamedTuple):
    """A task: the start of its chain, and the numbers of the images whose latents it needs."""

    start: Callable[[EditInputs], Start]
    inverted: Callable[[Int[np.ndarray, "..."], int], Int[np.ndarray, "..."]] | None = None


EDITS: dict[str, Edit] = {
    "image_to_image": Edit(_image_to_image),
    "inpaint": Edit(_inpaint),
    "interpolate": Edit(_interpolate, inverted=_ends),
    "variations": Edit(_variations, inverted=_own),
}
