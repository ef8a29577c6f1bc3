"""Several processes of one run: what they tell each other, so that none waits for ever."""

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from diffusion_jax.errors import RunError


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A block that every process of a run ends before any goes on; if one fails, all do.

    In the block a process must not wait for another: no loads or saves of orbax, no step on the
    devices of several processes.

    Raises:
        RunError: the block failed in another process.
    """
    try:
        yield
    except Exception:
        with contextlib.suppress(Exception):  # the others may be gone; the first error matters
            any_is(True)
        raise
    if any_is(False):
        raise RunError("another process of this run failed; its own message says why")


def any_is(value: bool) -> bool:
    """Whether the value is true in any process; all processes must ask at the same time."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.process_allgather(np.array(value)).any())


def value_of_first(value: int) -> int:
    """The value that the first process has; all processes must ask at the same time."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.array(value)))
