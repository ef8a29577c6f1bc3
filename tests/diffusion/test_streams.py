"""Seeds, keys and streams: no two seeds or streams share random numbers."""

import itertools

import jax
import numpy as np
import pytest

from diffusion_jax.diffusion.streams import Stream, seed_key, stream_key
from diffusion_jax.errors import ConfigError


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**31, 2**32 - 1])
def test_the_keys_of_small_seeds_are_those_of_jax(seed):
    key = jax.random.key(seed, impl="threefry2x32")
    np.testing.assert_array_equal(jax.random.key_data(seed_key(seed)), jax.random.key_data(key))


def test_no_two_seeds_have_the_same_key():
    """jax.random.key would give one key to seeds that are equal modulo 2^32."""
    seeds = [low + high * 2**32 for low in (0, 7) for high in (0, 1, 2, 2**30)]
    keys = {tuple(jax.random.key_data(seed_key(seed)).tolist()) for seed in seeds}
    assert len(keys) == len(seeds)
    streams = [stream_key(*pair) for pair in itertools.product(seeds, Stream)]
    draws = {float(jax.random.normal(key)) for key in streams}
    assert len(draws) == len(streams)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_out_of_range_are_named(seed):
    with pytest.raises(ConfigError, match=rf"^seed = {seed}: must be in \[0, 2\^64\)$"):
        seed_key(seed)


@pytest.mark.parametrize("generator", ["rbg", "unsafe_rbg"])
def test_keys_do_not_depend_on_jaxs_default_generator(generator):
    before = jax.random.key_data(stream_key(3, Stream.TRAINING))
    with jax.default_prng_impl(generator):
        after = jax.random.key_data(stream_key(3, Stream.TRAINING))
    np.testing.assert_array_equal(before, after)
