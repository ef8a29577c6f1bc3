"""Initial parameters: the distribution of each initialiser, and the exact bits of the networks'."""

import functools
import hashlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffusion_jax.models import MODELS, create_model
from diffusion_jax.models.pure import pure, uniform

WIDTH = 200
initializers = nnx.initializers


class Mixed(nnx.Module):
    """A network with a layer for each initialiser: Flax's default, others, and ``uniform``."""

    def __init__(self, *, rngs):
        linear = functools.partial(nnx.Linear, WIDTH, WIDTH, rngs=rngs)
        self.default = linear()
        self.normal = linear(kernel_init=initializers.normal(0.02))
        self.truncated = linear(kernel_init=initializers.truncated_normal(0.5))
        self.constant = linear(
            kernel_init=initializers.constant(0.25), bias_init=initializers.constant(-2.0)
        )
        self.ones = linear(kernel_init=initializers.ones_init())
        self.fast = linear(kernel_init=uniform(initializers.constant(0.3)))
        self.layers = nnx.List([linear(), linear()])

    def __call__(self, x):
        for layer in (self.default, self.normal, self.truncated, self.fast, *self.layers):
            x = layer(x)
        return self.ones(self.constant(x))


@pytest.fixture(scope="module")
def network():
    return pure(lambda rngs: Mixed(rngs=rngs))


@pytest.fixture(scope="module")
def params(network):
    return network[0](jax.random.key(0))


# For each initialiser: its standard deviation, its largest absolute value, and its kurtosis (fourth
# moment over the squared variance). Flax's truncated_normal is cut at two deviations, which lowers
# its variance; lecun_normal is cut there too, and scaled to the variance 1 / fan_in.
CUT = 2.0
MASS = math.erf(CUT / math.sqrt(2))
DENSITY = math.exp(-(CUT**2) / 2) / math.sqrt(2 * math.pi)
SECOND = 1 - 2 * CUT * DENSITY / MASS
FOURTH = 3 * SECOND - 2 * CUT**3 * DENSITY / MASS
LECUN = math.sqrt(1 / WIDTH)
DRAWN = {
    "default": (LECUN, CUT * LECUN / math.sqrt(SECOND), FOURTH / SECOND**2),
    "normal": (0.02, math.inf, 3.0),
    "truncated": (0.5 * math.sqrt(SECOND), 0.5 * CUT, FOURTH / SECOND**2),
    "fast": (0.3 / math.sqrt(3), 0.3, 9 / 5),
}


@pytest.mark.parametrize("name", DRAWN)
def test_drawn_weights_have_the_moments_of_their_initialiser(params, name):
    deviation, largest, kurtosis = DRAWN[name]
    kernel = np.asarray(params[name]["kernel"], np.float64)
    count = kernel.size
    assert np.abs(kernel).max() <= largest * (1 + 1e-6)
    assert np.abs(kernel).max() > min(largest, 3 * deviation) * 0.99  # large values do occur
    # within 5 standard errors
    assert abs(kernel.mean()) < 5 * deviation / math.sqrt(count)
    error = math.sqrt((kurtosis - 1) / count)
    assert abs(kernel.var() / deviation**2 - 1) < 5 * error
    fourth = np.mean(kernel**4) / deviation**4
    assert abs(fourth / kurtosis - 1) < 0.05
    np.testing.assert_array_equal(params[name]["bias"], 0)


def test_constant_initialisers_give_their_constant(params):
    np.testing.assert_array_equal(params["constant"]["kernel"], 0.25)
    np.testing.assert_array_equal(params["constant"]["bias"], -2.0)
    np.testing.assert_array_equal(params["ones"]["kernel"], 1.0)


def test_no_two_layers_have_the_same_weights(params):
    kernels = [np.asarray(params[name]["kernel"]) for name in DRAWN]
    kernels += [np.asarray(layer["kernel"]) for layer in params["layers"].values()]
    correlation = np.corrcoef([kernel.ravel() for kernel in kernels]) - np.eye(len(kernels))
    assert np.abs(correlation).max() < 5 / WIDTH


def test_other_keys_give_other_weights_and_the_same_key_the_same(network, params):
    init, _ = network
    again, other = init(jax.random.key(0)), init(jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, again, params)
    for name in DRAWN:
        pair = [np.asarray(tree[name]["kernel"]).ravel() for tree in (params, other)]
        assert abs(np.corrcoef(pair)[0, 1]) < 5 / WIDTH
    np.testing.assert_array_equal(other["constant"]["kernel"], params["constant"]["kernel"])


def test_parameters_are_nested_dicts_of_strings_that_apply_takes(network, params):
    _, apply = network
    assert set(params["layers"]) == {"0", "1"}
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    x = jnp.linspace(-1, 1, 3 * WIDTH).reshape(3, WIDTH)
    expected = x
    for layer in (
        *(params[name] for name in ("default", "normal", "truncated", "fast")),
        *(params["layers"][number] for number in "01"),
        *(params[name] for name in ("constant", "ones")),
    ):
        expected = expected @ layer["kernel"] + layer["bias"][None]
    found = apply(params, x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_nothing_is_allocated_before_init():
    class Huge(nnx.Module):
        def __init__(self, *, rngs):
            self.layer = nnx.Linear(2**20, 2**20, rngs=rngs)  # 4 TiB

    init, _ = pure(lambda rngs: Huge(rngs=rngs))
    shapes = jax.eval_shape(init, jax.random.key(0))
    assert shapes["layer"]["kernel"].shape == (2**20, 2**20)


# --- the networks of the package ------------------------------------------------------------

FIELDS = {
    "unet": {
        "width": 8,
        "channel_multipliers": (1, 2),
        "num_blocks": 1,
        "attention_resolutions": (4,),
        "head_channels": 8,
        "dropout": 0.0,
        "class_conditional": True,
        "dtype": "float32",
    },
    "mlp": {"width": 8, "num_layers": 2, "class_conditional": True},
}
SHAPES = {"unet": (8, 8, 1), "mlp": (2,)}

# ``digest`` of the parameters of create_model({"name": name, **FIELDS[name]}, SHAPES[name],
# 3).init(jax.random.key(0)) at commit 0a48fca with jax 0.10.2. XLA's optimisation levels 0 and 3
# give the same digests. So a seed still gives the same network.
DIGESTS = {
    "unet": "cdb39fcc11c9f49095b6cfaf634a0a788a5179cd2b78f1d9ae6f5cba0a0f1c21",
    "mlp": "0579acd79506e1e5985ef96c3b78ee43e078c8e75f2bec39ceb8bf24812b65ed",
}


def digest(params):
    """sha256 of the path and the bytes of each parameter."""
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        total.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
    return total.hexdigest()


@pytest.mark.parametrize("name", MODELS)
def test_initial_parameters_are_those_of_earlier_revisions(name):
    model = create_model({"name": name} | FIELDS[name], SHAPES[name], 3)
    params = model.init(jax.random.key(0))
    assert digest(params) == DIGESTS[name]
    # The digest changes with one bit of one parameter
    leaves, structure = jax.tree.flatten(params)
    leaves[-1] = jnp.nextafter(leaves[-1], jnp.inf)
    assert digest(jax.tree.unflatten(structure, leaves)) != DIGESTS[name]
