"""Agreement between the processes of a run, so that none waits for ever for a failed one."""

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from diffusion_jax.errors import RunError


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A block with a barrier at its end: if it fails in one process, all processes fail.

    Inside the block a process must not wait for another one: it must not save or load with orbax,
    nor run a step on the devices of several processes.

    Raises:
        RunError: the block failed in another process.
    """
    try:
        yield
    except Exception:
        with contextlib.suppress(Exception):  # the others may have ended; raise the first error
            any_is(True)
        raise
    if any_is(False):
        raise RunError("another process of this run failed; its own message says why")


def any_is(value: bool) -> bool:
    """Whether the value is true in any process; all processes must call this together."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.process_allgather(np.array(value)).any())


def value_of_first(value: int) -> int:
    """The value of the first process; all processes must call this together."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.array(value)))
