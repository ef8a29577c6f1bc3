"""The devices of a run: all accelerators, or without one, CPU cores as one device each.

With one thread per convolution, two cores train faster as two devices than as one. ``start`` must
run before jax starts its backends.
"""

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffusion_jax.diffusion.trees import Tree, map_leaves
from diffusion_jax.errors import ConfigError, require
from diffusion_jax.runtime import memory, numerics, platforms

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

MIN_EXAMPLES_PER_CORE = 8  # with fewer, cores mostly wait for each other


def start(
    num_devices: int | None,
    batch_size: int,
    distributed: bool,
    divide: bool,
    num_jobs: int | None = None,
    *,
    deterministic: bool = False,
) -> None:
    """Start jax: fix its options, join the other processes, and make CPU cores devices.

    The number of CPU devices, if ``num_devices`` does not set it, depends on the mode. In training
    (``divide``) it is the largest number that divides a process's share of the batch evenly with at
    least MIN_EXAMPLES_PER_CORE examples each. In an ablation whose devices have jobs of their own
    it is at most the number of these, ``num_jobs``. In other modes it is at most the batch size,
    and a batch of one image is computed by one thread.

    ``deterministic`` makes XLA:GPU compute equal bits in every run, as CPUs always do.

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
    platform = platforms.find()
    jax.config.update("jax_num_cpu_devices", on_cpu)
    platforms.add_xla_flags(XLA_FLAGS if platform == "cpu" else ())
    if platform == "cpu":
        platforms.choose_cpu_over_libtpu()
        if batch_size == 1 and not (divide or num_jobs):
            os.environ.setdefault(THREADS, "1")
        memory.manage(is_training=divide or num_jobs is not None)
    elif platform == "gpu" and deterministic:
        platforms.add_deterministic_flags()
    if distributed:
        _join()
    try:
        local = jax.local_device_count()
    except (AssertionError, RuntimeError) as error:  # AssertionError: JAX_PLATFORMS has no device
        reason = str(error) or "there is no such device, or jax is not installed for it"
        raise ConfigError(f"JAX_PLATFORMS = {platforms.requested()!r}: {reason}") from error
    platforms.warn_unless(platform)
    if num_devices is not None and num_devices > local:
        raise ConfigError(f"config.num_devices = {num_devices}: there are {local}")


def require_shared_batches(batch_size: int, devices: list[jax.Device]) -> None:
    """Refuse a training batch that the devices cannot share evenly.

    Raises:
        ConfigError: batch_size is not a multiple of the number of devices.
    """
    allowed = f"a multiple of the {len(devices)} devices"
    require(batch_size % len(devices) == 0, "config.train.batch_size", batch_size, allowed)


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
