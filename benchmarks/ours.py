"""The cases as diffusion_jax runs them, through the functions that main.py calls."""

import atexit
import collections
import contextlib
import functools
import itertools
import pathlib
import shutil
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import block_until_ready

from benchmarks.cases import SIZES
from diffusion_jax.config.config import load
from diffusion_jax.data import batches as batches_of
from diffusion_jax.data.dataset import Split
from diffusion_jax.diffusion.streams import Stream, stream_key
from diffusion_jax.evaluation import evaluate as evaluation
from diffusion_jax.experiment.evaluation import fit
from diffusion_jax.experiment.experiment import Experiment, create_experiment
from diffusion_jax.runtime import checkpoint, devices
from diffusion_jax.runtime.checkpoint import Checkpoints
from diffusion_jax.runtime.compilation import COMPILED
from diffusion_jax.sampling.generator import Generator
from diffusion_jax.training.step import (
    BETWEEN_DEVICES,
    Constants,
    TrainState,
    compile_steps,
    divide_batches,
    init_state,
    pace,
    step_choices,
)
from diffusion_jax.training.step import train_step as step_of_device

CONFIG = pathlib.Path(__file__).parent.parent / "configs" / "default.py"

Prepared = tuple[Callable[[], object], dict[str, Any]]

# jax's events. A program that comes from the compilation cache has all three: it was compiled once
# in the seconds that the cache saved and those of the retrieval together.
SAVED = "/jax/compilation_cache/compile_time_saved_sec"
RETRIEVED = "/jax/compilation_cache/cache_retrieval_time_sec"
SECONDS: dict[str, list[float]] = collections.defaultdict(list)  # of all events, by their names


def _on_duration(event: str, duration_secs: float, **_: object) -> None:
    SECONDS[event].append(duration_secs)


jax.monitoring.register_event_duration_secs_listener(_on_duration)


def saved_seconds() -> float:
    """The seconds that jax's compilation cache has saved, if JAX_COMPILATION_CACHE_DIR is set."""
    return sum(SECONDS[SAVED])


def program_seconds() -> float | None:
    """The seconds of the longest compilation, now or when its program came into the cache."""
    cached = map(sum, zip(SECONDS[SAVED], SECONDS[RETRIEVED]))
    return max([*SECONDS[COMPILED], *cached], default=None)


def create(size: str, fields: dict[str, Any]) -> tuple[Experiment, list[jax.Device]]:
    """The experiment of a size with some fields, and the devices as main.py starts them."""
    chosen = SIZES[size]
    model = "width", "channel_multipliers", "num_blocks", "attention_resolutions", "head_channels"
    all_fields = {f"model.{name}": getattr(chosen, name) for name in (*model, "dropout")}
    all_fields |= {"dataset.name": chosen.dataset, "loss.timesteps": "uniform"} | fields
    config = load(str(CONFIG), [(n, str(v)) for n, v in all_fields.items()])
    is_training = "train.batch_size" in fields
    batch_size = config.train.batch_size if is_training else config.sampling.batch_size
    devices.start(config.num_devices, batch_size, False, divide=is_training)
    return create_experiment(config), devices.select_devices(config.num_devices)


def num_parameters(params: Any) -> int:
    """The number of parameters of a network."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def device_kind() -> str:
    """The name of the device."""
    return jax.devices()[0].device_kind


def peak_of_device() -> int:
    """The peak of the bytes in use in the device's memory."""
    return jax.devices()[0].memory_stats()["peak_bytes_in_use"]


class Step(NamedTuple):
    """The compiled steps of all devices, and their arguments."""

    steps: Callable[..., Any]
    state: TrainState
    inputs: tuple[Any, ...]  # constants, indices, batches
    num_steps: int  # of a call
    about: dict[str, Any]


def create_step(size: str, batch_size: int, fields: dict[str, Any]) -> Step:
    """The compiled steps of ``train.train``, with random images."""
    experiment, used_devices = create(size, {"train.batch_size": batch_size} | fields)
    schedule = experiment.schedule
    state = init_state(experiment, seed=0, num_timesteps=len(schedule))
    about = {"num_parameters": num_parameters(state.params)}
    indices = np.arange(batch_size).reshape(len(used_devices), -1)
    images, _ = _images_and_labels(batch_size, experiment.dataset.shape)
    num_steps, _ = pace(experiment.training, used_devices[0])
    batches = {"image": np.stack([images] * num_steps), "label": None}
    batches = divide_batches(batches, len(used_devices))
    choices = step_choices(experiment, BETWEEN_DEVICES)
    steps = compile_steps(functools.partial(step_of_device, choices), used_devices)
    constants = Constants(schedule, stream_key(0, Stream.TRAINING))
    state, constants = devices.replicate((state, constants), used_devices)
    return Step(
        steps=steps,
        state=state,
        inputs=(constants, indices, batches),
        num_steps=num_steps,
        about=about,
    )


def train_step(
    contender: str,
    size: str,
    batch_size: int,
    num_steps: int,
    fields: dict[str, Any] | None = None,
    dtype: str = "float32",
) -> Prepared:
    """Training steps: each call waits for the loss of the call before it, as training on a CPU."""
    all_fields = {"model.dtype": dtype} | (fields or {})
    steps, state, inputs, per_call, about = create_step(size, batch_size, all_fields)
    assert num_steps % per_call == 0

    def run() -> None:
        nonlocal state
        before = None
        for _ in range(num_steps // per_call):
            state, metrics = steps(state, *inputs)
            block_until_ready(before)
            before = metrics.loss
        block_until_ready((before, state))

    return run, about


def sample(
    contender: str,
    size: str,
    sampler: str,
    batch_size: int,
    num_steps: int,
    dtype: str = "float32",
) -> Prepared:
    """Sample one batch by the plan's chain, with the weights of an untrained network."""
    fields = {
        "model.dtype": dtype,
        "sampling.sampler": sampler,
        "sampling.num_steps": num_steps,
        "sampling.num_images": batch_size,
        "sampling.batch_size": batch_size,
        "sampling.num_frames": 0,
    }
    experiment, used_devices = create(size, fields)
    params = experiment.model.init(jax.random.key(0))
    generator = Generator(experiment, None, used_devices)

    def run() -> None:
        for batch in generator.batches((params, None), 0, None):
            assert np.isfinite(batch.x_0).all()

    return run, {"num_parameters": num_parameters(params)}


def read_batches(contender: str, batch_size: int, num_batches: int) -> Prepared:
    """Shuffled batches of a split in memory, from the input pipeline of training."""
    split = Split(*_images_and_labels(60_000, (28, 28, 1)))
    stream = batches_of.read_batches(split, batch_size, seed=0)

    def run() -> None:
        for _ in range(num_batches):
            assert len(next(stream)["image"]) == batch_size

    return run, {}


def _images_and_labels(count: int, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    source = np.random.default_rng(0)
    return source.integers(0, 256, (count, *shape), np.uint8), source.integers(0, 10, count)


def evaluate(contender: str, size: str, num_examples: int, num_timesteps: int) -> Prepared:
    """The evaluation of --mode=evaluate, including its files."""
    fields = {"evaluate.num_examples": num_examples, "evaluate.num_timesteps": num_timesteps}
    experiment, used_devices = create(size, fields)
    split = Split(*_images_and_labels(num_examples, experiment.dataset.shape))
    plan = fit(experiment.evaluation, split)
    evaluator = evaluation.Evaluator(experiment.network, plan, used_devices)
    params = experiment.model.init(jax.random.key(0))
    trained = evaluation.Trained(params=params, step=0, schedule=experiment.schedule, seed=0)
    folders = tempfile.TemporaryDirectory()

    def run() -> None:
        # a new folder each time: in the same one the evaluation would be resumed
        folder = pathlib.Path(tempfile.mkdtemp(dir=folders.name))
        evaluator.evaluate(trained, split, about={}, folder=folder)

    return run, {"num_parameters": num_parameters(params)}


def _state(size: str) -> tuple[TrainState, pathlib.Path]:
    experiment, _ = create(size, {"train.batch_size": 16})
    state = init_state(experiment, seed=0, num_timesteps=len(experiment.schedule))
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    return jax.tree.map(np.asarray, state), pathlib.Path(folder)


def _save(folder: pathlib.Path, step: int, state: TrainState) -> None:
    with contextlib.closing(Checkpoints(folder, 1, 0)) as checkpoints:
        checkpoints.save(step, state._asdict(), 0.0)


def save(contender: str, size: str) -> Prepared:
    """Write a checkpoint and wait until it is on the disk; training does not wait."""
    state, folder = _state(size)
    number = itertools.count(1)
    return lambda: _save(folder, next(number), state), {}


def restore(contender: str, size: str) -> Prepared:
    """Restore a checkpoint: read it and compare its digest."""
    state, folder = _state(size)
    _save(folder, 1, state)

    def run() -> None:
        assert checkpoint.restore(folder, state._asdict()).step == 1

    return run, {}
