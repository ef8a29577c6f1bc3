"""Slots for the runs of an ablation: how several runs train at once on the devices."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, PyTree

from diffusion_jax.ablation.jobs import Ablation, Job, Parallel
from diffusion_jax.runtime.devices import divide, local_copy, replicate
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

SIDE_BY_SIDE = ("device", "vmap")  # ways in which every device has whole batches
MAX_ARMS_PER_DEVICE = 8  # of vmap, if the config does not say how many


class Slots(NamedTuple):
    """Slots for runs that train at once, and the ways of their arrays to the devices and back."""

    num: int
    steps: Steps
    indices: Int[np.ndarray, "devices ..."]
    put: Callable[[Sequence[PyTree]], PyTree]  # a tree for each slot -> an argument of ``steps``
    put_batches: Callable[[Sequence[Batch]], Batch]
    get: Callable[[int, PyTree], PyTree]  # (slot, a tree on the devices) -> its part on the host


def one_by_one(step: Steps, batch_size: int, devices: list[jax.Device]) -> Slots:
    """One slot, whose batch is divided among all devices, as in training."""
    return Slots(
        num=1,
        steps=compile_steps(step, devices),
        indices=np.arange(batch_size).reshape(len(devices), -1),
        put=lambda trees: replicate(trees[0], devices),
        put_batches=lambda batches: divide_batches(batches[0], len(devices)),
        get=lambda slot, tree: local_copy(tree),
    )


def side_by_side(step: Steps, batch_size: int, devices: list[jax.Device], per_device: int) -> Slots:
    """Slots on every device, each with a whole batch: leaves are [device, slot there, ...]."""
    steps = several_steps(step)
    if per_device > 1:
        of_device = jax.vmap(steps, in_axes=(0, 0, None, 0))
    else:
        of_device = _of_single_slot(steps)
    shape = len(devices), per_device

    def put(trees: Sequence[PyTree]) -> PyTree:
        def stack(*leaves: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
            # On the host, because all slots may be more than one device holds; keys are small.
            module = jnp if jnp.issubdtype(leaves[0].dtype, jax.dtypes.prng_key) else np
            return module.stack(leaves).reshape(*shape, *leaves[0].shape)

        return divide(jax.tree.map(stack, *trees), devices)

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
        axis_name="device",  # as in what ``put`` returns; otherwise the second call would compile
        in_axes=(0, 0, None, 0),
        out_axes=0,
        devices=devices,
        donate_argnums=0,
    )
    return Slots(
        num=len(devices) * per_device,
        steps=compiled,
        indices=np.arange(batch_size),
        put=put,
        put_batches=put_batches,
        get=get,
    )


def _of_single_slot(steps: Steps) -> Steps:
    """The steps of a device with one slot; vmap would make slow convolutions of them."""

    def of_device(state: PyTree, constants: PyTree, indices: PyTree, batches: Batch) -> PyTree:
        state, constants, batches = jax.tree.map(lambda leaf: leaf[0], (state, constants, batches))
        output = steps(state, constants, indices, batches)
        return jax.tree.map(lambda leaf: leaf[None], output)

    return of_device


def choose_way_on_cpu(parallel: str, num_jobs: int, num_devices: int) -> str:
    """The way of ``num_jobs`` jobs on a CPU; it is decided before its cores become devices.

    "auto" is one arm per device, unless there are fewer arms than devices: no device waits for
    another, which is fastest (docs/RESULTS.md).
    """
    if parallel != "auto":
        return parallel
    return "device" if num_jobs >= num_devices else "sequence"


def choose_parallel(ablation: Ablation, way_on_cpu: str, num_devices: int) -> Parallel:
    """How the jobs of an ablation run, once it is known whether there is an accelerator.

    A small model does not fill an accelerator, so there "auto" is vmap; that is not measured yet.
    """
    is_auto, is_cpu = ablation.parallel == "auto", jax.default_backend() == "cpu"
    way = "vmap" if is_auto and not is_cpu else way_on_cpu
    if way != "vmap":
        return Parallel(way=way, per_device=1)
    most = -(-len(ablation.mine) // num_devices)
    per_device = min(most, ablation.arms_per_device or MAX_ARMS_PER_DEVICE)
    return Parallel(way=way, per_device=per_device)


def create_slots(parallel: Parallel, jobs: Sequence[Job], devices: list[jax.Device]) -> Slots:
    """The slots of jobs that have equal static choices."""
    experiment = jobs[0].experiment
    batch_size = experiment.training.batch_size
    exchange = BETWEEN_DEVICES if parallel.way == "sequence" else ALONE
    step = functools.partial(train_step, step_choices(experiment, exchange))
    if parallel.way == "sequence":
        return one_by_one(step, batch_size, devices)
    per_device = min(parallel.per_device, -(-len(jobs) // len(devices)))
    return side_by_side(step, batch_size, devices, per_device)
