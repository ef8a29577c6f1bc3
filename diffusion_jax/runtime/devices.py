"""The devices of a run: all accelerators, or without one, CPU cores as one device each.

With one thread per convolution, two cores train faster as two devices than as one. ``start`` must
run before jax starts its backends.
"""

import ctypes
import functools
import logging
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffusion_jax.diffusion.trees import Tree, map_leaves
from diffusion_jax.errors import ConfigError, require
from diffusion_jax.runtime import numerics

LOG = logging.getLogger("diffusion_jax")


# Environment variables of a run of several processes, one per host. On a pod jax needs none.
COORDINATOR, NUM_PROCESSES, PROCESS_ID = (
    "JAX_COORDINATOR_ADDRESS",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
)

# The time that an ending process waits for the others, which may be blocked because it has left.
LEAVING_SECONDS = 30

# One thread per convolution; vectors of up to 512 bits.
XLA_FLAGS = "--xla_cpu_multi_thread_eigen=false", "--xla_cpu_prefer_vector_width=512"

# XLA reads the number of its threads from this variable. The operations of one image are too small
# to share: on two cores a sampling step takes 10 % longer with two threads.
THREADS = "NPROC"

# Options of mallopt(3). M_TRIM_THRESHOLD: return only more than 2 GiB to the system. M_MMAP_MAX: no
# mmap for large arrays, because free returns mapped memory at once. M_ARENA_MAX: one arena, because
# the heaps of other arenas are too small for large arrays, which would then be mapped.
MALLOC_OPTIONS = {-1: 2**31 - 1, -4: 0, -8: 1}
HOLES = 2**11, 2**28  # smallest and largest size, in bytes, of the blocks that _fill_holes takes
COMPILED = "/jax/core/compile/backend_compile_duration"  # jax's event after a compilation
LONG_COMPILATION = 1.0  # seconds
MIN_EXAMPLES_PER_CORE = 8  # with fewer, cores mostly wait for each other


def start(
    num_devices: int | None,
    batch_size: int,
    distributed: bool,
    divide: bool,
    num_jobs: int | None = None,
) -> None:
    """Start jax: fix its options, join the other processes, and make CPU cores devices.

    The number of CPU devices, if ``num_devices`` does not set it, depends on the mode. In training
    (``divide``) it is the largest number that divides a process's share of the batch evenly with at
    least MIN_EXAMPLES_PER_CORE examples each. In an ablation whose devices have jobs of their own
    it is at most the number of these, ``num_jobs``. In other modes it is at most the batch size,
    and a batch of one image is computed by one thread.

    Raises:
        ConfigError: num_devices is below 1 or more than there are, or the settings of the processes
            or of JAX_PLATFORMS are wrong.
    """
    numerics.fix()
    at_least_1 = num_devices is None or num_devices >= 1
    require(at_least_1, "config.num_devices", num_devices, "at least 1")
    processes = _number_of(NUM_PROCESSES) if distributed and NUM_PROCESSES in os.environ else 1
    require(processes >= 1, NUM_PROCESSES, processes, "at least 1")
    cores = count_cores()
    if num_devices:
        on_cpu = num_devices
    elif num_jobs:
        on_cpu = min(num_jobs, cores)
    elif divide:
        on_cpu = _devices_for(batch_size // processes, cores)
    else:
        on_cpu = min(batch_size, cores)  # uneven batches are padded
    present = os.environ.get("XLA_FLAGS", "")
    flags = [flag for flag in XLA_FLAGS if flag.split("=")[0] not in present]
    os.environ["XLA_FLAGS"] = " ".join([present, *flags]).strip()
    if batch_size == 1 and not (divide or num_jobs):
        os.environ.setdefault(THREADS, "1")
    jax.config.update("jax_num_cpu_devices", on_cpu)
    _manage_memory(is_training=divide or num_jobs is not None)
    if distributed:
        _join()
    try:
        local = jax.local_device_count()
    except (AssertionError, RuntimeError) as error:  # AssertionError: JAX_PLATFORMS has no device
        reason = str(error) or "there is no such device, or jax is not installed for it"
        names = jax.config.jax_platforms  # type: ignore[attr-defined]  # jax adds it at run time
        raise ConfigError(f"JAX_PLATFORMS = {names!r}: {reason}") from error
    if num_devices is not None and num_devices > local:
        raise ConfigError(f"config.num_devices = {num_devices}: there are {local}")


def require_shared_batches(batch_size: int, devices: list[jax.Device]) -> None:
    """Refuse a training batch that the devices cannot share evenly.

    Raises:
        ConfigError: batch_size is not a multiple of the number of devices.
    """
    allowed = f"a multiple of the {len(devices)} devices"
    require(batch_size % len(devices) == 0, "config.train.batch_size", batch_size, allowed)


def start_compilation_cache(folder: str | None) -> None:
    """Save compiled programs in a folder, so that later starts are fast; "off" saves none."""
    if folder == "off":
        return
    try:
        folder = folder or str(pathlib.Path("~/.cache/diffusion_jax").expanduser())
    except RuntimeError as error:
        LOG.warning("config.compilation_cache = None: no compiled program is kept: %s", error)
        return
    jax.config.update("jax_compilation_cache_dir", folder)
    # Save small programs too: a start compiles dozens of them, which takes two seconds.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()  # jax reads the folder only at its first compilation


def log(devices: list[jax.Device]) -> None:
    """Log the devices and the number of processes."""
    platform = jax.default_backend()
    note = f" of {count_cores()} cores" if platform == "cpu" else ""
    LOG.info("%d %s devices%s, %d process(es)", len(devices), platform, note, jax.process_count())


def count_cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _devices_for(batch_size: int, cores: int) -> int:
    """The largest number of cores that divides a batch evenly with enough examples each."""
    fitting = [
        n
        for n in range(1, cores + 1)
        if batch_size % n == 0 and batch_size // n >= MIN_EXAMPLES_PER_CORE
    ]
    return max(fitting, default=1)


@functools.cache  # so that the listener is registered only once
def _manage_memory(is_training: bool) -> None:
    """Make glibc return the compiler's memory to the system, and in training keep that of a step.

    XLA:CPU allocates the temporary arrays of every training step again, and the page faults of new
    memory take a seventh of the step's time. With MALLOC_OPTIONS glibc keeps the memory in a single
    arena. A compilation leaves many free holes in that arena, and glibc searches them one by one,
    so an allocation of 10 KB can take 50 microseconds; therefore the holes are filled. This must
    run before jax starts its threads, so on all platforms. Other C libraries have no mallopt.
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


def _join() -> None:
    if COORDINATOR not in os.environ:
        jax.distributed.initialize(shutdown_timeout_seconds=LEAVING_SECONDS)
        return
    missing = [name for name in (NUM_PROCESSES, PROCESS_ID) if name not in os.environ]
    if missing:
        raise ConfigError(f"{COORDINATOR} is set, {' and '.join(missing)} must be set too")
    processes, process = _number_of(NUM_PROCESSES), _number_of(PROCESS_ID)
    require(0 <= process < processes, PROCESS_ID, process, f"in 0..{processes - 1}")
    jax.distributed.initialize(
        os.environ[COORDINATOR], processes, process, shutdown_timeout_seconds=LEAVING_SECONDS
    )


def _number_of(variable: str) -> int:
    value = os.environ[variable]
    require(value.isdecimal(), variable, value, "a whole number")
    return int(value)


def select_devices(num_devices: int | None) -> list[jax.Device]:
    """The devices of the run, ``num_devices`` of each process (None: all)."""
    if num_devices is None:
        return jax.devices()
    by_process: dict[int, list[jax.Device]] = {}
    for device in jax.devices():
        by_process.setdefault(device.process_index, []).append(device)
    return [device for local in by_process.values() for device in local[:num_devices]]


def replicate(tree: Tree, devices: list[jax.Device]) -> Tree:
    """Copy every array of a pytree to every device, with the sharding of ``pmap(in_axes=None)``.

    Without it, the first and the second call of a pmapped function each compile.
    """
    return _place(tree, devices, PartitionSpec())


def divide(tree: Tree, devices: list[jax.Device]) -> Tree:
    """Put row i of every array on device i, with the sharding of ``pmap(in_axes=0)``."""
    return _place(tree, devices, PartitionSpec("device"))


def _place(tree: Tree, devices: list[jax.Device], spec: PartitionSpec) -> Tree:
    placed: Tree = _compile_place(tuple(devices), spec)(tree)
    return placed


@functools.cache  # because jit compiles again for every new function
def _compile_place(devices: tuple[jax.Device, ...], spec: PartitionSpec) -> Callable[..., Any]:
    sharding = NamedSharding(Mesh(np.array(devices), ("device",)), spec)
    return jax.jit(lambda tree: tree, out_shardings=sharding)


def local_copy(tree: Tree) -> Tree:
    """Copy one replica of a replicated pytree to the host, safe from buffer donation."""
    return map_leaves(lambda leaf: np.array(leaf.addressable_data(0)), tree)
