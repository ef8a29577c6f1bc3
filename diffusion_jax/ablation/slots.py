"""Places for the runs of an ablation: how several train at once on the devices."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, PyTree

from diffusion_jax.ablation.jobs import Ablation, Job
from diffusion_jax.runtime import devices
from diffusion_jax.training.step import (
    ALONE,
    BETWEEN_DEVICES,
    Batch,
    Steps,
    compile_steps,
    divide_batches,
    several_steps,
    step_choices,
    train_step,
)

SIDE_BY_SIDE = ("device", "vmap")  # every device has whole batches
MAX_ARMS_PER_DEVICE = 8  # of vmap, where the config leaves it open


class Slots(NamedTuple):
    """Places for runs that train at once, and how their arrays get to the devices and back."""

    num: int
    steps: Steps
    indices: Int[np.ndarray, "devices ..."]
    put: Callable[[Sequence[PyTree]], PyTree]  # a tree for each slot to what ``steps`` takes
    put_batches: Callable[[Sequence[Batch]], Batch]
    get: Callable[[int, PyTree], PyTree]  # the part of one slot, copied to the host


def one_by_one(step: Steps, batch_size: int, used_devices: list[jax.Device]) -> Slots:
    """One slot: the batch is divided among all devices, as in training."""
    return Slots(
        num=1,
        steps=compile_steps(step, used_devices),
        indices=np.arange(batch_size).reshape(len(used_devices), -1),
        put=lambda trees: devices.replicate(trees[0], used_devices),
        put_batches=lambda batches: divide_batches(batches[0], len(used_devices)),
        get=lambda slot, tree: devices.local_copy(tree),
    )


def side_by_side(
    step: Steps, batch_size: int, used_devices: list[jax.Device], per_device: int
) -> Slots:
    """Slots on every device, each with a whole batch: leaves are [device, slot there, ...]."""
    steps = several_steps(step)
    if per_device > 1:
        of_device = jax.vmap(steps, in_axes=(0, 0, None, 0))
    else:

        def of_device(state: PyTree, constants: PyTree, indices: PyTree, batches: Batch) -> PyTree:
            # not vmapped: over weights that makes grouped convolutions, which are slow
            state, constants, batches = jax.tree.map(
                lambda leaf: leaf[0], (state, constants, batches)
            )
            output = steps(state, constants, indices, batches)
            return jax.tree.map(lambda leaf: leaf[None], output)

    shape = len(used_devices), per_device

    def put(trees: Sequence[PyTree]) -> PyTree:
        def stack(*leaves: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
            # on the host, but for keys: there may be more than one device holds
            module = jnp if jnp.issubdtype(leaves[0].dtype, jax.dtypes.prng_key) else np
            return module.stack(leaves).reshape(*shape, *leaves[0].shape)

        return devices.divide(jax.tree.map(stack, *trees), used_devices)

    def put_batches(batches: Sequence[Batch]) -> Batch:
        return jax.tree.map(
            lambda *leaves: np.stack(leaves).reshape(*shape, *leaves[0].shape), *batches
        )

    def get(slot: int, tree: PyTree) -> PyTree:
        device, place = divmod(slot, per_device)

        def of_leaf(leaf: jax.Array) -> np.ndarray:
            return np.array(np.asarray(leaf.addressable_data(device))[0, place])

        return jax.tree.map(of_leaf, tree)

    compiled = jax.pmap(
        of_device,
        axis_name="device",  # that of what ``put`` makes: by another, the second call would compile
        in_axes=(0, 0, None, 0),
        out_axes=0,
        devices=used_devices,
        donate_argnums=0,
    )
    return Slots(
        num=len(used_devices) * per_device,
        steps=compiled,
        indices=np.arange(batch_size),
        put=put,
        put_batches=put_batches,
        get=get,
    )


class Parallel(NamedTuple):
    """How jobs run: the way (device, sequence, vmap) and how many at once on a device."""

    way: str
    per_device: int


def choose_parallel(ablation: Ablation, num_devices: int) -> Parallel:
    """How the jobs of an ablation run; "auto" is what is fastest.

    On a CPU one arm per device is fastest, unless there are fewer arms than devices: no device
    waits for another (docs/RESULTS.md). On an accelerator, which a small model does not fill, vmap
    should be; that is not measured yet.
    """
    chosen, num_jobs = ablation.parallel, len(ablation.mine)
    if chosen == "auto":
        on_cpu = "device" if num_jobs >= num_devices else "sequence"
        chosen = on_cpu if jax.default_backend() == "cpu" else "vmap"
    if chosen != "vmap":
        return Parallel(way=chosen, per_device=1)
    most = -(-num_jobs // num_devices)
    per_device = min(most, ablation.arms_per_device or MAX_ARMS_PER_DEVICE)
    return Parallel(way=chosen, per_device=per_device)


def create_slots(parallel: Parallel, jobs: Sequence[Job], used_devices: list[jax.Device]) -> Slots:
    """The slots of jobs that have their static choices in common."""
    experiment = jobs[0].experiment
    batch_size = experiment.training.batch_size
    exchange = BETWEEN_DEVICES if parallel.way == "sequence" else ALONE
    step = functools.partial(train_step, step_choices(experiment, exchange))
    if parallel.way == "sequence":
        return one_by_one(step, batch_size, used_devices)
    per_device = min(parallel.per_device, -(-len(jobs) // len(used_devices)))
    return side_by_side(step, batch_size, used_devices, per_device)
