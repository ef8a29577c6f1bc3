"""The latents of edited images: those of DDIM's inversion, each computed once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion import process, samplers, schedules
from diffusion_jax.sampling.edits import EDITS
from diffusion_jax.sampling.latents import Latents

ROWS = schedules.respace(schedules.cosine(100), 10)


def predict(x_t, row):
    """The exact denoiser of data from N(0, 0.25)."""
    variance = row.alpha_bar * 0.25 + row.one_minus_alpha_bar
    x_0 = jnp.sqrt(row.alpha_bar) * 0.25 / variance * x_t
    return process.Prediction(x_0, process.eps_of_x_0(row, x_t, x_0))


@pytest.fixture
def x_0():
    return np.random.default_rng(0).normal(0, 0.5, (5, 2, 3, 1)).astype(np.float32)


@pytest.mark.parametrize("num_devices", [1, 2, 3])
@pytest.mark.parametrize("task", [name for name, edit in EDITS.items() if edit.inverted])
def test_every_image_is_inverted_once_and_each_index_gets_its_own(task, num_devices, x_0):
    calls = []

    def invert(images):
        calls.append(images)
        return jax.vmap(lambda batch: samplers.invert(predict, ROWS, batch))(images)

    numbers_of = EDITS[task].inverted
    latents = Latents(invert, x_0, numbers_of=numbers_of, num_devices=num_devices)
    expected = np.asarray(samplers.invert(predict, ROWS, jnp.asarray(x_0)))
    for first in range(0, 24, 6):
        indices = np.arange(first, first + 6).reshape(num_devices, -1)
        numbers = np.array([0, 4]) if task == "interpolate" else indices[..., None] % 5
        wanted = np.broadcast_to(expected[numbers], latents.of(indices).shape)
        np.testing.assert_allclose(latents.of(indices), wanted, rtol=1e-6, atol=1e-6)
    assert len(calls) == 1
    num_images = 2 if task == "interpolate" else 5
    assert calls[0].shape[:2] == (num_devices, -(-num_images // num_devices))


def test_calls_have_one_shape_when_images_are_needed_later(x_0):
    """Batches of 4 of 5 images: the second batch needs one image more."""
    shapes = []

    def invert(images):
        shapes.append(images.shape)
        return 2 * images

    numbers_of = EDITS["variations"].inverted
    latents = Latents(invert, x_0, numbers_of=numbers_of, num_devices=2)
    for first in (0, 4, 8, 12):
        indices = np.arange(first, first + 4).reshape(2, 2)
        np.testing.assert_array_equal(latents.of(indices)[..., 0, :, :, :], 2 * x_0[indices % 5])
    assert shapes == [(2, 2, 2, 3, 1)] * 2
    latents = Latents(invert, x_0, numbers_of=numbers_of, num_devices=2)
    latents.of(np.zeros((2, 1), int))  # one image at first, then four more: in parts of two
    np.testing.assert_array_equal(latents.of(np.arange(5))[:, 0], 2 * x_0)
    assert shapes[2:] == [(2, 1, 2, 3, 1)] * 3
