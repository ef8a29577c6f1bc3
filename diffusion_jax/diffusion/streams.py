"""The PRNG streams of a run: one per purpose, so that no two purposes draw the same numbers.

All keys of the project come from ``seed_key``, which sets the generator threefry. With threefry an
image depends on its key alone. With jax's faster generators it would depend on the batch too.
"""

import enum

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from diffusion_jax.errors import require

GENERATOR = "threefry2x32"


class Stream(enum.IntEnum):
    """The purpose of a PRNG stream."""

    WEIGHTS = 0
    TRAINING = 1  # noise, timesteps and dropout
    SAMPLING = 2
    EVALUATION = 3


def seed_key(seed: int) -> Key[Array, ""]:
    """The PRNG key of a seed in [0, 2^64); different seeds have different keys.

    Below 2^32 it equals ``jax.random.key(seed)``, which takes larger seeds modulo 2^32.

    Raises:
        ConfigError: the seed is out of this range.
    """
    require(0 <= seed < 2**64, "seed", seed, "in [0, 2^64)")
    words = np.array([seed >> 32, seed % 2**32], np.uint32)
    key: Key[Array, ""] = jax.random.wrap_key_data(jnp.asarray(words), impl=GENERATOR)
    return key


def stream_key(seed: int, stream: Stream) -> Key[Array, ""]:
    """The PRNG key of one stream of a run with this seed."""
    return jax.random.fold_in(seed_key(seed), int(stream))
