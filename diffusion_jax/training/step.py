"""One training step: the gradient on a device's share of the batch, the optimizer, the EMA.

``compile_steps`` maps it over all devices. Keys and batches are functions of the step number.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int, Key, PyTree

from diffusion_jax.data.pixels import to_x_0
from diffusion_jax.diffusion import schedules
from diffusion_jax.diffusion.examples import Examples
from diffusion_jax.diffusion.losses import BatchLosses, LossesOf, LossInputs
from diffusion_jax.diffusion.schedules.schedule import Schedule
from diffusion_jax.diffusion.streams import Stream, stream_key
from diffusion_jax.diffusion.timesteps import TimestepSampler
from diffusion_jax.experiment.experiment import Experiment
from diffusion_jax.experiment.training import TrainingPlan
from diffusion_jax.runtime.numerics import HIGHEST, in_precision

# Calls that may be under way. Several CPU devices deadlock in the all-reduce when unread steps
# pile up, so there the loss of step k-1 is read at every step k.
MAX_IN_FLIGHT_ON_CPU = 1
MAX_IN_FLIGHT = 16
QUARTILES = 4  # of the timesteps 1..T; records have the mean loss of each

Batch = dict[str, Any]  # "image" and "label"; "label" may be None


class TrainState(NamedTuple):
    """All arrays that a step changes; ``ema`` has the averaged weights."""

    step: Int[Array, ""]
    params: PyTree
    ema: PyTree
    opt_state: PyTree
    timestep_state: PyTree = ()


class StepMetrics(NamedTuple):
    """The metrics of a step; quartile k sums weighted losses over k T/4 < t <= (k+1) T/4."""

    loss: Float[Array, "*steps"]
    gradient_norm: Float[Array, "*steps"]
    quartile_losses: Float[Array, "*steps quartiles"]
    quartile_weights: Float[Array, "*steps quartiles"]  # sums of the weights 1 / (T p_t)


class Exchange(NamedTuple):
    """The collective operations of a step, over the devices that share a batch."""

    mean: Callable[[PyTree], PyTree]
    sum: Callable[[PyTree], PyTree]
    gather: Callable[[PyTree], PyTree]


BETWEEN_DEVICES = Exchange(
    mean=lambda tree: lax.pmean(tree, "device"),
    sum=lambda tree: lax.psum(tree, "device"),
    gather=lambda tree: lax.all_gather(tree, "device", tiled=True),
)
ALONE = Exchange(*[lambda tree: tree] * 3)  # one device has the whole batch


class StepChoices(NamedTuple):
    """The static choices of a step: other ones compile another program."""

    losses_of: LossesOf
    timesteps: TimestepSampler
    plan: TrainingPlan
    levels: int | None  # of the data's pixels; None: points
    exchange: Exchange


def step_choices(experiment: Experiment, exchange: Exchange) -> StepChoices:
    """The static choices of a training step of an experiment."""
    return StepChoices(
        losses_of=experiment.losses_of,
        timesteps=experiment.objective.timesteps,
        plan=experiment.training,
        levels=experiment.dataset.levels,
        exchange=exchange,
    )


def init_state(experiment: Experiment, *, seed: int, num_timesteps: int) -> TrainState:
    """The state before the first step; the averaged weights start as a copy of the weights."""
    params = experiment.model.init(stream_key(seed, Stream.WEIGHTS))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, params),  # donated buffers must not be shared
        opt_state=experiment.training.optimizer.init(params),
        timestep_state=experiment.objective.timesteps.init(num_timesteps),
    )


def ema_decay(plan: TrainingPlan, step: Int[Array, ""]) -> Float[Array, ""]:
    """Decay of the averaged weights; with a warm-up min(decay, (1 + step) / (10 + step))."""
    warm = (1 + step) / (10 + step) if plan.ema_warmup else 1.0
    return jnp.minimum(plan.ema_decay, warm)


class Constants(NamedTuple):
    """The arguments of a compiled step that are the same for all steps of a run."""

    schedule: Schedule
    key: Key[Array, ""]  # of Stream.TRAINING; a step folds its number in


def train_step(
    choices: StepChoices,
    state: TrainState,
    constants: Constants,
    indices: Int[Array, " batch"],
    batch: Batch,
) -> tuple[TrainState, StepMetrics]:
    """One gradient step on this device's share of the batch (DDPM algorithm 1)."""
    plan, exchange = choices.plan, choices.exchange
    inputs = LossInputs(
        schedule=constants.schedule,
        timestep_state=state.timestep_state,
        key=jax.random.fold_in(constants.key, state.step),
        examples=Examples(
            x_0=to_x_0(batch["image"], choices.levels),
            label=batch["label"],
            indices=indices,
            batch_size=plan.batch_size,
        ),
    )

    def mean_loss(params: PyTree) -> tuple[Float[Array, ""], BatchLosses]:
        output = choices.losses_of(params, inputs)
        return jnp.mean(output.weights * output.losses), output

    compute_gradient = in_precision(plan.precision, jax.grad(mean_loss, has_aux=True))
    gradient, output = compute_gradient(state.params)
    weighted = output.weights * output.losses
    gradient, loss = exchange.mean((gradient, jnp.mean(weighted)))
    updates, opt_state = plan.optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = optax.incremental_update(params, state.ema, 1 - ema_decay(plan, state.step))
    seen = exchange.gather((output.rows, output.losses))
    timestep_state = choices.timesteps.update(state.timestep_state, *seen)

    quartile = output.rows * QUARTILES // schedules.num_timesteps(constants.schedule)
    quartile = jax.nn.one_hot(quartile, QUARTILES)
    total = in_precision(HIGHEST, lambda weights: weights @ quartile)
    sums = exchange.sum((total(weighted), total(output.weights)))
    metrics = StepMetrics(loss, optax.tree.norm(gradient), *sums)
    return TrainState(state.step + 1, params, ema, opt_state, timestep_state), metrics


# A step with its static choices bound: (state, constants, indices, batch) -> (state, metrics)
Steps = Callable[..., tuple[TrainState, StepMetrics]]


def several_steps(step: Steps) -> Steps:
    """Consecutive steps as one call: batches and metrics are [step, ...].

    A single step has no scan: XLA:CPU runs convolution gradients inside a scan 20 times slower.
    """

    def steps(
        state: TrainState,
        constants: Constants,
        indices: Int[Array, " batch"],
        batches: Batch,
    ) -> tuple[TrainState, StepMetrics]:
        def body(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
            return step(state, constants, indices, batch)

        if len(batches["image"]) > 1:
            return lax.scan(body, state, batches)
        state, metrics = body(state, jax.tree.map(lambda leaf: leaf[0], batches))
        return state, jax.tree.map(lambda leaf: leaf[None], metrics)

    return steps


def compile_steps(step: Steps, devices: list[jax.Device]) -> Steps:
    """Compile steps for all devices: indices and batches are [device, ...], the rest replicated."""
    return jax.pmap(
        several_steps(step),
        axis_name="device",
        in_axes=(None, None, 0, 0),
        out_axes=None,
        devices=devices,
        donate_argnums=0,
    )


def pace(plan: TrainingPlan, device: jax.Device) -> tuple[int, int]:
    """The number of steps in a call, and the number of calls that may be under way."""
    if device.platform == "cpu":
        return plan.steps_per_call or 1, MAX_IN_FLIGHT_ON_CPU
    return plan.steps_per_call or plan.steps_per_call_of_accelerators, MAX_IN_FLIGHT


def divide_batches(batches: Batch, num_devices: int) -> Batch:
    """Split batches between devices: [step, example, ...] to [device, step, example, ...]."""

    def of_leaf(leaf: np.ndarray) -> np.ndarray:
        parts = leaf.reshape(len(leaf), num_devices, -1, *leaf.shape[2:])
        return np.swapaxes(parts, 0, 1)

    return jax.tree.map(of_leaf, batches)
