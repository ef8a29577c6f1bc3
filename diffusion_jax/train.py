"""The training loop: one compiled step on every device, logs one step late, exact resumes."""

import functools
import itertools
import logging
from collections.abc import Callable
from contextlib import closing
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int, Key, PyTree

from diffusion_jax import data, devices, schedules
from diffusion_jax.checkpoint import Checkpoints, Restored
from diffusion_jax.config import RunError
from diffusion_jax.generate import Generator, Grid
from diffusion_jax.journal import NO_STEPS, QUARTILES, Journal, StepMetrics
from diffusion_jax.losses import BatchLosses
from diffusion_jax.models import Model
from diffusion_jax.schedules import Schedule
from diffusion_jax.stop import Stop
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


class Exchange(NamedTuple):
    """What devices that share a batch tell each other in a step."""

    mean: Callable[[PyTree], PyTree]
    sum: Callable[[PyTree], PyTree]
    gather: Callable[[PyTree], PyTree]


BETWEEN_DEVICES = Exchange(
    lambda tree: lax.pmean(tree, "device"),
    lambda tree: lax.psum(tree, "device"),
    lambda tree: lax.all_gather(tree, "device", tiled=True),
)
ALONE = Exchange(*[lambda tree: tree] * 3)  # of a device that has the whole batch


def train_step(
    batch_losses: Callable[..., BatchLosses],
    timesteps: TimestepSampler,
    plan: TrainingPlan,
    levels: int | None,
    exchange: Exchange,
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
    gradient, loss = exchange.mean((gradient, jnp.mean(weighted)))
    updates, opt_state = plan.optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = optax.incremental_update(params, state.ema, 1 - ema_decay(plan, state.step))
    seen = exchange.gather((found.rows, found.losses))
    timestep_state = timesteps.update(state.timestep_state, *seen)

    quartile = found.rows * QUARTILES // schedules.num_timesteps(schedule)
    quartile = jax.nn.one_hot(quartile, QUARTILES)
    sums = exchange.sum((weighted @ quartile, found.weights @ quartile))
    metrics = StepMetrics(loss, optax.tree.norm(gradient), *sums)
    return TrainState(state.step + 1, params, ema, opt_state, timestep_state), metrics


Steps = Callable[..., tuple[TrainState, StepMetrics]]


def several_steps(step: Steps) -> Steps:
    """Consecutive steps as one call: batches and metrics are [step, ...].

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

    return steps


def compile_steps(step: Steps, used: list[jax.Device]) -> Steps:
    """Steps of a run on all devices: indices and batches are [device, ...], the rest is shared."""
    return jax.pmap(
        several_steps(step),
        axis_name="device",
        in_axes=(None, None, None, 0, 0),
        out_axes=None,
        devices=used,
        donate_argnums=0,
    )


class Run:
    """A training run under way, but for its state on the devices: where it stands and its records.

    It goes on from the newest intact checkpoint, if there is one: ``step`` and ``state``, on the
    host, are those that it begins with.
    """

    def __init__(
        self,
        plan: TrainingPlan,
        fresh: TrainState,
        seed: int,
        dataset: data.Dataset,
        workdir: Workdir,
        journal: Callable[..., Journal],
        processes: tuple[int, int] = (0, 1),
    ) -> None:
        self._plan = plan
        self._workdir = workdir  # whose lock is held while the run lives
        self._checkpoints = Checkpoints(workdir.checkpoints, plan.keep_last, plan.keep_best)
        # what the next record is made of is saved too: a resumed run reports as one never stopped
        kept = {**fresh._asdict(), "since_log": NO_STEPS}
        try:
            self.step, saved = self._checkpoints.restore(kept) or Restored(0, kept)
        except RunError:
            self._checkpoints.close()
            raise
        self.state = TrainState(*(saved[name] for name in TrainState._fields))
        if self.step:
            LOG.info("resuming at step %d", self.step)
        self._journal = journal(
            workdir,
            self.step,
            plan.num_steps,
            plan.batch_size,
            plan.log_every_steps,
            since_log=saved["since_log"],
        )
        split = dataset.train, plan.batch_size, seed, self.step, plan.flip
        self._batches = data.batches(*split, *processes)

    @property
    def is_done(self) -> bool:
        """Whether the last step has been taken."""
        return self.step >= self._plan.num_steps

    def steps_to(self, multiple: int) -> int:
        """Steps until the step number is a multiple, or the run ends."""
        return min(multiple - self.step % multiple, self._plan.num_steps - self.step)

    def batches(self, num_steps: int) -> Batch:
        """The batches of the next steps: [step, example, ...]."""
        batches = itertools.islice(self._batches, num_steps)
        return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)

    def took(self, num_steps: int, metrics: StepMetrics, grid: Grid | None = None) -> None:
        """Report steps that were begun; a grid is that of the state after them."""
        self.step += num_steps
        self._journal.add(self.step, metrics, grid)

    @property
    def is_checkpoint_due(self) -> bool:
        """Whether the plan saves the state of this step."""
        return self.is_done or self.step % self._plan.checkpoint_every_steps == 0

    def save(self, state: TrainState) -> None:
        """Save a state, which is on the host; nothing before its losses are known to be finite."""
        self._journal.drain()
        loss = self._journal.loss_since_save()
        kept = {**state._asdict(), "since_log": self._journal.since_log}
        self._checkpoints.save(self.step, kept, loss)

    def close(self) -> None:
        """Finish what is being saved, and the records."""
        self._checkpoints.close()
        self._journal.close()


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
    processes = jax.process_index(), jax.process_count()
    fresh = init_state(model, plan.optimizer, timesteps, len(schedule), seed)
    steps_per_call, in_flight = pace(plan, local)
    journal = functools.partial(Journal, max_in_flight=in_flight)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(fresh.params))
    LOG.info("%s parameters, %d step(s) per call", f"{parameters:,}", steps_per_call)

    indices = np.split(np.arange(plan.batch_size), processes[1])[processes[0]]
    indices = indices.reshape(len(local), -1)
    choices = batch_losses, timesteps, plan, dataset.levels, BETWEEN_DEVICES
    steps = compile_steps(functools.partial(train_step, *choices), used)
    with (
        closing(Run(plan, fresh, seed, dataset, workdir, journal, processes)) as run,
        closing(Stop()) as stop,
    ):
        state, schedule, key = devices.replicate((run.state, schedule, noise_key(seed)), used)
        stopping = False
        while not (run.is_done or stopping):
            # the first call is a short one if the run stopped where calls of another length ended
            num_steps = run.steps_to(steps_per_call)
            batches = spread(run.batches(num_steps), len(local))
            state, metrics = steps(state, schedule, key, indices, batches)
            step = run.step + num_steps
            grid = None
            if plan.sample_every_steps and step % plan.sample_every_steps == 0:
                grid = generator.grid(state.ema)
            run.took(num_steps, metrics, grid)
            stopping = stop.asked(step)
            if stopping or run.is_checkpoint_due:
                run.save(devices.local_copy(state))
    return state, stop.signal


def noise_key(seed: int) -> Key[Array, ""]:
    """The key of a run's noise, timesteps and dropout; a step folds its number in."""
    return jax.random.fold_in(jax.random.key(seed), 1)


def pace(plan: TrainingPlan, local: list[jax.Device]) -> tuple[int, int]:
    """How many steps a call takes, and how many calls may be under way."""
    if local[0].platform == "cpu":
        return plan.steps_per_call or 1, MAX_IN_FLIGHT_ON_CPU
    return plan.steps_per_call or plan.steps_per_call_of_accelerators, MAX_IN_FLIGHT


def spread(batches: Batch, num_devices: int) -> Batch:
    """Batches as every device wants its share: from [step, ...] to [device, step, ...]."""

    def of_leaf(leaf: np.ndarray) -> np.ndarray:
        parts = leaf.reshape(len(leaf), num_devices, -1, *leaf.shape[2:])
        return np.swapaxes(parts, 0, 1)

    return jax.tree.map(of_leaf, batches)
