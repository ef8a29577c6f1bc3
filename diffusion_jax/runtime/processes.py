"""Several processes of one run: they fail together, so that none waits for one that is gone."""

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from diffusion_jax.errors import RunError


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A block that every process of a run ends before any goes on; if one fails, all do.

    The block must not exchange anything between the devices of several processes.

    Raises:
        RunError: the block failed in another process.
    """
    try:
        yield
    except BaseException:
        _any_failed(True)
        raise
    if _any_failed(False):
        raise RunError("another process of this run failed; its own message says why")


def _any_failed(is_failed: bool) -> bool:
    """Tell the other processes, and hear from them."""
    if jax.process_count() == 1:
        return is_failed
    return bool(multihost_utils.process_allgather(np.array(is_failed)).any())
