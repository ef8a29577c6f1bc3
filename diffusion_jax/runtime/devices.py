"""The devices of a run: every accelerator or, without one, every CPU core as a device of its own.

XLA:CPU runs a convolution on one core, so two cores train faster as two devices. What is set
here must be set before jax starts its backends.
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


# The environment of a run of several processes, one per host; on a pod jax finds it by itself.
COORDINATOR, NUM_PROCESSES, PROCESS_ID = (
    "JAX_COORDINATOR_ADDRESS",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
)

# How long a process that ends waits for the others to end: they may be blocked because it is gone.
LEAVING_SECONDS = 30

# a core's convolutions on that core; the widest vectors that it has
XLA_FLAGS = "--xla_cpu_multi_thread_eigen=false", "--xla_cpu_prefer_vector_width=512"

# Read by XLA, the threads of its pool. One image's operations are too small for several: on two
# cores a chain's step takes a tenth longer where two threads hand them to each other.
THREADS = "NPROC"

# mallopt(3): trim nothing below 2 GiB; no mapping, which is unmapped when freed; one arena, for
# the others' heaps are too small for large arrays, which would be mapped
MALLOC_OPTIONS = {-1: 2**31 - 1, -4: 0, -8: 1}
HOLES = 2**11, 2**28  # the free chunks, in bytes, that are kept from glibc's later searches
COMPILED = "/jax/core/compile/backend_compile_duration"  # jax's event, before the first run
LONG_COMPILATION = 1.0  # seconds
MIN_EXAMPLES_PER_CORE = 8  # fewer leave a core waiting for the others


def start(
    num_devices: int | None,
    batch_size: int,
    distributed: bool,
    divide: bool,
    num_jobs: int | None = None,
) -> None:
    """Start jax: fix its options, join the other processes, and make cores devices.

    As many cores as can share a batch evenly where ``divide``, in training; elsewhere what is
    uneven is filled up, and one image is the work of one thread. Devices that have jobs of their
    own, ``num_jobs`` in all, share no batches.

    Raises:
        ConfigError: more devices than there are.
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
        on_cpu = min(batch_size, cores)  # they wait for nobody
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
    except (AssertionError, RuntimeError) as error:  # jax asserts that JAX_PLATFORMS has a device
        reason = str(error) or "there is no such device, or jax is not installed for it"
        asked = jax.config.jax_platforms  # type: ignore[attr-defined]  # jax adds it at run time
        raise ConfigError(f"JAX_PLATFORMS = {asked!r}: {reason}") from error
    if num_devices is not None and num_devices > local:
        raise ConfigError(f"config.num_devices = {num_devices}: there are {local}")


def require_shared_batches(batch_size: int, devices: list[jax.Device]) -> None:
    """Refuse batches that the devices cannot share evenly, as they must in training.

    Raises:
        ConfigError: naming the number of devices.
    """
    allowed = f"a multiple of the {len(devices)} devices"
    require(batch_size % len(devices) == 0, "config.train.batch_size", batch_size, allowed)


def start_compilation_cache(folder: str | None) -> None:
    """Keep compiled programs on disk, so that a second start takes seconds; "off" does not."""
    if folder == "off":
        return
    try:
        folder = folder or str(pathlib.Path("~/.cache/diffusion_jax").expanduser())
    except RuntimeError as error:
        LOG.warning("config.compilation_cache = None: no compiled program is kept: %s", error)
        return
    jax.config.update("jax_compilation_cache_dir", folder)
    # the small programs too: a start compiles dozens of them, which takes two seconds
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()  # the checks may have compiled a trifle: jax looked only then


def log(devices: list[jax.Device]) -> None:
    """Say what the run uses."""
    platform = jax.default_backend()
    note = f" of {count_cores()} cores" if platform == "cpu" else ""
    LOG.info("%d %s devices%s, %d process(es)", len(devices), platform, note, jax.process_count())


def count_cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _devices_for(batch_size: int, cores: int) -> int:
    """The most cores that share a batch evenly and get enough examples each."""
    fitting = [
        n
        for n in range(1, cores + 1)
        if batch_size % n == 0 and batch_size // n >= MIN_EXAMPLES_PER_CORE
    ]
    return max(fitting, default=1)


@functools.cache  # once is enough
def _manage_memory(is_training: bool) -> None:
    """Have glibc give back what the compiler frees, and in training keep what a step frees.

    XLA:CPU allocates the temporaries of a training step anew each time, and the faults of their
    fresh pages take a seventh of the step's time. One arena keeps them; but in one that a
    compilation has left full of holes each allocation of some 10 KB takes 50 microseconds, for
    glibc looks through the holes one by one: so they are filled. It must run before jax
    starts its threads, when the platform is not known yet. Other C libraries stay as they are.
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
    """Take the free memory below the top of the heap and keep it: addresses, but no pages."""
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_size_t, (ctypes.c_size_t,)
    libc.free.restype, libc.free.argtypes = None, (ctypes.c_size_t,)
    smallest, size = HOLES
    top = libc.malloc(size)
    libc.free(top)
    while size >= smallest:
        if not 0 < (hole := libc.malloc(size)) < top:  # none of this size is left below
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
    """The devices of all processes that the run uses, ``num_devices`` of each process."""
    if num_devices is None:
        return jax.devices()
    by_process: dict[int, list[jax.Device]] = {}
    for device in jax.devices():
        by_process.setdefault(device.process_index, []).append(device)
    return [device for local in by_process.values() for device in local[:num_devices]]


def replicate(tree: Tree, devices: list[jax.Device]) -> Tree:
    """Put every array of a pytree on every device, as ``pmap(in_axes=None)`` wants to find it.

    Done before the first call, for otherwise that call and the second one compile each.
    """
    return _place(tree, devices, PartitionSpec())


def divide(tree: Tree, devices: list[jax.Device]) -> Tree:
    """Put row i of every array on device i, as ``pmap(in_axes=0)`` wants to find it."""
    return _place(tree, devices, PartitionSpec("device"))


def _place(tree: Tree, devices: list[jax.Device], spec: PartitionSpec) -> Tree:
    placed: Tree = _compile_place(tuple(devices), spec)(tree)
    return placed


@functools.cache  # for another function compiles anew
def _compile_place(devices: tuple[jax.Device, ...], spec: PartitionSpec) -> Callable[..., Any]:
    sharding = NamedSharding(Mesh(np.array(devices), ("device",)), spec)
    return jax.jit(lambda tree: tree, out_shardings=sharding)


def local_copy(tree: Tree) -> Tree:
    """A host copy of a replicated pytree (one replica of it), safe from buffer donation."""
    return map_leaves(lambda leaf: np.array(leaf.addressable_data(0)), tree)
