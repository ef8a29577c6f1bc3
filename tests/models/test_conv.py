"""The fast forms of convolutions and their gradients against the sums that define them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rounding import UNIT, rounding

from diffusion_jax.models.layers import conv, upsample

NARROW, WIDE = conv.MIN_CHANNELS, conv.MIN_CHANNELS_IN_TRAINING
SHAPES = {
    "even": (2, 28, 28, NARROW, 64),
    "odd": (3, 7, 5, 64, NARROW),
    "one pixel": (1, 1, 1, NARROW, NARROW),
    "in groups": (6, 32, 32, 128, NARROW),
    "products apart": (2, 5, 6, WIDE, 160),
}


def arrays(batch, height, width, c_in, c_out, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((batch, height, width, c_in))
    return np.float32(x), np.float32(rng.standard_normal((3, 3, c_in, c_out)))


def exact(x, kernel):
    """The convolution in float64: nine shifted products."""
    height, width = x.shape[1:3]
    around = np.pad(np.float64(x), ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifts = [(i, j) for i in range(3) for j in range(3)]
    return sum(around[:, i : i + height, j : j + width] @ kernel[i, j] for i, j in shifts)


def rounding_of(x, kernel):
    """A bound on the rounding error of the convolution in float32, in any form."""
    return rounding(9 * x.shape[3], exact(np.square(x), np.square(kernel)))


@pytest.mark.parametrize("form", [conv.plain, conv.winograd])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_convolution_is_its_sum_to_float32_rounding(form, shape):
    x, kernel = arrays(*shape)
    expected = exact(x, kernel)
    error = np.abs(form(jnp.asarray(x), jnp.asarray(kernel)) - expected).max()
    assert error < rounding_of(x, kernel)


def test_a_batch_is_convolved_in_groups_of_images_that_fit_the_cache():
    x, kernel = (jnp.asarray(array) for array in arrays(*SHAPES["in groups"]))
    scans = [e for e in jax.make_jaxpr(conv.winograd)(x, kernel).eqns if e.primitive.name == "scan"]
    assert [e.params["length"] for e in scans] == [6]  # one image takes 2 MiB
    wide = 5, 64, 64, 256, WIDE  # one image takes 16 MiB
    x, kernel = (jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays(*wide))
    scans = [e for e in jax.make_jaxpr(conv.winograd)(x, kernel).eqns if e.primitive.name == "scan"]
    assert [e.params["length"] for e in scans] == [
        5
    ]  # four images would fit, but 4 does not divide 5
    x, kernel = (jnp.asarray(array) for array in arrays(*SHAPES["even"]))
    assert "scan" not in str(jax.make_jaxpr(conv.winograd)(x, kernel))


@pytest.mark.parametrize(("platform", "is_plain"), [("cpu", False), ("cuda", True), ("tpu", True)])
def test_only_a_cpu_convolves_by_winograd(platform, is_plain):
    x, kernel = (jnp.asarray(array) for array in arrays(*SHAPES["even"]))
    lowered = jax.jit(conv.convolve).trace(x, kernel).lower(lowering_platforms=(platform,))
    assert ("convolution" in lowered.as_text()) == is_plain


@pytest.mark.parametrize(("c_in", "dtype"), [(NARROW // 2, jnp.float32), (NARROW, jnp.bfloat16)])
def test_few_channels_and_low_precision_are_convolved_plainly(c_in, dtype):
    x, kernel = arrays(1, 4, 4, c_in, NARROW)
    x, kernel = jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)
    found = conv.convolve(x, kernel)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, conv.plain(x, kernel))


def test_both_modes_of_differentiation_are_those_of_the_plain_form():
    x, kernel = (jnp.asarray(array) for array in arrays(2, 5, 6, NARROW, NARROW))
    dx, dk = jnp.flip(x, 0), jnp.flip(kernel, 0)
    for form in (jax.jvp, lambda f, *a: jax.vjp(f, *a[0])[1](f(*a[1]))):
        expected, found = (form(f, (x, kernel), (dx, dk)) for f in (conv.plain, conv.convolve))
        for one, other in zip(expected, found):
            np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(one).max())


LARGE, SMALL = (3, 10, 9, WIDE, 160), (3, 7, 9, WIDE, WIDE)  # 75 tiles and 60


def exact_gradients(x, kernel, dy):
    """The gradients of sum(dy * convolution) for x and for the kernel, in float64."""
    height, width = x.shape[1:3]
    around = np.pad(np.float64(x), ((0, 0), (1, 1), (1, 1), (0, 0)))
    dk = np.zeros(kernel.shape)
    for i in range(3):
        for j in range(3):
            window = around[:, i : i + height, j : j + width]
            dk[i, j] = np.tensordot(window, np.float64(dy), ((0, 1, 2), (0, 1, 2)))
    return exact(dy, np.flip(kernel, (0, 1)).swapaxes(2, 3)), dk


@pytest.mark.parametrize("shape", [LARGE, SMALL, SHAPES["one pixel"], SHAPES["products apart"]])
def test_gradients_in_training_are_their_sums_to_float32_rounding(shape):
    x, kernel = arrays(*shape)
    dy, _ = arrays(*shape[:3], shape[4], 1, seed=1)
    expected = exact_gradients(x, kernel, dy)
    squares = exact_gradients(np.square(x), np.square(kernel), np.square(dy))
    terms = 9 * shape[4], np.prod(shape[:3])  # in the gradients for the inputs and the kernel
    bounds = [rounding(*sums) for sums in zip(terms, squares)]
    of_plain = 2 * rounding_of(x, kernel)
    x, kernel, dy = jnp.asarray(x), jnp.asarray(kernel), jnp.asarray(dy)
    y, pull_back = jax.vjp(conv.convolve_in_training, x, kernel)
    np.testing.assert_allclose(y, conv.plain(x, kernel), rtol=0, atol=of_plain)
    for found in (pull_back(dy), conv.winograd_gradients(x, kernel, dy)):
        for one, other, bound in zip(found, expected, bounds):
            np.testing.assert_allclose(one, other, rtol=0, atol=bound)


@pytest.mark.parametrize(
    ("shape", "platform", "is_plain"),
    [(LARGE, "cpu", False), (SMALL, "cpu", True), (LARGE, "cuda", True)],
)
def test_only_a_cpu_trains_by_winograd_and_only_on_large_batches(shape, platform, is_plain):
    x, kernel = (jnp.asarray(array) for array in arrays(*shape))
    gradient = jax.grad(lambda *inputs: conv.convolve_in_training(*inputs).sum(), (0, 1))
    lowered = jax.jit(gradient).trace(x, kernel).lower(lowering_platforms=(platform,))
    assert ("convolution" in lowered.as_text()) == is_plain


def test_a_wide_layer_adds_no_transforms_to_the_memory_of_a_step():
    """A transform is four times as large as its input; the backward pass computes it again."""
    x = jax.ShapeDtypeStruct((8, 16, 16, WIDE), jnp.float32)
    kernel = jax.ShapeDtypeStruct((3, 3, WIDE, WIDE), jnp.float32)

    def temporaries(num_layers):
        def loss(x, kernels):
            for kernel in kernels:
                x = nnx.silu(conv.convolve_in_training(x, kernel))
            return x.sum()

        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(x, [kernel] * num_layers).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    of_a_layer = (temporaries(7) - temporaries(3)) / 4
    assert of_a_layer < 3.5 * 4 * x.size  # its input and what silu stores


@pytest.mark.parametrize("form", [upsample.plain, upsample.phases, upsample.nine_products])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_an_upsampled_convolution_is_its_sum_to_float32_rounding(form, shape):
    x, kernel = arrays(*shape)
    large = np.repeat(np.repeat(x, 2, axis=1), 2, axis=2)
    error = np.abs(form(jnp.asarray(x), jnp.asarray(kernel)) - exact(large, kernel)).max()
    assert error < rounding_of(large, kernel)


@pytest.mark.parametrize(
    ("channels", "is_training", "platform", "is_of_phases"),
    [
        *((NARROW, False, "cpu", False), (NARROW, True, "cpu", True), (WIDE, True, "cpu", False)),
        *((NARROW // 2, False, "cpu", True), (WIDE, False, "cuda", True)),
    ],
)
def test_only_a_cpu_upsamples_by_nine_products(channels, is_training, platform, is_of_phases):
    x, kernel = (jnp.asarray(array) for array in arrays(2, 4, 4, channels, channels))
    traced = jax.jit(upsample.upsample, static_argnums=2).trace(x, kernel, is_training)
    lowered = traced.lower(lowering_platforms=(platform,))
    assert ("convolution" in lowered.as_text()) == is_of_phases


@pytest.mark.parametrize("c_in", [NARROW, WIDE])
def test_a_layer_is_the_same_in_training(c_in):
    layer = conv.Conv3x3(c_in, 160, (3, 3), dtype=jnp.float32, rngs=nnx.Rngs(0))
    layer.bias[...] = jnp.arange(160.0)
    x, _ = arrays(4, 8, 8, c_in, 160)
    kernel = np.asarray(layer.kernel[...])
    expected = exact(x, kernel) + np.arange(160)
    bound = rounding_of(x, kernel) + 200 * UNIT  # plus the rounding of adding the bias
    for is_training in (True, False):
        np.testing.assert_allclose(layer(jnp.asarray(x), is_training), expected, rtol=0, atol=bound)
