"""What the modes of the command line do: train, sample, evaluate, ablate.

Every mode checks all that it can before it writes anything. Functions return exit statuses.
"""

import logging
import pathlib
import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.experimental import multihost_utils
from jaxtyping import PyTree
from ml_collections import ConfigDict

from diffusion_jax.config.config import OF_THE_MODEL, OF_THE_TRAINING, require_same, to_record
from diffusion_jax.data.dataset import Dataset
from diffusion_jax.data.load import load_dataset
from diffusion_jax.diffusion.schedules.schedule import Schedule
from diffusion_jax.drawing import plots
from diffusion_jax.errors import ConfigError, RunError, WorkdirError
from diffusion_jax.evaluation.evaluate import Evaluator, Trained
from diffusion_jax.evaluation.sums import describe_evaluation
from diffusion_jax.experiment.dataset import create_dataset_choice
from diffusion_jax.experiment.editing import EditedImages, create_edited_images
from diffusion_jax.experiment.evaluation import fit
from diffusion_jax.experiment.experiment import Experiment, create_experiment, require_batches
from diffusion_jax.experiment.sampling import identity_of_samples
from diffusion_jax.experiment.weak import Weak, create_weak
from diffusion_jax.runtime import devices as runtime_devices
from diffusion_jax.runtime.checkpoint import restore_average
from diffusion_jax.runtime.workdir import Workdir
from diffusion_jax.sampling.gallery import Samples, grids_in_training, write_samples
from diffusion_jax.sampling.generator import Generator
from diffusion_jax.training.train import train as train_experiment

LOG = logging.getLogger("diffusion_jax")


def run(mode: str, config: ConfigDict, path: pathlib.Path, command: str) -> int:
    """Run one mode in a folder; ``command`` is the command line, for the record of an ablation.

    Raises:
        ConfigError: a mistake in the config or about the folder; nothing was written.
    """
    try:
        return MODES[mode](config, path, command)
    except WorkdirError as error:
        raise ConfigError(f"--{error}") from error
    except (RunError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1


class _Context(NamedTuple):
    """What a mode of a single run works with, all of it checked."""

    config: ConfigDict
    experiment: Experiment
    workdir: Workdir
    is_there: bool  # a run is in the folder already
    dataset: Dataset
    devices: list[jax.Device]
    weak: Weak | None
    edited: EditedImages | None

    @property
    def card(self) -> pathlib.Path:
        """The picture of the run's schedule."""
        return self.workdir.path / "schedule.png"

    def describe_schedule(self, schedule: Schedule) -> str:
        """The lines that a run prints of its schedule."""
        experiment = self.experiment
        levels, title = experiment.dataset.levels, experiment.schedule_title
        return plots.describe_schedule(schedule, levels, experiment.num_clipped, title)

    def draw_card(self, schedule: Schedule) -> None:
        """Draw the picture of the schedule."""
        experiment = self.experiment
        plots.schedule_card(
            schedule, experiment.dataset.levels, experiment.schedule_title, self.card
        )

    def generator(self) -> Generator:
        """What samples from the run's network, guided by the weaker one if there is one."""
        network = None if self.weak is None else self.weak.network
        return Generator(self.experiment, network, self.devices)


def _open(config: ConfigDict, path: pathlib.Path, batch_size: int, is_training: bool) -> _Context:
    """Start the devices, check the config and the folder, and load the data; writes no run."""
    require_batches(config)
    runtime_devices.start(config.num_devices, batch_size, config.distributed, divide=is_training)
    experiment = create_experiment(config)
    workdir = Workdir(path)
    recorded = workdir.read_record()
    if recorded is not None:
        require_same(config, recorded, OF_THE_TRAINING if is_training else OF_THE_MODEL, path)
    elif not is_training:
        raise WorkdirError(path, "holds no run; train one first")
    return _Context(
        config=config,
        experiment=experiment,
        workdir=workdir,
        is_there=recorded is not None,
        weak=create_weak(config, experiment, path),
        edited=create_edited_images(config, experiment.dataset),
        dataset=load_dataset(create_dataset_choice(config)),
        devices=runtime_devices.select_devices(config.num_devices),
    )


def _begin(context: _Context) -> bool:
    """Hold the folder and say what is used; returns whether this is the process that writes."""
    runtime_devices.start_compilation_cache(context.config.compilation_cache)
    if jax.process_index() != 0:
        return False
    context.workdir.lock()
    runtime_devices.log(context.devices)
    return True


def _wait_for_all() -> None:
    """Several processes end together: one that left early would end the others."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("done")


def train(config: ConfigDict, path: pathlib.Path, command: str) -> int:
    """Train, or go on with, the run in a folder, then sample from it."""
    context = _open(config, path, config.train.batch_size, is_training=True)
    experiment, workdir = context.experiment, context.workdir
    is_writer = _begin(context)
    if is_writer:
        workdir.record(to_record(config))
        if not context.is_there or config.schedule.name != "learned":
            print(context.describe_schedule(experiment.schedule))
        if not context.card.exists():  # a run that goes on has its card already
            context.draw_card(experiment.schedule)
    generator = context.generator()
    every = experiment.training.sample_every_steps
    on_step = grids_in_training(generator, every, workdir.samples)
    state, stopped_by = train_experiment(
        experiment, context.dataset, workdir, context.devices, on_step
    )
    if stopped_by is not None:
        LOG.info("stopped by signal %d after saving step %d", stopped_by, state.step)
        return 128 + stopped_by
    if is_writer:
        _sample(context, generator, runtime_devices.local_copy(state.ema))
    _wait_for_all()
    return 0


def sample(config: ConfigDict, path: pathlib.Path, command: str) -> int:
    """Sample from the run in a folder."""
    context = _open(config, path, config.sampling.batch_size, is_training=False)
    is_writer = _begin(context)
    generator = context.generator()
    ema, step = restore_average(context.experiment.template, path, None)
    LOG.info("sampling from step %d", step)
    if is_writer:
        _sample(context, generator, ema)
    _wait_for_all()
    return 0


def _sample(context: _Context, generator: Generator, ema: PyTree) -> None:
    """Write the samples of a trained network."""
    experiment = context.experiment
    schedule = _trained_schedule(context, ema)
    params = ema, None if context.weak is None else _restore_weak(context.weak)
    samples = Samples(
        generator=generator,
        params=params,
        plan=experiment.sampling,
        schedule=schedule,
        dataset=context.dataset,
        edited=context.edited,
    )
    identity = identity_of_samples(context.config, params, context.edited)
    write_samples(samples, identity, context.workdir.samples)


def _restore_weak(weak: Weak) -> PyTree:
    """The averaged parameters of the weaker network."""
    template = jax.eval_shape(weak.network.model.init, jax.random.key(0))
    try:
        params, step = restore_average(
            template, weak.workdir, weak.step, field="config.guidance.weak_step"
        )
    except WorkdirError as error:
        raise ConfigError(f"config.guidance.weak_{error}") from error
    LOG.info("guided away from step %d of %s", step, weak.workdir)
    return params


def _trained_schedule(context: _Context, ema: PyTree) -> Schedule:
    """The schedule of a trained run, described and drawn if it was learned."""
    schedule = context.experiment.schedule_of(ema)
    if schedule is not context.experiment.schedule:
        print(context.describe_schedule(schedule))
        context.draw_card(schedule)
    return schedule


def evaluate(config: ConfigDict, path: pathlib.Path, command: str) -> int:
    """Evaluate the run in a folder on the test split."""
    context = _open(config, path, config.evaluate.batch_size, is_training=False)
    experiment = context.experiment
    plan = fit(experiment.evaluation, context.dataset.test)
    is_writer = _begin(context)
    ema, step = restore_average(experiment.template, path, None)
    LOG.info("evaluating step %d", step)
    if is_writer:
        schedule = _trained_schedule(context, ema)
        evaluator = Evaluator(experiment.network, plan, context.devices)
        report = evaluator.evaluate(
            Trained(params=ema, step=step, schedule=schedule, seed=experiment.seed),
            context.dataset.test,
            about=experiment.about,
            folder=context.workdir.path,
        )
        print(describe_evaluation(report))
    _wait_for_all()
    return 0


def ablate(config: ConfigDict, path: pathlib.Path, command: str) -> int:
    """Check every arm, then train, evaluate and sample all of them, and report."""
    # imported here: the report's libraries take a second that other modes need not wait for
    from diffusion_jax.ablation import ablate as ablation_of
    from diffusion_jax.ablation.grid import count_jobs, create_ablation
    from diffusion_jax.ablation.jobs import Site
    from diffusion_jax.ablation.slots import SIDE_BY_SIDE

    require_batches(config)
    num_jobs = count_jobs(config)
    side_by_side = config.ablate.parallel in SIDE_BY_SIDE
    side_by_side |= config.ablate.parallel == "auto" and num_jobs >= runtime_devices.count_cores()
    runtime_devices.start(
        config.num_devices,
        config.train.batch_size,
        config.distributed,
        divide=not side_by_side,
        num_jobs=num_jobs if side_by_side else None,
    )
    devices = runtime_devices.select_devices(config.num_devices)
    ablation = create_ablation(config)
    workdir = Workdir(path)
    ablation_of.check(ablation, workdir, devices)
    dataset = load_dataset(create_dataset_choice(config))
    ablation_of.check_data(ablation, dataset)
    runtime_devices.start_compilation_cache(config.compilation_cache)
    workdir.lock(config.ablate.shard)
    runtime_devices.log(devices)
    site = Site(dataset=dataset, path=path, devices=devices)
    stopped_by = ablation_of.ablate(ablation, site, command)
    if stopped_by is not None:
        LOG.info("stopped by signal %d; what was under way is saved", stopped_by)
        return 128 + stopped_by
    return 0


MODES: dict[str, Callable[[ConfigDict, pathlib.Path, str], int]] = {
    "train": train,
    "sample": sample,
    "evaluate": evaluate,
    "ablate": ablate,
}
