"""What can be done with given images: each edit is a sampler and the x_T that it starts from."""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jaxtyping import Array, Float, Key

from diffusion_jax.diffusion import editing, samplers
from diffusion_jax.diffusion.process import Predict
from diffusion_jax.diffusion.samplers.base import Sampler
from diffusion_jax.diffusion.schedules.schedule import Schedule
from diffusion_jax.experiment.editing import EditingPlan


class EditInputs(NamedTuple):
    """What an edit is made from; ``rows`` end at the plan's timestep."""

    plan: EditingPlan
    keys: Key[Array, " batch"]
    predict: Predict
    rows: Schedule
    sampler: Sampler
    images: dict[str, Array]  # x_0, mask, fraction and ends, see Generator


# The sampler of an edit, and the x_T that it starts from; None: from noise.
Start = tuple[Sampler, Float[Array, "batch ..."] | None]


def _image_to_image(inputs: EditInputs) -> Start:
    """SDEdit: noise the image up to a timestep and denoise it."""
    begun = editing.diffuse(inputs.keys, inputs.rows[-1], inputs.images["x_0"])
    return inputs.sampler, begun


def _inpaint(inputs: EditInputs) -> Start:
    """RePaint, from pure noise or from the noised image."""
    plan, x_0 = inputs.plan, inputs.images["x_0"]
    jumps = plan.num_resamples, plan.jump_length
    sampler = editing.inpaint(inputs.sampler, x_0, inputs.images["mask"], *jumps)
    if plan.timestep is None:
        return sampler, None
    return sampler, editing.diffuse(inputs.keys, inputs.rows[-1], x_0)


def _interpolate(inputs: EditInputs) -> Start:
    """The latents of the first and the last image, joined by an arc."""
    ends = inputs.images["ends"]
    first, last = (samplers.invert(inputs.predict, inputs.rows, x_0) for x_0 in ends)

    def join(first: Array, last: Array, fraction: Array) -> Array:
        return editing.slerp(first[None], last[None], fraction[None])[0, 0]

    return inputs.sampler, jax.vmap(join)(first, last, inputs.images["fraction"])


def _variations(inputs: EditInputs) -> Start:
    """The latent of the image with part of its noise drawn anew."""
    predict, last = inputs.predict, inputs.rows[-1]
    x_T = samplers.invert(predict, inputs.rows, inputs.images["x_0"])
    varied = editing.vary(inputs.keys, last, x_T, predict(x_T, last), inputs.plan.strength)
    return inputs.sampler, varied


EDITS: dict[str, Callable[..., Start]] = {
    "image_to_image": _image_to_image,
    "inpaint": _inpaint,
    "interpolate": _interpolate,
    "variations": _variations,
}
