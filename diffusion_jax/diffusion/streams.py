"""The streams of random numbers of a run: each purpose has its own, so that none repeats.

All keys of the project come from ``seed_key``. Results depend on the generator: an image depends on
its key alone, whatever the batch, with threefry and not with jax's faster generators.
"""

import enum

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from diffusion_jax.errors import require

GENERATOR = "threefry2x32"


class Stream(enum.IntEnum):
    """The purpose of a stream of random numbers."""

    WEIGHTS = 0
    TRAINING = 1  # noise, timesteps and dropout
    SAMPLING = 2
    EVALUATION = 3


def seed_key(seed: int) -> Key[Array, ""]:
    """The key of a seed in [0, 2^64): another one for each seed.

    Below 2^32 it is ``jax.random.key(seed)``, which takes larger seeds modulo 2^32.

    Raises:
        ConfigError: a seed out of this range.
    """
    require(0 <= seed < 2**64, "seed", seed, "in [0, 2^64)")
    words = np.array([seed >> 32, seed % 2**32], np.uint32)
    key: Key[Array, ""] = jax.random.wrap_key_data(jnp.asarray(words), impl=GENERATOR)
    return key


def stream_key(seed: int, stream: Stream) -> Key[Array, ""]:
    """The key of one stream of a run with this seed."""
    return jax.random.fold_in(seed_key(seed), int(stream))
