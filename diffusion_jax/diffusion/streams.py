"""The streams of random numbers of a run: each purpose has its own, so that none repeats."""

import enum

import jax
from jaxtyping import Array, Key


class Stream(enum.IntEnum):
    """The purpose of a stream of random numbers."""

    WEIGHTS = 0
    TRAINING = 1  # noise, timesteps and dropout
    SAMPLING = 2
    EVALUATION = 3


def stream_key(seed: int, stream: Stream) -> Key[Array, ""]:
    """The key of one stream of a run with this seed."""
    return jax.random.fold_in(jax.random.key(seed), int(stream))
