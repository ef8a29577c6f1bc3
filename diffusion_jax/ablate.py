"""The jobs of an ablation: trained by one compiled step, scored by one compiled evaluation.

A job is a training run like any other, in a folder of its own, arms/ARM/seed_N: what `--mode=train`
would do with the arm's config, checkpoint for checkpoint. Jobs that share the static choices share
the compiled step, of which the schedule, the seed and the state are arguments.
"""

import functools
import importlib.metadata
import json
import logging
import os
import pathlib
import platform
import shutil
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, PyTree

from diffusion_jax import data, devices, evaluate, quality, results, schedules
from diffusion_jax.checkpoint import restore_average
from diffusion_jax.comparison import Interval
from diffusion_jax.config import RunError, require
from diffusion_jax.evaluate import Evaluator
from diffusion_jax.experiment import create_job
from diffusion_jax.gallery import write_samples
from diffusion_jax.generate import Generator, Network
from diffusion_jax.grid import Ablation, Job
from diffusion_jax.journal import Journal, NonFiniteLossError
from diffusion_jax.report import write_csv, write_report
from diffusion_jax.results import Results
from diffusion_jax.stop import Stop
from diffusion_jax.train import (
    ALONE,
    BETWEEN_DEVICES,
    Batch,
    Run,
    Steps,
    compile_steps,
    init_state,
    noise_key,
    pace,
    several_steps,
    spread,
    train_step,
)
from diffusion_jax.workdir import OF_THE_TRAINING, Workdir

LOG = logging.getLogger("diffusion_jax")

SIDE_BY_SIDE = ("device", "vmap")  # every device has whole batches
MAX_ARMS_PER_DEVICE = 8  # of vmap, where the config leaves it open


class FailedJobsError(RunError):
    """Some jobs could not be trained; the others are."""


class Slots(NamedTuple):
    """Places for runs that train at once, and how their arrays get to the devices and back."""

    num: int
    steps: Steps
    indices: Int[np.ndarray, "devices ..."]
    put: Callable[[Sequence[PyTree]], PyTree]  # a tree for each slot to what ``steps`` takes
    put_batches: Callable[[Sequence[Batch]], Batch]
    get: Callable[[int, PyTree], PyTree]  # the part of one slot, copied to the host


def one_by_one(step: Steps, batch_size: int, used: list[jax.Device]) -> Slots:
    """One slot: the batch is divided among all devices, as in training."""
    return Slots(
        num=1,
        steps=compile_steps(step, used),
        indices=np.arange(batch_size).reshape(len(used), -1),
        put=lambda trees: devices.replicate(trees[0], used),
        put_batches=lambda batches: spread(batches[0], len(used)),
        get=lambda slot, tree: devices.local_copy(tree),
    )


def side_by_side(step: Steps, batch_size: int, used: list[jax.Device], per_device: int) -> Slots:
    """Slots on every device, each with a whole batch: leaves are [device, slot there, ...]."""
    steps = several_steps(step)
    if per_device > 1:
        of_device = jax.vmap(steps, in_axes=(0, 0, 0, None, 0))
    else:

        def of_device(
            state: PyTree, schedule: PyTree, key: PyTree, indices: PyTree, batches: Batch
        ) -> PyTree:
            # not vmapped: over weights that makes grouped convolutions, which are slow
            one = jax.tree.map(lambda leaf: leaf[0], (state, schedule, key, batches))
            found = steps(*one[:3], indices, one[3])
            return jax.tree.map(lambda leaf: leaf[None], found)

    shape = len(used), per_device

    def put(trees: Sequence[PyTree]) -> PyTree:
        stacked = jax.tree.map(
            lambda *leaves: jnp.stack(leaves).reshape(*shape, *leaves[0].shape), *trees
        )
        return devices.divide(stacked, used)

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
        of_device, in_axes=(0, 0, 0, None, 0), out_axes=0, devices=used, donate_argnums=0
    )
    num = len(used) * per_device
    return Slots(num, compiled, np.arange(batch_size), put, put_batches, get)


def choose_parallel(parallel: str, arms_per_device: int | None, num_jobs: int) -> tuple[str, int]:
    """How jobs run, and how many on a device; "auto" is what is fastest.

    On a CPU an arm on each device is, save where there are fewer arms than devices, by 15 % for
    the digits (docs/RESULTS.md). On an accelerator, which a small model does not fill, vmap should
    be; that is not measured yet.
    """
    chosen = parallel
    if parallel == "auto":
        on_cpu = "device" if num_jobs >= jax.local_device_count() else "sequence"
        chosen = on_cpu if jax.default_backend() == "cpu" else "vmap"
    if chosen != "vmap":
        return chosen, 1
    most = -(-num_jobs // jax.local_device_count())
    return chosen, min(most, arms_per_device or MAX_ARMS_PER_DEVICE)


def create_slots(
    parallel: str, per_device: int, jobs: Sequence[Job], levels: int, used: list[jax.Device]
) -> Slots:
    """The slots of jobs that have their static choices in common."""
    experiment = jobs[0].experiment
    plan, timesteps = experiment.training, experiment.objective.timesteps
    exchange = BETWEEN_DEVICES if parallel == "sequence" else ALONE
    choices = experiment.batch_losses, timesteps, plan, levels, exchange
    step = functools.partial(train_step, *choices)
    if parallel == "sequence":
        return one_by_one(step, plan.batch_size, used)
    return side_by_side(step, plan.batch_size, used, per_device)


def folder_of(job: Job, path: pathlib.Path) -> Workdir:
    """Where a job lies in the folder of an ablation."""
    return Workdir(Workdir(path).arms / job.arm.name / f"seed_{job.seed}")


def title_of(job: Job) -> str:
    """What a job is called in what a run prints."""
    return f"{job.arm.name}, seed {job.seed}"


def check(ablation: Ablation, folder: Workdir, used: list[jax.Device]) -> None:
    """Refuse what cannot be run, before anything is written.

    Raises:
        ConfigError: the folder is of a single run, a job was begun with another config, a batch
            that does not divide, or more arms than fit.
    """
    require(
        not folder.checkpoints.exists(),
        "--workdir",
        str(folder.path),
        "a folder for an ablation: a single run is in it",
    )
    for job in ablation.jobs:
        folder_of(job, folder.path).check(job.config, OF_THE_TRAINING)
    parallel, per_device = _parallel(ablation, used)
    size = ablation.jobs[0].experiment.training.batch_size
    if parallel == "sequence":
        allowed = f"a multiple of the {len(used)} devices"
        require(size % len(used) == 0, "config.train.batch_size", size, allowed)
    check_room(ablation.mine, folder.path, per_device)


def ablate(
    ablation: Ablation,
    dataset: data.Dataset,
    folder: Workdir,
    used: list[jax.Device],
    command: str,
) -> int | None:
    """Train and score what is missing, and report; returns the signal that stopped the training.

    A shard does its share and leaves the report to a call without one.
    """
    parallel, per_device = _parallel(ablation, used)
    missing = [job for job in ablation.mine if not is_finished(job, folder.path)]
    arms = len({job.arm.name for job in ablation.jobs})
    note = f"{len(ablation.jobs)} jobs, {len(ablation.mine) - len(missing)} finished"
    LOG.info("%d arms, %s; %s, %d at once on a device", arms, note, parallel, per_device)
    stopped_by = train_jobs(missing, parallel, per_device, dataset, folder.path, used)
    if stopped_by is not None:
        return stopped_by
    score_jobs(missing, dataset, folder.path, used)
    if ablation.is_shard:
        LOG.info("this share is done; when all are, the command without a shard reports")
        return None
    report(ablation, dataset, folder.path, command)
    return None


def report(ablation: Ablation, dataset: data.Dataset, path: pathlib.Path, command: str) -> None:
    """Compare the finished jobs: ablation.csv and report.html."""
    classifier = quality.load_classifier(dataset, 0, path)
    experiment, config = ablation.jobs[0].experiment, ablation.jobs[0].config
    params = jax.eval_shape(experiment.model.init, jax.random.key(0))
    evaluation = evaluate.fit(experiment.evaluation, dataset.test)
    chain = experiment.sampling.chain
    facts = {
        "parameters of the network": f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,}",
        "training": f"{config.train.num_steps:,} steps of {config.train.batch_size}",
        "bound": f"{evaluation.num_examples} test images, each at {evaluation.num_timesteps}"
        f" timesteps of {len(experiment.schedule)}",
        "samples of each job": f"{experiment.sampling.num_images}, {config.sampling.sampler},"
        f" {chain.num_steps} steps, {chain.spacing}",
        "classifier": f"{100 * classifier.test_accuracy:.2f} % of the test images right",
    }
    names = ("jax", "jaxlib", "flax", "optax", "numpy")
    versions = {name: importlib.metadata.version(name) for name in names}
    versions |= {
        "diffusion_jax": importlib.metadata.version("diffusion_jax"),
        "python": platform.python_version(),
        "devices": f"{jax.local_device_count()} {jax.devices()[0].device_kind}",
    }
    folders = [folder_of(job, path).path for job in ablation.jobs]
    found = results.collect(ablation, folders, path, dataset, classifier, command, versions, facts)
    write_csv(found, path / "ablation.csv")
    write_report(found, path / "report.html")
    print(describe(found))
    LOG.info("%s", path / "report.html")


def describe(found: Results) -> str:
    """The table of arms, as lines that a run prints."""
    lines = []
    for name, (title, unit) in results.FIGURES.items():
        lines.append(f"{title} ({unit}) with 95 % intervals, and the paired difference")
        for arm in found.arms:
            mean, difference, mark = arm.figures[name]
            text = f"  {arm.name:24} {mean.value:9.4f} {_ends(mean)}  "
            if difference is None:
                text += "the reference"
            else:
                text += f"{difference.value:+.4f} {_ends(difference)}"
            lines.append(f"{text}  {mark}".rstrip())
    return "\n".join(lines)


def _ends(interval: Interval) -> str:
    if np.isinf(interval.low):
        return "[no interval of one seed]"
    return f"[{interval.low:.4f}, {interval.high:.4f}]"


def _parallel(ablation: Ablation, used: list[jax.Device]) -> tuple[str, int]:
    return choose_parallel(ablation.parallel, ablation.arms_per_device, len(ablation.mine))


def is_finished(job: Job, path: pathlib.Path) -> bool:
    """Whether the job is trained, evaluated and sampled from, by this very config."""
    record = folder_of(job, path).path / "finished.json"
    return record.exists() and json.loads(record.read_text())["config_hash"] == job.config_hash


def check_room(jobs: Sequence[Job], path: pathlib.Path, per_device: int) -> None:
    """Refuse more arms than fit: their states into the memory, their checkpoints onto the disk.

    Raises:
        ConfigError: they do not.
    """
    largest = 0
    for group in group_jobs(jobs):
        experiment, seed = group[0].experiment, group[0].seed
        plan, timesteps = experiment.training, experiment.objective.timesteps
        length = len(experiment.schedule)
        state = jax.eval_shape(
            lambda: init_state(experiment.model, plan.optimizer, timesteps, length, seed)  # noqa: B023
        )
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        largest = max(largest, size)
    statistics = jax.local_devices()[0].memory_stats() or {}
    memory = statistics.get("bytes_limit")
    if memory is None:  # a CPU, whose devices share it
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        memory //= jax.local_device_count()
    allowed = f"at most {memory // largest}: a state has {largest:,} bytes, a device {memory:,}"
    field = "config.ablate.arms_per_device"
    require(per_device * largest <= memory, field, per_device, allowed)
    missing = [job for job in jobs if not is_finished(job, path)]
    existing = next(
        folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists()
    )
    free = shutil.disk_usage(existing).free
    kept = sum(jobs[0].config.checkpoint[name] for name in ("keep_last", "keep_best"))
    needed = len(missing) * kept * largest
    allowed = f"fewer: {kept} checkpoints of each need {needed:,} bytes, {existing} has {free:,}"
    require(needed <= free, "config.ablate.grid", f"{len(missing)} jobs", allowed)


def group_jobs(
    jobs: Sequence[Job], also: Callable[[Job], object] = lambda job: None
) -> list[list[Job]]:
    """Together the jobs that have all static choices in common, and what ``also`` says of them."""
    groups: dict[object, list[Job]] = {}
    for job in jobs:
        groups.setdefault((job.static_choices, also(job)), []).append(job)
    return list(groups.values())


def train_jobs(
    jobs: Sequence[Job],
    parallel: str,
    per_device: int,
    dataset: data.Dataset,
    path: pathlib.Path,
    used: list[jax.Device],
) -> int | None:
    """Train every job to its end, from its newest checkpoint if there is one.

    Returns the signal that stopped it early, if one did: then every run under way is saved.

    Raises:
        FailedJobsError: naming those whose loss was not finite, when all others are trained.
    """
    failed: list[str] = []
    with closing(Stop()) as stop:
        for group in group_jobs(jobs):
            slots = create_slots(parallel, per_device, group, dataset.levels, used)
            with closing(_Training(group, slots, dataset, path, used)) as training:
                stopping = False
                while not stopping and training.fill():
                    stopping = training.advance(stop)
                failed += training.failed
            if stopping:
                return stop.signal
    if failed:
        raise FailedJobsError("; ".join(failed))
    return None


class _Training:
    """Jobs that share one compiled step; a slot whose run has ended takes the next."""

    def __init__(
        self,
        jobs: Sequence[Job],
        slots: Slots,
        dataset: data.Dataset,
        path: pathlib.Path,
        used: list[jax.Device],
    ) -> None:
        self.failed: list[str] = []
        self._waiting = deque(jobs)
        self._slots, self._dataset, self._path = slots, dataset, path
        self._length = max(len(job.experiment.schedule) for job in jobs)
        self._steps_per_call, self._in_flight = pace(jobs[0].experiment.training, used)
        self._runs: dict[int, tuple[Job, Run]] = {}  # by slot
        self._constants: list[PyTree] = [None] * slots.num  # a schedule and a key
        self._inputs: PyTree = None  # state, schedule and key of every slot, on the devices

    def fill(self) -> bool:
        """Open waiting jobs in the slots that are free; returns whether any run is under way."""
        new = {}
        for slot in range(self._slots.num):
            while slot not in self._runs and self._waiting:
                job = self._waiting.popleft()
                run = self._open(job, slot)
                if run.is_done:
                    run.close()
                    continue
                schedule = schedules.pad(job.experiment.schedule, self._length)
                self._constants[slot] = schedule, noise_key(job.seed)
                self._runs[slot], new[slot] = (job, run), run.state
        if new:
            # a slot that stays free works on a copy of another, and nobody looks
            donor = next(iter(new))
            states, constants = [], []
            for slot in range(self._slots.num):
                is_kept = slot in self._runs and slot not in new
                state = self._slots.get(slot, self._inputs[0]) if is_kept else None
                states.append(state if is_kept else new.get(slot, new[donor]))
                constants.append(self._constants[slot if slot in self._runs else donor])
            trees = [(state, *constant) for state, constant in zip(states, constants)]
            self._inputs = self._slots.put(trees)
        return bool(self._runs)

    def _open(self, job: Job, slot: int) -> Run:
        experiment, folder = job.experiment, folder_of(job, self._path)
        folder.lock()
        folder.record(job.config)
        plan, timesteps = experiment.training, experiment.objective.timesteps
        length = len(experiment.schedule)
        fresh = init_state(experiment.model, plan.optimizer, timesteps, length, job.seed)
        read = functools.partial(self._slots.get, slot)
        title = title_of(job)
        journal = functools.partial(Journal, max_in_flight=self._in_flight, read=read, name=title)
        LOG.info("training %s; %d more are waiting", title, len(self._waiting))
        return Run(plan, fresh, job.seed, self._dataset, folder, journal)

    def advance(self, stop: Stop) -> bool:
        """Take steps in every slot, to the first end of a call; save and end what is due.

        Returns whether to stop now, when everything is saved.
        """
        num_steps = min(run.steps_to(self._steps_per_call) for _, run in self._runs.values())
        batches = {slot: run.batches(num_steps) for slot, (_, run) in self._runs.items()}
        donor = next(iter(batches))
        batches = [batches.get(slot, batches[donor]) for slot in range(self._slots.num)]
        batches = self._slots.put_batches(batches)
        state, schedule, key = self._inputs
        state, metrics = self._slots.steps(state, schedule, key, self._slots.indices, batches)
        self._inputs = state, schedule, key
        stopping = stop.asked(0)
        for slot, (job, run) in tuple(self._runs.items()):
            try:
                run.took(num_steps, metrics)
                if stopping or run.is_checkpoint_due:
                    run.save(self._slots.get(slot, state))
                ended = run.is_done
            except NonFiniteLossError as error:
                LOG.error("%s: %s", title_of(job), error)
                self.failed.append(f"{title_of(job)}: {error}")
                ended = True
            if ended:
                self._runs.pop(slot)
                run.close()
        return stopping

    def close(self) -> None:
        """Let go of the runs that are under way."""
        for _, run in self._runs.values():
            run.close()


def score_jobs(
    jobs: Sequence[Job], dataset: data.Dataset, path: pathlib.Path, used: list[jax.Device]
) -> None:
    """Evaluate and sample from every trained job, with one compilation for those of one T.

    Images and noise of an evaluation, and the noise of samples, depend on the seed alone.
    """
    for group in group_jobs(jobs, lambda job: len(job.experiment.schedule)):
        first = group[0].experiment
        plan = evaluate.fit(first.evaluation, dataset.test)
        evaluator = Evaluator(first.model, first.objective, plan, used)
        generator = Generator(
            Network(first.model, first.objective),
            None,
            first.dataset,
            first.schedule_of,
            first.sampling,
            first.seed,
            used,
        )
        for number, job in enumerate(group, start=1):
            experiment, workdir = job.experiment, folder_of(job, path)
            LOG.info("scoring %s, %d of %d", title_of(job), number, len(group))
            ema, step = restore_average(experiment.model, "--workdir", workdir.path, None)
            schedule = experiment.schedule_of(ema)
            fields = job.config.loss
            about = {name: fields[name] for name in ("prediction", "weighting", "variance")}
            about["schedule"] = experiment.schedule_title
            evaluator.evaluate(schedule, job.seed, ema, step, dataset.test, about, workdir.path)
            params = ema, None
            write_samples(
                generator.of_schedule(experiment.schedule_of, job.seed),
                params,
                experiment.sampling,
                schedule,
                dataset,
                None,
                create_job(job.config, params, None),
                workdir.samples,
            )
            record = workdir.path / "finished.json"
            temporary = record.with_suffix(".tmp")
            temporary.write_text(json.dumps({"config_hash": job.config_hash, "step": step}) + "\n")
            os.replace(temporary, record)
