"""The training loop: one compiled step on every device, logs one step late, exact resumes."""

import itertools
import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import closing
from types import FrameType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, Int, Key, PyTree

from diffusion_jax import data, devices
from diffusion_jax.checkpoint import Checkpoints, Restored
from diffusion_jax.generate import Generator
from diffusion_jax.journal import NO_STEPS, QUARTILES, Journal, StepMetrics
from diffusion_jax.losses import BatchLosses
from diffusion_jax.models import Model
from diffusion_jax.schedules import Schedule
from diffusion_jax.timesteps import TimestepSampler
from diffusion_jax.workdir import Workdir

LOG = logging.getLogger("diffusion_jax")

# Calls that may be under way. Several CPU devices deadlock in the all-reduce when unread steps
# pile up, so there the loss of step k-1 is read at every step k.
MAX_IN_FLIGHT_ON_CPU = 1
MAX_IN_FLIGHT = 16

Batch = dict[str, Any]  # "image" and "label", of which the latter may be None


class TrainState(NamedTuple):
    """All that a step changes: arrays only. Keys and batches follow from the step number."""

    step: Int[Array, ""]
    params: PyTree
    ema: PyTree
    opt_state: PyTree
    timestep_state: PyTree = ()


class TrainingPlan(NamedTuple):
    """How long, how large, how often."""

    num_steps: int
    batch_size: int
    steps_per_call: int | None
    steps_per_call_of_accelerators: int
    log_every_steps: int
    sample_every_steps: int
    checkpoint_every_steps: int
    keep_last: int
    keep_best: int
    optimizer: optax.GradientTransformation
    ema_decay: float
    ema_warmup: bool
    flip: bool


def init_state(
    model: Model,
    optimizer: optax.GradientTransformation,
    timesteps: TimestepSampler,
    num_timesteps: int,
    seed: int,
) -> TrainState:
    """The state before the first step; the averaged weights start as the weights."""
    params = model.init(jax.random.fold_in(jax.random.key(seed), 0))
    ema = jax.tree.map(jnp.copy, params)  # donated buffers must not be shared
    step, timestep_state = jnp.zeros((), jnp.int32), timesteps.init(num_timesteps)
    return TrainState(step, params, ema, optimizer.init(params), timestep_state)


def ema_decay(plan: TrainingPlan, step: Int[Array, ""]) -> Float[Array, ""]:
    """Decay of the averaged weights: min(decay, (1 + step) / (10 + step)) while it warms up."""
    warm = (1 + step) / (10 + step) if plan.ema_warmup else 1.0
    return jnp.minimum(plan.ema_decay, warm)


def train_step(
    batch_losses: Callable[..., BatchLosses],
    timesteps: TimestepSampler,
    plan: TrainingPlan,
    levels: int | None,
    state: TrainState,
    schedule: Schedule,
    key: Key[Array, ""],
    indices: Int[Array, " batch"],
    batch: Batch,
) -> tuple[TrainState, StepMetrics]:
    """One gradient step on this device's share of the batch (DDPM algorithm 1)."""
    key = jax.random.fold_in(key, state.step)
    x_0 = data.to_x_0(batch["image"], levels)

    def mean_loss(params: PyTree) -> tuple[Float[Array, ""], BatchLosses]:
        found = batch_losses(
            params,
            schedule,
            state.timestep_state,
            key,
            x_0,
            batch["label"],
            indices,
            plan.batch_size,
        )
        return jnp.mean(found.weights * found.losses), found

    gradient, found = jax.grad(mean_loss, has_aux=True)(state.params)
    weighted = found.weights * found.losses
    gradient, loss = lax.pmean((gradient, jnp.mean(weighted)), "device")
    updates, opt_state = plan.optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = optax.incremental_update(params, state.ema, 1 - ema_decay(plan, state.step))
    seen = lax.all_gather((found.rows, found.losses), "device", tiled=True)
    timestep_state = timesteps.update(state.timestep_state, *seen)

    quartile = jax.nn.one_hot(found.rows * QUARTILES // len(schedule), QUARTILES)
    sums = lax.psum((weighted @ quartile, found.weights @ quartile), "device")
    metrics = StepMetrics(loss, optax.tree.norm(gradient), *sums)
    return TrainState(state.step + 1, params, ema, opt_state, timestep_state), metrics


def compile_steps(step: Callable[..., Any], used: list[jax.Device]) -> Callable[..., Any]:
    """Several steps as one call on every device: batches are [device, step, example, ...].

    One step is called as it is: XLA:CPU runs convolution gradients inside a scan 20 times slower.
    """

    def steps(
        state: TrainState,
        schedule: Schedule,
        key: Key[Array, ""],
        indices: Int[Array, " batch"],
        batches: Batch,
    ) -> tuple[TrainState, StepMetrics]:
        def body(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
            return step(state, schedule, key, indices, batch)

        if len(batches["image"]) > 1:
            return lax.scan(body, state, batches)
        state, metrics = body(state, jax.tree.map(lambda leaf: leaf[0], batches))
        return state, jax.tree.map(lambda leaf: leaf[None], metrics)

    return jax.pmap(
        steps,
        axis_name="device",
        in_axes=(None, None, None, 0, 0),
        out_axes=None,
        devices=used,
        donate_argnums=0,
    )


class Stop:
    """SIGTERM and SIGINT as a question that the loop asks between steps.

    Of several processes jax's preemption service hears the SIGTERM, if nobody else handles it.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        numbers = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
        self._before = {number: signal.signal(number, self._remember) for number in numbers}

    def close(self) -> None:
        """Let signals do again what they did before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal = number

    def asked(self, step: int) -> bool:
        """Whether to stop now; several processes agree on the step through jax."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.signal = signal.SIGTERM
        return self.signal is not None


def train(
    plan: TrainingPlan,
    seed: int,
    model: Model,
    batch_losses: Callable[..., BatchLosses],
    timesteps: TimestepSampler,
    schedule: Schedule,
    dataset: data.Dataset,
    workdir: Workdir,
    used: list[jax.Device],
    generator: Generator,
) -> tuple[TrainState, int | None]:
    """Train to ``plan.num_steps``, from the newest intact checkpoint if there is one.

    Returns the state, on the devices, and the signal that stopped the run early, if one did.

    Raises:
        NonFiniteLossError: naming the step; the last good checkpoint stays.
    """
    local = [device for device in used if device.process_index == jax.process_index()]
    on_cpu = local[0].platform == "cpu"
    steps_per_call = plan.steps_per_call or (1 if on_cpu else plan.steps_per_call_of_accelerators)
    checkpoints = Checkpoints(workdir.checkpoints, plan.keep_last, plan.keep_best)
    state = init_state(model, plan.optimizer, timesteps, len(schedule), seed)
    # what the next record is made of is saved too: a resumed run reports as one never stopped
    fresh = {**state._asdict(), "since_log": NO_STEPS}
    start, saved = checkpoints.restore(fresh) or Restored(0, fresh)
    since_log, state = saved["since_log"], TrainState(*(saved[name] for name in state._fields))
    if start:
        LOG.info("resuming at step %d", start)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    LOG.info("%s parameters, %d step(s) per call", f"{parameters:,}", steps_per_call)

    key = jax.random.fold_in(jax.random.key(seed), 1)
    state, schedule, key = devices.replicate((state, schedule, key), used)
    steps = compile_steps(
        lambda *inputs: train_step(batch_losses, timesteps, plan, dataset.levels, *inputs), used
    )
    processes = jax.process_index(), jax.process_count()
    indices = np.split(np.arange(plan.batch_size), processes[1])[processes[0]]
    indices = indices.reshape(len(local), -1)
    batches = data.batches(dataset.train, plan.batch_size, seed, start, plan.flip, *processes)

    in_flight = MAX_IN_FLIGHT_ON_CPU if on_cpu else MAX_IN_FLIGHT
    journal = Journal(
        workdir,
        start,
        plan.num_steps,
        plan.batch_size,
        plan.log_every_steps,
        in_flight,
        since_log,
    )
    # the first call is a short one if the run stopped where calls of another length ended
    ends = range(start - start % steps_per_call, plan.num_steps + 1, steps_per_call)[1:]
    done = start
    with closing(checkpoints), closing(Stop()) as stop, journal:
        for step in ends:
            batch = _share(batches, step - done, len(local))
            done = step
            state, metrics = steps(state, schedule, key, indices, batch)
            grid = None
            if plan.sample_every_steps and step % plan.sample_every_steps == 0:
                grid = generator.grid(state.ema)
            journal.add(step, metrics, grid)
            stopping = stop.asked(step)
            if stopping or step % plan.checkpoint_every_steps == 0 or step == plan.num_steps:
                journal.drain()  # nothing is saved before its losses are known to be finite
                on_host = devices.local_copy(state)._asdict()
                loss = journal.loss_since_save()
                checkpoints.save(step, {**on_host, "since_log": journal.since_log}, loss)
            if stopping:
                break
    return state, stop.signal


def _share(batches: Iterator[Batch], num_steps: int, num_devices: int) -> Batch:
    """The next batches as one call wants them: [device, step, example, ...]."""

    def spread(*leaves: np.ndarray) -> np.ndarray:
        parts = [leaf.reshape(num_devices, -1, *leaf.shape[1:]) for leaf in leaves]
        return np.stack(parts, axis=1)

    return jax.tree.map(spread, *itertools.islice(batches, num_steps))
