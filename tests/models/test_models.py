"""The networks: their outputs and dependencies, and their layers against the formulas."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from rounding import rounding

from diffusion_jax.diffusion.network import Model
from diffusion_jax.errors import ConfigError
from diffusion_jax.models import MODELS, create_model
from diffusion_jax.models.layers import conv
from diffusion_jax.models.layers.attention import Attention
from diffusion_jax.models.layers.norm import GroupNorm, lean_norm_silu, norm_silu
from diffusion_jax.models.unet import Upsample, dropout

UNET = {
    "name": "unet",
    "width": 8,
    "channel_multipliers": (1, 2),
    "num_blocks": 1,
    "attention_resolutions": (4,),
    "head_channels": 8,
    "dropout": 0.0,
    "class_conditional": False,
    "dtype": "float32",
}
MLP = {"name": "mlp", "width": 8, "num_layers": 2, "class_conditional": False}
ONE_LEVEL = {"channel_multipliers": (1,), "attention_resolutions": (8,)}  # compiles faster
CASES = {"unet": (UNET, (8, 8, 1)), "mlp": (MLP, (2,))}
NUM_CLASSES = 3


@functools.cache
def create(name, learned_variance=False, shape=None, **changes):
    fields, default_shape = CASES[name]
    shape = shape or default_shape
    fields = fields | changes
    model = create_model(fields, shape, NUM_CLASSES, learned_variance=learned_variance)
    return Model(model.init, jax.jit(model.apply)), shape


def random_params(model, seed=0):
    """Parameters that are nowhere zero, so that every layer affects the output."""
    noise = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: 0.3 * noise.standard_normal(leaf.shape, np.float32),
        jax.eval_shape(model.init, jax.random.key(0)),
    )


def inputs(shape, batch=3, seed=1):
    x_t = np.random.default_rng(seed).standard_normal((batch, *shape)).astype(np.float32)
    return jnp.asarray(x_t), jnp.linspace(1.0, 900.5, batch)


def test_every_model_is_tested():
    assert set(CASES) == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_output_is_zero_at_initialisation_and_not_later(name):
    model, shape = create(name)
    x_t, timestep = inputs(shape)
    at_start = model.apply(model.init(jax.random.key(0)), x_t, timestep, None, None)
    assert not at_start.any()
    later = model.apply(random_params(model), x_t, timestep, None, None)
    assert np.isfinite(later).all()
    assert later.all()
    for output in (at_start, later):
        assert output.shape == x_t.shape
        assert output.dtype == jnp.float32


@pytest.mark.parametrize("name", MODELS)
def test_a_learned_variance_doubles_the_last_axis(name):
    model, shape = create(name, learned_variance=True)
    x_t, timestep = inputs(shape)
    output = jax.eval_shape(model.apply, random_params(model), x_t, timestep, None, None)
    assert output.shape == (3, *shape[:-1], 2 * shape[-1])


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_float32_in_nested_dicts(name):
    model, _ = create(name)
    params, other = model.init(jax.random.key(0)), model.init(jax.random.key(1))

    def check(node):
        if isinstance(node, dict):
            assert all(type(key) is str for key in node)
            for value in node.values():
                check(value)
        else:
            assert isinstance(node, jax.Array)
            assert node.dtype == jnp.float32

    check(params)
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(other)))


def test_initial_kernels_are_glorot_uniform():
    params = create("unet")[0].init(jax.random.key(0))
    kernel = np.asarray(params["down"]["1"]["0"]["conv_1"]["kernel"])  # 3x3, 8 to 16
    bound = math.sqrt(6 / (9 * (8 + 16)))
    assert np.abs(kernel).max() <= bound
    assert np.abs(kernel.mean()) < 4 * bound / math.sqrt(3 * kernel.size)
    np.testing.assert_allclose(kernel.std(), bound / math.sqrt(3), rtol=0.07)
    assert abs(np.corrcoef(kernel[0].ravel(), kernel[1].ravel())[0, 1]) < 0.25


def test_parameter_count_of_ddpm_on_cifar10():
    """35.7 M in the paper (Ho et al. 2020, appendix B), and exactly that of their checkpoint."""
    model, _ = create(
        "unet",
        shape=(32, 32, 3),
        width=128,
        channel_multipliers=(1, 2, 2, 2),
        num_blocks=2,
        attention_resolutions=(16,),
        head_channels=256,
    )
    params = jax.eval_shape(model.init, jax.random.key(0))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == 35_746_307


def test_bfloat16_computes_the_same_to_its_precision():
    model, shape = create("unet")
    half, _ = create("unet", dtype="bfloat16")
    params = random_params(model)
    assert jax.tree.all(
        jax.tree.map(lambda leaf: leaf.dtype == jnp.float32, half.init(jax.random.key(0)))
    )
    x_t, timestep = inputs(shape)
    exact = model.apply(params, x_t, timestep, None, None)
    rounded = half.apply(params, x_t, timestep, None, None)
    assert rounded.dtype == jnp.float32
    assert 1e-4 < jnp.abs(rounded - exact).max() / jnp.abs(exact).max() < 0.1


@pytest.mark.parametrize("name", MODELS)
def test_an_output_depends_on_its_own_example_and_every_parameter(name):
    model, shape = create(name, class_conditional=True)
    x_t, timestep = inputs(shape)
    label, weights = jnp.array([0, 1, 2]), inputs(shape, seed=2)[0][1]

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1, 2))
    def gradient(params, x_t, timestep):
        return (model.apply(params, x_t, timestep, label, None)[1] * weights).sum()

    by_params, by_x_t, by_timestep = gradient(random_params(model), x_t, timestep)
    assert not by_x_t[::2].any()
    assert not by_timestep[::2].any()
    assert by_x_t[1].all()
    assert by_timestep[1] != 0
    leaves = jax.tree_util.tree_leaves_with_path(by_params)
    assert all(jnp.isfinite(leaf).all() for _, leaf in leaves)
    assert [jax.tree_util.keystr(path) for path, leaf in leaves if not leaf.any()] == []


@pytest.mark.parametrize("name", MODELS)
def test_the_label_matters_if_and_only_if_conditional(name):
    for conditional in (False, True):
        model, shape = create(name, class_conditional=conditional)
        params = random_params(model)
        x_t, timestep = inputs(shape)
        zero, two = (
            model.apply(params, x_t, timestep, jnp.full(3, label), None) for label in (0, 2)
        )
        assert (zero != two).any() == conditional
    with pytest.raises(ConfigError, match=r"^label = None: must be one per example"):
        model.apply(params, x_t, timestep, None, None)


@pytest.mark.parametrize("name", MODELS)
def test_no_class_is_an_extra_label_with_its_own_embedding(name):
    model, shape = create(name, class_conditional=True)
    params = random_params(model)
    assert params["embedding"]["label"]["embedding"].shape[0] == NUM_CLASSES + 1
    (x_t,), (timestep,) = (leaf[:1] for leaf in inputs(shape))
    every = jnp.arange(NUM_CLASSES + 1)
    same = jnp.broadcast_to(x_t, (len(every), *shape)), jnp.broadcast_to(timestep, len(every))
    outputs = np.asarray(model.apply(params, *same, every, None)).reshape(len(every), -1)
    assert np.isfinite(outputs).all()
    assert len(np.unique(outputs, axis=0)) == len(every)


def test_dropout_belongs_to_the_example_not_to_the_batch():
    model, shape = create("unet", dropout=0.5, **ONE_LEVEL)
    params = random_params(model)
    x_t, timestep = inputs(shape)
    keys = jax.random.split(jax.random.key(3), 3)
    whole = model.apply(params, x_t, timestep, None, keys)
    order = jnp.array([2, 2, 0])
    part = model.apply(params, x_t[order], timestep[order], None, keys[order])
    np.testing.assert_allclose(part, whole[order], rtol=1e-4, atol=1e-4)
    without = create("unet", **ONE_LEVEL)[0].apply(params, x_t, timestep, None, None)
    assert (jnp.abs(whole - without) > 1e-3).any(axis=(1, 2, 3)).all()
    other = model.apply(params, x_t, timestep, None, jax.random.split(jax.random.key(4), 3))
    assert (jnp.abs(whole - other) > 1e-3).any(axis=(1, 2, 3)).all()


def test_dropout_keeps_the_mean_and_differs_between_layers():
    keys = jax.random.split(jax.random.key(0), 50)
    ones = jnp.ones((50, 10, 10, 4))
    first, second = (dropout(ones, 0.3, number, keys) for number in (0, 1))
    mask = first != 0
    np.testing.assert_allclose(first[mask], 1 / 0.7, rtol=1e-6)
    # Means of n Bernoulli variables, within five standard deviations
    assert abs(mask.mean() - 0.7) < 5 * math.sqrt(0.3 * 0.7 / mask.size)
    both = (mask & (second != 0)).mean()
    assert abs(both - 0.7**2) < 5 * math.sqrt(0.49 * 0.51 / mask.size)


@pytest.mark.parametrize("offset", [0.0, 300.0])
@pytest.mark.parametrize("channels", [2, 6, 32, 128, 160])
def test_group_norm_is_the_formula(channels, offset):
    norm = GroupNorm(channels)
    assert channels % norm.groups == 0
    assert norm.groups <= 32
    assert norm.groups == 1 or channels // norm.groups >= 4
    rng = np.random.default_rng(0)
    scale, bias = rng.standard_normal((2, channels))
    norm.scale[...], norm.bias[...] = jnp.float32(scale), jnp.float32(bias)
    x = np.float32(rng.standard_normal((2, 4, 6, channels)) * rng.uniform(0.5, 2, channels))
    x += np.float32(offset + rng.standard_normal(channels))
    grouped = x.astype(np.float64).reshape(2, 24, norm.groups, -1)
    mean = grouped.mean((1, 3), keepdims=True)
    var = np.square(grouped - mean).mean((1, 3), keepdims=True)
    expected = ((grouped - mean) / np.sqrt(var + 1e-5)).reshape(x.shape) * scale + bias
    # float32 has a spacing of 3e-5 near 300; E[x^2] - E[x]^2 would be off by 1e-2
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, atol=2e-5 if offset == 0 else 3e-4)


@pytest.mark.parametrize("groups", [1, 3, 12])
def test_the_lean_and_the_plain_gradient_of_norm_and_silu_are_exact(groups):
    """Both forms in float32 agree with the gradient of the formula in float64."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x, dy = jnp.asarray(3 + rng.standard_normal((2, 2, 4, 5, 12)))
        scale, bias = jnp.asarray(rng.standard_normal((2, 12)))

        def plain(x, scale, bias):
            grouped = x.reshape(2, 20, groups, -1)
            mean = grouped.mean((1, 3), keepdims=True)
            deviation = jnp.sqrt(jnp.square(grouped - mean).mean((1, 3), keepdims=True) + 1e-5)
            z = ((grouped - mean) / deviation).reshape(x.shape) * scale + bias
            return z / (1 + jnp.exp(-z))

        with jax.numpy_rank_promotion("allow"):  # the formula broadcasts
            expected, gradient = jax.vjp(plain, x, scale, bias)
            expected_gradients = gradient(dy)
        x, scale, bias, dy = (jnp.float32(array) for array in (x, scale, bias, dy))
    for function in (norm_silu, lean_norm_silu):
        found, gradient = jax.vjp(functools.partial(function, groups), x, scale, bias)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
        for one, other in zip(gradient(dy), expected_gradients):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5)


def test_the_gradient_in_training_is_that_of_the_plain_forms():
    """Keys make the network use its training forms; without dropout they change no result."""
    model, shape = create("unet", **ONE_LEVEL)
    params = random_params(model)
    x_t, timestep = inputs(shape)
    keys = jax.random.split(jax.random.key(0), len(x_t))

    def loss(params, keys):
        return jnp.mean(jnp.square(model.apply(params, x_t, timestep, None, keys)))

    gradients = [jax.jit(jax.grad(loss))(params, of_step) for of_step in (keys, None)]
    norms = [optax.tree.norm(gradient) for gradient in gradients]
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-5)
    for one, other in zip(*map(jax.tree.leaves, gradients)):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6 * float(norms[0]))


def test_the_lean_forms_store_less_than_the_plain_gradient():
    """The lean form stores about its input alone; the plain one more than three times as much."""
    x = jax.ShapeDtypeStruct((2, 16, 16, 32), jnp.float32)
    weights = jax.ShapeDtypeStruct((32,), jnp.float32)

    def stored_size(function):
        def forward(*inputs):
            return jax.vjp(lambda *inputs: function(8, *inputs), *inputs)[1]

        leaves = jax.tree.leaves(jax.eval_shape(forward, x, weights, weights))
        return sum(leaf.size for leaf in leaves if hasattr(leaf, "size")) / x.size

    assert stored_size(lean_norm_silu) < 1.1
    assert stored_size(norm_silu) > 3


def test_attention_is_the_formula():
    attention = Attention(12, 3, dtype=jnp.float32, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    for layer in (attention.qkv, attention.proj):
        layer.kernel[...] = jnp.float32(rng.standard_normal(layer.kernel.shape) / 2)
        layer.bias[...] = jnp.float32(rng.standard_normal(layer.bias.shape) / 2)
    x = jnp.float32(rng.standard_normal((2, 2, 3, 12)))
    qkv = np.asarray(attention.qkv(attention.norm(x)), np.float64).reshape(2, 6, 3, 3, 4)
    h = np.zeros((2, 6, 12))
    for image in range(2):
        for head in range(3):
            for pixel in range(6):
                q, k, v = qkv[image, pixel, 0, head], qkv[image, :, 1, head], qkv[image, :, 2, head]
                weights = np.exp(k @ q / math.sqrt(4))
                h[image, pixel, 4 * head : 4 * head + 4] = weights @ v / weights.sum()
    expected = x + attention.proj(jnp.float32(h).reshape(x.shape))
    np.testing.assert_allclose(attention(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("channels", "is_training"), [(5, True), (128, True), (32, False)])
@pytest.mark.parametrize("shape", [(4, 4), (3, 5), (1, 1)])
def test_upsample_is_nearest_neighbour_then_convolution(shape, channels, is_training):
    upsample = Upsample(channels, dtype=jnp.float32, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    for parameter in (upsample.conv.kernel, upsample.conv.bias):
        parameter[...] = jnp.float32(rng.standard_normal(parameter.shape))
    x = jnp.float32(rng.standard_normal((2, *shape, channels)))
    large = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    plain = upsample.conv(large)
    squares = conv.plain(jnp.square(large), jnp.square(upsample.conv.kernel[...]))
    bound = 2 * rounding(9 * channels, squares)  # both results are rounded
    np.testing.assert_allclose(upsample(x, is_training), plain, rtol=0, atol=bound)


def test_images_of_any_size_that_the_strides_divide_are_allowed():
    for shape, fields in (
        ((12, 20, 3), {"attention_resolutions": (6,)}),
        ((5, 3, 1), {"channel_multipliers": (1,), "attention_resolutions": ()}),
    ):
        model, _ = create("unet", shape=shape, **fields)
        x_t, timestep = inputs(shape)
        output = jax.eval_shape(model.apply, random_params(model), x_t, timestep, None, None)
        assert output.shape == x_t.shape


@pytest.mark.parametrize("name", MODELS)
def test_a_network_compiles_once_and_runs_under_vmap_scan_and_pmap(name):
    model, shape = create(name, **(ONE_LEVEL if name == "unet" else {}))
    params, others = random_params(model, 0), random_params(model, 1)
    x_t, timestep = inputs(shape)
    traces = []

    @jax.jit
    def apply(params, x_t, timestep):
        traces.append(None)
        return model.apply(params, x_t, timestep, None, None)

    first, second = apply(params, x_t, timestep), apply(others, x_t, timestep + 1)
    assert len(traces) == 1

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), params, others)
    steps = jnp.stack([timestep, timestep + 1])
    close = {"rtol": 1e-4, "atol": 1e-4}
    batched = jax.vmap(apply, (0, None, 0))(stacked, x_t, steps)
    np.testing.assert_allclose(batched, jnp.stack([first, second]), **close)
    _, scanned = jax.lax.scan(lambda carry, row: (carry, apply(carry, x_t, row)), params, steps)
    np.testing.assert_allclose(scanned[0], first, **close)
    mapped = jax.pmap(apply, in_axes=(None, None, 0))(params, x_t, steps)
    np.testing.assert_allclose(mapped, scanned, **close)


WRONG = [
    ("unet", {"name": "unett"}, "config.model.name = 'unett': unknown .*'unet'"),
    ("unet", {"widht": 8}, "'widht': unknown .*'width'"),
    ("unet", {"width": None}, "config.model.width is missing"),
    ("unet", {"width": 0}, "config.model.width = 0: must be"),
    ("unet", {"width": 7}, "config.model.width = 7: must be"),
    ("unet", {"width": 8.0}, "config.model.width = 8.0: must be an integer"),
    ("unet", {"width": True}, "config.model.width = True: must be an integer"),
    ("unet", {"channel_multipliers": ()}, r"config.model.channel_multipliers = \(\): must be"),
    ("unet", {"channel_multipliers": (1, 0)}, r"config.model.channel_multipliers = \(1, 0\): must"),
    ("unet", {"channel_multipliers": (1, 1.5)}, "must be a tuple of integers"),
    ("unet", {"channel_multipliers": (1, 1, 1, 1, 1)}, r"length 4 or less .*\(8, 8, 1\)"),
    ("unet", {"num_blocks": 0}, "config.model.num_blocks = 0: must be at least 1"),
    ("unet", {"attention_resolutions": (5,)}, r"attention_resolutions = \(5,\): .*\[8, 4\]"),
    ("unet", {"head_channels": 5}, "config.model.head_channels = 5: .* 16 channels"),
    ("unet", {"head_channels": 0}, "config.model.head_channels = 0: must be"),
    ("unet", {"head_channels": 16, "attention_resolutions": (8,)}, "head_channels = 16: .* 8 chan"),
    ("unet", {"dropout": 1.0}, "config.model.dropout = 1.0: must be"),
    ("unet", {"dropout": -0.1}, "config.model.dropout = -0.1: must be"),
    ("unet", {"dropout": float("nan")}, "config.model.dropout = nan: must be"),
    ("unet", {"dropout": "0.1"}, "config.model.dropout = '0.1': must be a number"),
    ("unet", {"dtype": "float16"}, "config.model.dtype = 'float16': unknown .*bfloat16"),
    ("unet", {"class_conditional": True}, "config.model.class_conditional = True: .*classes"),
    ("mlp", {"num_layers": 0}, "config.model.num_layers = 0: must be at least 1"),
    ("mlp", {"width": 3}, "config.model.width = 3: must be"),
    ("mlp", {"dropout": 0.1}, "'dropout': unknown .*num_layers"),
]


@pytest.mark.parametrize(("name", "changes", "message"), WRONG, ids=[str(c[1]) for c in WRONG])
def test_wrong_fields_are_named(name, changes, message):
    fields, shape = CASES[name]
    fields = {key: value for key, value in (fields | changes).items() if value is not None}
    with pytest.raises(ConfigError, match=message) as error:
        create_model(fields, shape, None)
    assert "\n" not in str(error.value)


def test_networks_refuse_data_of_another_kind():
    with pytest.raises(ConfigError, match="'unet': must be 'mlp' for data"):
        create("unet", shape=(2,))
    with pytest.raises(ConfigError, match="'mlp': must be 'unet' for data"):
        create("mlp", shape=(8, 8, 1))
