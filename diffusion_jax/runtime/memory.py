"""How glibc manages the memory of a process whose devices are CPU cores."""

import ctypes
import functools
import logging

import jax

from diffusion_jax.runtime.compilation import COMPILED

LOG = logging.getLogger("diffusion_jax")

# Options of mallopt(3). M_TRIM_THRESHOLD: return only more than 2 GiB to the system. M_MMAP_MAX: no
# mmap for large arrays, because free returns mapped memory at once. M_ARENA_MAX: one arena, because
# the heaps of other arenas are too small for large arrays, which would then be mapped.
MALLOC_OPTIONS = {-1: 2**31 - 1, -4: 0, -8: 1}
HOLES = 2**11, 2**28  # smallest and largest size, in bytes, of the blocks that _fill_holes takes
LONG_COMPILATION = 1.0  # seconds


@functools.cache  # jax keeps a listener for ever, so it is registered once
def manage(is_training: bool) -> None:
    """Make glibc return the compiler's memory to the system, and in training keep that of a step.

    XLA:CPU allocates the temporary arrays of every training step again, and the page faults of new
    memory take a seventh of the step's time. With MALLOC_OPTIONS glibc keeps the memory in a single
    arena. A compilation leaves many free holes in that arena, and glibc searches them one by one,
    so an allocation of 10 KB can take 50 microseconds; therefore the holes are filled. This must
    run before jax starts its threads. Other C libraries have no mallopt.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return
    for option, value in MALLOC_OPTIONS.items() if is_training else ():
        if not libc.mallopt(option, value):
            LOG.warning("mallopt(%d, %d) was refused: steps may be slower", option, value)

    def after(event: str, duration_secs: float, **_: object) -> None:
        if event == COMPILED and duration_secs > LONG_COMPILATION:
            libc.malloc_trim(0)
            if is_training:
                _fill_holes(libc)

    jax.monitoring.register_event_duration_secs_listener(after)


def _fill_holes(libc: ctypes.CDLL) -> None:
    """Allocate the free blocks below the top of the heap for ever; this uses nearly no memory."""
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_size_t, (ctypes.c_size_t,)
    libc.free.restype, libc.free.argtypes = None, (ctypes.c_size_t,)
    smallest, size = HOLES
    top = libc.malloc(size)
    libc.free(top)
    while size >= smallest:
        if not 0 < (hole := libc.malloc(size)) < top:  # no hole of this size is left
            libc.free(hole)
            size -= size // 8
