"""Slots for the runs of an ablation: how the devices train several runs at once."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, PyTree

from diffusion_jax.ablation.jobs import Ablation, Job, Parallel
from diffusion_jax.runtime.compilation import named
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

SIDE_BY_SIDE = ("device", "vmap")  # ways to run jobs in which a device gets whole batches
MAX_ARMS_PER_DEVICE = 8  # for vmap, if config.ablate.arms_per_device is unset


class Slots(NamedTuple):
    """Slots, each of which trains one run, and functions that move arrays to the devices and back.

    ``steps`` trains the runs of all slots in one call.
    """

    num: int
    steps: Steps
    indices: Int[np.ndarray, "*devices batch"]  # the examples of a batch that a device has
    put: Callable[[Sequence[PyTree]], PyTree]  # one tree per slot -> an argument of ``steps``
    put_batches: Callable[[Sequence[Batch]], Batch]
    get: Callable[[int, PyTree], PyTree]  # (slot, a tree on the devices) -> its part on the host


def one_by_one(step: Steps, batch_size: int, devices: list[jax.Device]) -> Slots:
    """One slot; the devices share its batch, as in ``--mode=train``."""
    return Slots(
        num=1,
        steps=named("the training step", compile_steps(step, devices)),
        indices=np.arange(batch_size).reshape(len(devices), -1),
        put=lambda trees: replicate(trees[0], devices),
        put_batches=lambda batches: divide_batches(batches[0], len(devices)),
        get=lambda slot, tree: local_copy(tree),
    )


def side_by_side(step: Steps, batch_size: int, devices: list[jax.Device], per_device: int) -> Slots:
    """``per_device`` slots on every device, each with a whole batch of its own.

    The arrays of ``steps`` have the shape [device, slot of the device, ...].
    """
    steps = several_steps(step)
    if per_device > 1:
        of_device = jax.vmap(steps, in_axes=(0, 0, None, 0))
    else:
        of_device = _of_single_slot(steps)
    shape = len(devices), per_device

    def put(trees: Sequence[PyTree]) -> PyTree:
        def stack(*leaves: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
            # Stack on the host: one device may not have the memory for the states of all slots.
            # PRNG keys, which numpy cannot stack, are small.
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
        axis_name="device",  # as in ``divide``; with another name the second call compiles again
        in_axes=(0, 0, None, 0),
        out_axes=0,
        devices=devices,
        donate_argnums=0,
    )
    return Slots(
        num=len(devices) * per_device,
        steps=named("the training step", compiled),
        indices=np.arange(batch_size),
        put=put,
        put_batches=put_batches,
        get=get,
    )


def _of_single_slot(steps: Steps) -> Steps:
    """The steps of a device with one slot, without vmap, which makes convolutions slow."""

    def of_device(state: PyTree, constants: PyTree, indices: PyTree, batches: Batch) -> PyTree:
        state, constants, batches = jax.tree.map(lambda leaf: leaf[0], (state, constants, batches))
        output = steps(state, constants, indices, batches)
        return jax.tree.map(lambda leaf: leaf[None], output)

    return of_device


def choose_way_on_cpu(parallel: str, num_jobs: int, num_devices: int) -> str:
    """Choose how ``num_jobs`` jobs run on a CPU, before jax makes devices of its cores.

    "auto" runs one job per device, because no device then waits for another, which is fastest
    (docs/RESULTS.md). With fewer jobs than devices, it runs the jobs in sequence.
    """
    if parallel != "auto":
        return parallel
    return "device" if num_jobs >= num_devices else "sequence"


def choose_parallel(ablation: Ablation, way_on_cpu: str, num_devices: int) -> Parallel:
    """Choose how the jobs of an ablation run, after jax has found its devices.

    On a CPU the choice is ``way_on_cpu``. On an accelerator "auto" is vmap, because one small
    model does not fill the accelerator (not measured yet).
    """
    is_auto, is_cpu = ablation.parallel == "auto", jax.default_backend() == "cpu"
    way = "vmap" if is_auto and not is_cpu else way_on_cpu
    if way != "vmap":
        return Parallel(way=way, per_device=1)
    most = -(-len(ablation.mine) // num_devices)
    per_device = min(most, ablation.arms_per_device or MAX_ARMS_PER_DEVICE)
    return Parallel(way=way, per_device=per_device)


def create_slots(parallel: Parallel, jobs: Sequence[Job], devices: list[jax.Device]) -> Slots:
    """Create the slots for jobs with equal static choices."""
    experiment = jobs[0].experiment
    batch_size = experiment.training.batch_size
    exchange = BETWEEN_DEVICES if parallel.way == "sequence" else ALONE
    step = functools.partial(train_step, step_choices(experiment, exchange))
    if parallel.way == "sequence":
        return one_by_one(step, batch_size, devices)
    per_device = min(parallel.per_device, -(-len(jobs) // len(devices)))
    return side_by_side(step, batch_size, devices, per_device)
