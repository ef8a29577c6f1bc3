"""The programs of each mode, as compiled functions and the shapes of their arguments."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import ours
from diffusion_jax.data.dataset import Split
from diffusion_jax.diffusion.bound import stratify
from diffusion_jax.diffusion.examples import Examples
from diffusion_jax.diffusion.losses import LossInputs
from diffusion_jax.evaluation.evaluate import Evaluator
from diffusion_jax.experiment.evaluation import fit
from diffusion_jax.experiment.experiment import Experiment
from diffusion_jax.sampling.generator import ChainInputs, Generator
from diffusion_jax.training.step import (
    BETWEEN_DEVICES,
    Constants,
    compile_steps,
    ema_decay,
    init_state,
    step_choices,
    train_step,
)

Program = tuple[Any, ...]  # a function of jax.jit or jax.pmap, then its arguments or their shapes
NUM_STEPS = 50  # of the chain
TIMESTEPS = 8  # of an image in one call of the bound


def _create(
    size: str, fields: dict[str, Any], devices: list[Any] | None
) -> tuple[Experiment, list[Any]]:
    experiment, own = ours.create(size, fields)
    return experiment, devices or own


def of_training(
    size: str, batch_size: int, dtype: str, devices: list[Any] | None
) -> dict[str, Program]:
    """The training step, and its parts on the share of one device."""
    fields = {"train.batch_size": batch_size, "model.dtype": dtype}
    experiment, devices = _create(size, fields, devices)
    share = batch_size // len(devices)
    image = jax.ShapeDtypeStruct((share, *experiment.dataset.shape), jnp.float32)
    init = functools.partial(init_state, experiment, seed=0, num_timesteps=len(experiment.schedule))
    state = jax.eval_shape(init)
    constants = Constants(experiment.schedule, jax.random.key(0))
    pixels = np.zeros((len(devices), 1, share, *experiment.dataset.shape), np.uint8)
    batches = {"image": pixels, "label": None}
    indices = np.arange(batch_size).reshape(len(devices), share)
    step = functools.partial(train_step, step_choices(experiment, BETWEEN_DEVICES))
    step_program = compile_steps(step, devices), state, shapes(constants), indices, batches
    return {"step": step_program} | _parts(experiment, state, image, devices)


def _parts(
    experiment: Experiment, state: Any, image: Any, devices: list[Any]
) -> dict[str, Program]:
    plan, optimizer = experiment.training, experiment.training.optimizer
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), len(image)))
    timestep = jax.ShapeDtypeStruct((len(image),), jnp.float32)
    clip = optax.clip_by_global_norm(1.0)

    def loss(params: Any, x_0: Any, schedule: Any, key: Any) -> Any:
        inputs = LossInputs(
            schedule=schedule,
            timestep_state=(),
            key=key,
            examples=Examples(
                x_0=x_0, label=None, indices=jnp.arange(len(x_0)), batch_size=plan.batch_size
            ),
        )
        return jnp.mean(experiment.losses_of(params, inputs).losses)

    def update(gradient: Any, opt_state: Any, params: Any) -> Any:
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    def average(params: Any, ema: Any, number: Any) -> Any:
        return optax.incremental_update(params, ema, 1 - ema_decay(plan, number))

    one = jax.sharding.SingleDeviceSharding(devices[0])
    compiled = functools.partial(jax.jit, in_shardings=one, out_shardings=one)
    exchange = jax.pmap(
        lambda tree, _: BETWEEN_DEVICES.mean(tree),
        "device",
        in_axes=(None, 0),
        out_axes=None,
        devices=devices,
    )
    example = image, shapes(experiment.schedule), shapes(jax.random.key(0))
    params = state.params
    return {
        "network": (compiled(experiment.model.apply), params, image, timestep, None, keys),
        "loss": (compiled(loss), params, *example),
        "gradient": (compiled(jax.grad(loss)), params, *example),
        "clipping": (compiled(lambda tree: clip.update(tree, optax.EmptyState())[0]), params),
        "optimizer": (compiled(update), params, state.opt_state, params),
        "averages": (compiled(average), params, params, state.step),
        "exchange": (exchange, params, np.arange(len(devices))),
    }


def of_sampling(
    size: str, batch_size: int, dtype: str, devices: list[Any] | None
) -> dict[str, Program]:
    """The reverse chain of DDIM."""
    fields = {
        "model.dtype": dtype,
        "sampling.sampler": "ddim",
        "sampling.num_steps": NUM_STEPS,
        "sampling.num_images": batch_size,
        "sampling.batch_size": batch_size,
        "sampling.num_frames": 0,
    }
    experiment, devices = _create(size, fields, devices)
    generator = Generator(experiment, None, devices)
    inputs = ChainInputs(
        params=(experiment.model.template, None),
        rows=shapes(experiment.sampling.chain.rows(experiment.schedule)),
        native=shapes(experiment.schedule),
        sampler=experiment.sampling.sampler,
        guidance=None,
        key=shapes(jax.random.key(0)),
    )
    indices = np.arange(batch_size).reshape(len(devices), -1)
    chain = generator._trajectory.__wrapped__  # without the display of its compilation
    return {"chain": (chain, inputs, indices, None, 0)}


def of_evaluation(
    size: str, batch_size: int, dtype: str, devices: list[Any] | None
) -> dict[str, Program]:
    """The bound of a batch, and its probability flow."""
    fields = {"model.dtype": dtype, "evaluate.flow_examples": batch_size}
    experiment, devices = _create(size, fields, devices)
    images = np.zeros((batch_size, *experiment.dataset.shape), np.uint8)
    plan = fit(experiment.evaluation, Split(images, None))
    evaluator = Evaluator(experiment.network, plan, devices)
    batch = {"image": images, "label": None, "index": np.arange(batch_size)}
    batch = jax.tree.map(lambda leaf: leaf.reshape(len(devices), -1, *leaf.shape[1:]), batch)
    shared = experiment.model.template, shapes(experiment.schedule), shapes(jax.random.key(0))
    strata = stratify(len(experiment.schedule), TIMESTEPS)
    return {
        "bound": (evaluator._bound.__wrapped__, *shared, batch, strata),
        "flow": (evaluator._flow.__wrapped__, *shared, batch),
    }


def shapes(tree: Any) -> Any:
    """The shapes of a pytree, which belong to no device."""
    return jax.tree.map(lambda leaf: jax.eval_shape(jnp.asarray, leaf), tree)
