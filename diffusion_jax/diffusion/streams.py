"""The streams of random numbers of a run: one for each purpose, so that none repeats another."""

import enum

import jax
from jaxtyping import Array, Key


class Stream(enum.IntEnum):
    """What random numbers are for."""

    WEIGHTS = 0
    TRAINING = 1  # noise, timesteps and dropout
    SAMPLING = 2
    EVALUATION = 3


def stream_key(seed: int, stream: Stream) -> Key[Array, ""]:
    """The key of one stream of a run with a seed."""
    return jax.random.fold_in(jax.random.key(seed), int(stream))
