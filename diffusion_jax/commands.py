"""The modes of the command line: train, sample, evaluate, ablate.

Every mode checks as much as possible before it writes anything, and returns an exit status.
"""

import contextlib
import logging
import pathlib
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jaxtyping import PyTree
from ml_collections import ConfigDict

from diffusion_jax.config.config import OF_THE_MODEL, OF_THE_TRAINING, require_same, to_record
from diffusion_jax.data.dataset import Dataset
from diffusion_jax.data.load import load_dataset
from diffusion_jax.diffusion.schedules.schedule import Schedule
from diffusion_jax.drawing import plots
from diffusion_jax.errors import ConfigError, RunError, WorkdirError, after_writing
from diffusion_jax.evaluation.evaluate import Evaluator, Trained
from diffusion_jax.evaluation.sums import describe_evaluation
from diffusion_jax.experiment.dataset import create_dataset_choice
from diffusion_jax.experiment.devices import start_devices
from diffusion_jax.experiment.editing import EditedImages, create_edited_images
from diffusion_jax.experiment.evaluation import EvaluationPlan, fit
from diffusion_jax.experiment.experiment import Experiment, create_experiment, require_batches
from diffusion_jax.experiment.sampling import identity_of_samples, require_unset_ends
from diffusion_jax.experiment.training import describe_changes
from diffusion_jax.experiment.weak import Weak, create_weak, is_ahead, restore_weak
from diffusion_jax.runtime import devices as runtime_devices
from diffusion_jax.runtime.checkpoint import restore_average
from diffusion_jax.runtime.compilation import start_cache
from diffusion_jax.runtime.processes import together
from diffusion_jax.runtime.workdir import Workdir
from diffusion_jax.sampling.gallery import Samples, grids_in_training, write_samples
from diffusion_jax.sampling.generator import Generator
from diffusion_jax.training.train import train as train_experiment

LOG = logging.getLogger("diffusion_jax")


def run(mode: str, config: ConfigDict, path: pathlib.Path, command: str) -> int:
    """Run one mode in a folder; an ablation's report shows ``command``, the command line.

    Raises:
        ConfigError: a mistake in the config or the choice of the folder; nothing was written.
    """
    try:
        return MODES[mode](config, path, command)
    except WorkdirError as error:
        raise ConfigError(f"--{error}") from error
    except RunError as error:
        if isinstance(error.__context__, RunError):  # the error that ended the run
            print(f"{type(error.__context__).__name__}: {error.__context__}", file=sys.stderr)
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    except (OSError, ImportError) as error:
        where = Workdir(path).keep_traceback(traceback.format_exc())
        print(f"{type(error).__name__}: {error}{where}", file=sys.stderr)
    return 1


class _Context(NamedTuple):
    """The checked inputs of a mode that works on a single run."""

    config: ConfigDict
    experiment: Experiment
    workdir: Workdir
    recorded: dict[str, Any] | None  # the config of the run that the folder holds already
    dataset: Dataset
    devices: list[jax.Device]
    weak: Weak | None
    edited: EditedImages | None

    @property
    def card(self) -> pathlib.Path:
        """The path of the schedule card, the picture of the run's schedule."""
        return self.workdir.path / "schedule.png"

    def describe_schedule(self, schedule: Schedule) -> str:
        """The summary of the schedule that a run prints."""
        experiment = self.experiment
        levels, title = experiment.dataset.levels, experiment.schedule_title
        return plots.describe_schedule(schedule, levels, experiment.num_clipped, title)

    def draw_card(self, schedule: Schedule) -> None:
        """Draw the schedule card."""
        experiment = self.experiment
        plots.schedule_card(
            schedule, experiment.dataset.levels, experiment.schedule_title, self.card
        )

    def generator(self) -> Generator:
        """The generator of the run's network, guided by the weak network if there is one."""
        network = None if self.weak is None else self.weak.network
        return Generator(self.experiment, network, self.devices)


def _open(config: ConfigDict, path: pathlib.Path, batch_size: int, is_training: bool) -> _Context:
    """Start the devices, check the config and the folder, load the data; writes no run files."""
    require_batches(config)
    devices = start_devices(config, batch_size, divide=is_training)
    with together():
        experiment = create_experiment(config)
        workdir = Workdir(path)
        recorded = workdir.read_record()
        if recorded is not None:
            require_same(config, recorded, OF_THE_TRAINING if is_training else OF_THE_MODEL, path)
        elif not is_training:
            raise WorkdirError(path, "holds no run; train one first")
        if is_training:
            runtime_devices.require_shared_batches(batch_size, devices)
            require_unset_ends(config)
        return _Context(
            config=config,
            experiment=experiment,
            workdir=workdir,
            recorded=recorded,
            weak=create_weak(config, experiment, path),
            edited=create_edited_images(config, experiment.dataset),
            dataset=load_dataset(create_dataset_choice(config)),
            devices=devices,
        )


@contextlib.contextmanager
def _begin(context: _Context) -> Iterator[bool]:
    """Lock the folder and log the devices; yields whether this process writes the files."""
    start_cache(context.config.compilation_cache)
    is_writer = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        with together():
            if is_writer:
                stack.enter_context(context.workdir.lock())
                context.workdir.require_record(context.recorded)
                runtime_devices.log(context.devices)
        yield is_writer


def train(config: ConfigDict, path: pathlib.Path, command: str) -> int:
    """Train the run in a folder, from its newest checkpoint if it has one, then sample from it."""
    context = _open(config, path, config.train.batch_size, is_training=True)
    experiment, workdir = context.experiment, context.workdir
    is_saved_later = is_ahead(context.weak, workdir, experiment.training)
    weak_params = None if is_saved_later else restore_weak(context.weak)
    with _begin(context) as is_writer:
        with together():
            if is_writer:
                _record(context)
        generator = context.generator()
        every = experiment.training.sample_every_steps
        on_step = grids_in_training(generator, every, workdir.samples)
        state, stopped_by = train_experiment(
            experiment, context.dataset, workdir, context.devices, on_step
        )
        if stopped_by is not None:
            LOG.info("stopped by signal %d after saving step %d", stopped_by, state.step)
            with together():  # the first process may still be removing an older checkpoint
                return 128 + stopped_by
        if is_saved_later:
            weak_params = restore_weak(context.weak)
        with together(), after_writing(f"trained to step {state.step}, but not sampled"):
            if is_writer:
                _sample(context, generator, (runtime_devices.local_copy(state.ema), weak_params))
    return 0


def _record(context: _Context) -> None:
    """Write the run's config.json, and print and draw its schedule."""
    config, schedule = context.config, context.experiment.schedule
    for line in describe_changes(config, context.recorded):
        LOG.warning(line)
    context.workdir.record(to_record(config))
    if context.recorded is None or config.schedule.name != "learned":
        print(context.describe_schedule(schedule))
    if not context.card.exists():  # a resumed run has its card
        context.draw_card(schedule)


def sample(config: ConfigDict, path: pathlib.Path, command: str) -> int:
    """Sample from the run in a folder."""
    context = _open(config, path, config.sampling.batch_size, is_training=False)
    weak_params = restore_weak(context.weak)
    with _begin(context) as is_writer:
        ema, step = restore_average(context.experiment.model.template, path, None)
        LOG.info("sampling from step %d", step)
        with together():
            if is_writer:
                _sample(context, context.generator(), (ema, weak_params))
    return 0


def _sample(context: _Context, generator: Generator, params: tuple[PyTree, PyTree]) -> None:
    """Write samples; ``params`` are the parameters of the trained and of the weak network."""
    experiment = context.experiment
    generator.rows(params)  # checks sigma_min and sigma_max before anything is written
    schedule = _trained_schedule(context, params[0])
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


def _trained_schedule(context: _Context, ema: PyTree) -> Schedule:
    """The schedule of a trained run; a learned one is also printed and drawn."""
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
    with _begin(context) as is_writer:
        ema, step = restore_average(experiment.model.template, path, None)
        LOG.info("evaluating step %d", step)
        with together():
            if is_writer:
                _evaluate(context, plan, ema, step)
    return 0


def _evaluate(context: _Context, plan: EvaluationPlan, ema: PyTree, step: int) -> None:
    """Evaluate a trained network, then write and print the results."""
    experiment = context.experiment
    schedule = _trained_schedule(context, ema)
    assert context.dataset.test is not None  # fit refuses a set without it
    report = Evaluator(experiment.network, plan, context.devices).evaluate(
        Trained(params=ema, step=step, schedule=schedule, seed=experiment.seed),
        context.dataset.test,
        about=experiment.about,
        folder=context.workdir.path,
    )
    print(describe_evaluation(report))


def ablate(config: ConfigDict, path: pathlib.Path, command: str) -> int:
    """Check every arm, train, evaluate and sample all of them, and write the report."""
    # imported here, because importing the report's libraries takes a second
    from diffusion_jax.ablation import ablate as ablation_of
    from diffusion_jax.ablation.grid import count_jobs, create_ablation
    from diffusion_jax.ablation.jobs import Site
    from diffusion_jax.ablation.slots import SIDE_BY_SIDE, choose_parallel, choose_way_on_cpu

    require_batches(config)
    num_jobs = count_jobs(config)
    num_devices = config.num_devices or runtime_devices.count_cores()
    way_on_cpu = choose_way_on_cpu(config.ablate.parallel, num_jobs, num_devices)
    side_by_side = way_on_cpu in SIDE_BY_SIDE
    devices = start_devices(
        config,
        config.train.batch_size,
        divide=not side_by_side,
        num_jobs=num_jobs if side_by_side else None,
    )
    ablation = create_ablation(config)
    workdir = Workdir(path)
    parallel = choose_parallel(ablation, way_on_cpu, len(devices))
    ablation_of.check(ablation, workdir, devices, parallel)
    dataset = load_dataset(create_dataset_choice(config))
    ablation_of.check_data(ablation, dataset)
    start_cache(config.compilation_cache)
    with workdir.lock(config.ablate.shard):
        runtime_devices.log(devices)
        site = Site(dataset=dataset, path=path, devices=devices, parallel=parallel)
        stopped_by = ablation_of.ablate(ablation, site, command)
    if stopped_by is not None:
        LOG.info("stopped by signal %d after saving the jobs under way", stopped_by)
        return 128 + stopped_by
    return 0


MODES: dict[str, Callable[[ConfigDict, pathlib.Path, str], int]] = {
    "train": train,
    "sample": sample,
    "evaluate": evaluate,
    "ablate": ablate,
}
