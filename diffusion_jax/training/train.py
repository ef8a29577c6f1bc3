"""The training loop: compiled steps on all devices, late reading of metrics, exact resumption."""

import functools
import logging
from collections.abc import Callable
from contextlib import closing

import jax
import numpy as np
from jaxtyping import PyTree

from diffusion_jax.data.dataset import Dataset
from diffusion_jax.diffusion.streams import Stream, stream_key
from diffusion_jax.experiment.experiment import Experiment
from diffusion_jax.runtime.compilation import named
from diffusion_jax.runtime.devices import local_copy, replicate
from diffusion_jax.runtime.stop import Stop
from diffusion_jax.runtime.workdir import Workdir
from diffusion_jax.training.journal import Journal, Picture
from diffusion_jax.training.run import Processes, Run
from diffusion_jax.training.step import (
    BETWEEN_DEVICES,
    Constants,
    TrainState,
    compile_steps,
    divide_batches,
    init_state,
    pace,
    step_choices,
    train_step,
)

LOG = logging.getLogger("diffusion_jax")

# Called with the step number and the averaged weights after each call of the compiled step.
OnStep = Callable[[int, PyTree], Picture | None]


def train(
    experiment: Experiment,
    dataset: Dataset,
    workdir: Workdir,
    devices: list[jax.Device],
    on_step: OnStep,
) -> tuple[TrainState, int | None]:
    """Train to the plan's last step, from the newest intact checkpoint if there is one.

    ``on_step`` may start a picture, which the journal writes when it reads that step. Returns the
    state, on the devices, and the signal that asked the run to stop, None if there was none.

    Raises:
        NonFiniteLossError: naming the step; the last good checkpoint stays.
    """
    plan, seed, schedule = experiment.training, experiment.seed, experiment.schedule
    local = [device for device in devices if device.process_index == jax.process_index()]
    processes = Processes(index=jax.process_index(), count=jax.process_count())
    fresh = init_state(experiment, seed=seed, num_timesteps=len(schedule))
    steps_per_call, in_flight = pace(plan, local[0])
    parameters = sum(leaf.size for leaf in jax.tree.leaves(fresh.params))
    LOG.info("%s parameters, %d step(s) per call", f"{parameters:,}", steps_per_call)

    indices = np.split(np.arange(plan.batch_size), processes.count)[processes.index]
    indices = indices.reshape(len(local), -1)
    step = functools.partial(train_step, step_choices(experiment, BETWEEN_DEVICES))
    steps = named("the training step", compile_steps(step, devices))
    journal = functools.partial(Journal, max_in_flight=in_flight)
    run = Run(
        plan,
        fresh,
        journal,
        seed=seed,
        dataset=dataset,
        workdir=workdir,
        processes=processes,
    )
    with closing(run), closing(Stop()) as stop:
        constants = Constants(schedule, stream_key(seed, Stream.TRAINING))
        state, constants = replicate((run.state, constants), devices)
        stopping = False
        while not (run.is_done or stopping):
            # the first call is shorter if the checkpoint's step is no multiple of steps_per_call
            num_steps = run.steps_to(steps_per_call)
            batches = divide_batches(run.batches(num_steps), len(local))
            state, metrics = steps(state, constants, indices, batches)
            run.took(num_steps, metrics, on_step(run.step + num_steps, state.ema))
            stopping = stop.asked(run.step)
            if stopping or run.is_checkpoint_due:
                run.save(local_copy(state))
    return state, stop.signal
