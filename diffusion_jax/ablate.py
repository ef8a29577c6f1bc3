"""The jobs of an ablation: trained by one compiled step, scored by one compiled evaluation.

A job is a training run like any other, in a folder of its own, arms/ARM/seed_N: what `--mode=train`
would do with the arm's config, checkpoint for checkpoint. Jobs that share the static choices share
the compiled step, of which the schedule, the seed and the state are arguments.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import pathlib
import platform
import shutil
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, PyTree

from diffusion_jax import data, devices, evaluate, quality, results, schedules
from diffusion_jax.checkpoint import restore_average, saved_steps
from diffusion_jax.comparison import Interval
from diffusion_jax.config import ConfigError, RunError, require
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
from diffusion_jax.turns import Turn, take_turns
from diffusion_jax.workdir import OF_THE_TRAINING, Workdir

LOG = logging.getLogger("diffusion_jax")

# What the figures of a job are read from.
SCORED_FILES = (
    "metrics.jsonl",
    "evaluation.json",
    "evaluation.csv",
    "evaluation.npz",
    "samples/samples.npz",
)
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
        def stack(*leaves: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
            # on the host, but for keys: there may be more than one device holds
            module = jnp if jnp.issubdtype(leaves[0].dtype, jax.dtypes.prng_key) else np
            return module.stack(leaves).reshape(*shape, *leaves[0].shape)

        return devices.divide(jax.tree.map(stack, *trees), used)

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
        axis_name="device",  # that of what ``put`` makes: by another, the second call would compile
        in_axes=(0, 0, 0, None, 0),
        out_axes=0,
        devices=used,
        donate_argnums=0,
    )
    num = len(used) * per_device
    return Slots(num, compiled, np.arange(batch_size), put, put_batches, get)


def choose_parallel(
    parallel: str, arms_per_device: int | None, num_jobs: int, num_devices: int
) -> tuple[str, int]:
    """How jobs run, and how many on a device; "auto" is what is fastest.

    On a CPU an arm on each device is, save where there are fewer arms than devices: no device waits
    for another (docs/RESULTS.md). On an accelerator, which a small model does not fill, vmap should
    be; that is not measured yet.
    """
    chosen = parallel
    if parallel == "auto":
        on_cpu = "device" if num_jobs >= num_devices else "sequence"
        chosen = on_cpu if jax.default_backend() == "cpu" else "vmap"
    if chosen != "vmap":
        return chosen, 1
    most = -(-num_jobs // num_devices)
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
        folder_of(job, folder.path).check(job.config, (*OF_THE_TRAINING, "train.num_steps"))
    parallel, per_device = _parallel(ablation, used)
    size = ablation.jobs[0].experiment.training.batch_size
    if parallel == "sequence":
        allowed = f"a multiple of the {len(used)} devices"
        require(size % len(used) == 0, "config.train.batch_size", size, allowed)
    check_room(ablation.mine, folder.path, per_device)


def check_data(ablation: Ablation, dataset: data.Dataset) -> None:
    """Refuse what the data cannot be evaluated or compared by, before anything is trained.

    Raises:
        ConfigError: more test images than there are, no test split, or no labels in it.
    """
    for job in ablation.jobs:
        evaluate.fit(job.experiment.evaluation, dataset.test)
    try:
        quality.check(dataset)
    except ValueError as error:
        raise ConfigError(f"config.dataset.name = {dataset.name!r}: {error}") from error


def ablate(
    ablation: Ablation,
    dataset: data.Dataset,
    folder: Workdir,
    used: list[jax.Device],
    command: str,
) -> int | None:
    """Train and score what is missing, and report; returns the signal that stopped the training.

    A shard does its share and leaves the report to a call without one.

    Raises:
        FailedJobsError: naming jobs that failed, after a report without their arms.
    """
    parallel, per_device = _parallel(ablation, used)
    missing = [job for job in ablation.mine if not is_finished(job, folder.path)]
    arms = len({job.arm.name for job in ablation.jobs})
    note = f"{len(ablation.mine)} jobs, {len(ablation.mine) - len(missing)} finished"
    LOG.info("%d arms, %s; %s, %d at once on a device", arms, note, parallel, per_device)
    failed: dict[str, str] = {}  # by the names of jobs
    stopped_by = train_jobs(missing, parallel, per_device, dataset, folder.path, used, failed)
    if stopped_by is not None:
        return stopped_by
    trained = [job for job in missing if title_of(job) not in failed]
    score_jobs(trained, dataset, folder.path, used, command, failed)
    if ablation.is_shard:
        LOG.info("this share is done; when all are, the command without a shard reports")
    else:
        lost = {job.arm.name for job in ablation.jobs if title_of(job) in failed}
        kept = tuple(job for job in ablation.jobs if job.arm.name not in lost)
        if ablation.reference not in lost:
            report(ablation._replace(jobs=kept), dataset, folder.path, command, sorted(lost))
    if failed:
        raise FailedJobsError("; ".join(f"{name}: {error}" for name, error in failed.items()))
    return None


def report(
    ablation: Ablation, dataset: data.Dataset, path: pathlib.Path, command: str, lost: list[str]
) -> None:
    """Compare the finished jobs: ablation.csv and report.html. ``lost`` are arms that failed."""
    classifier = quality.load_classifier(dataset, 0, path)

    def all_of(fact: Callable[[Job], str]) -> str:
        return "; ".join(dict.fromkeys(fact(job) for job in ablation.jobs))

    def parameters(job: Job) -> str:
        params = jax.eval_shape(job.experiment.model.init, jax.random.key(0))
        return f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,}"

    def bound(job: Job) -> str:
        plan = evaluate.fit(job.experiment.evaluation, dataset.test)
        whole = len(job.experiment.schedule)
        return f"{plan.num_examples} test images, each at {plan.num_timesteps} timesteps of {whole}"

    def samples(job: Job) -> str:
        plan, name = job.experiment.sampling, job.config.sampling.sampler
        chain = f"{plan.chain.num_steps} steps, {plan.chain.spacing}"
        return f"{plan.num_images} of each job, {name}, {chain}"

    config = ablation.jobs[0].config
    facts = {
        "parameters of the network": all_of(parameters),
        "training": f"{config.train.num_steps:,} steps of {config.train.batch_size}",
        "bound": all_of(bound),
        "samples": all_of(samples),
        "classifier": f"{100 * classifier.test_accuracy:.2f} % of the test images right",
    }
    notes = [f"{name} failed and is left out." for name in lost]
    records = [json.loads(_record_of(job, path).read_text()) for job in ablation.jobs]
    if any(record["versions"] != versions() for record in records):
        notes.append("Some jobs were scored under other versions: see their finished.json.")
    folders = [folder_of(job, path).path for job in ablation.jobs]
    found = results.collect(
        ablation, folders, path, dataset, classifier, command, versions(), facts, notes
    )
    write_csv(found, path / "ablation.csv")
    write_report(found, path / "report.html")
    print(describe(found))
    LOG.info("%s", path / "report.html")


def versions() -> dict[str, str]:
    """Of the libraries that figures may depend on, and what they run on."""
    names = ("diffusion_jax", "jax", "jaxlib", "flax", "optax", "numpy")
    found = {name: importlib.metadata.version(name) for name in names}
    device = f"{jax.local_device_count()} {jax.devices()[0].device_kind}"
    return found | {"python": platform.python_version(), "devices": device}


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
    return choose_parallel(
        ablation.parallel, ablation.arms_per_device, len(ablation.mine), len(used)
    )


def _record_of(job: Job, path: pathlib.Path) -> pathlib.Path:
    return folder_of(job, path).path / "finished.json"


def is_finished(job: Job, path: pathlib.Path) -> bool:
    """Whether the job is trained, evaluated and sampled from by this very config.

    Its files must be those that were scored then: a run of another mode in its folder may have
    written others.
    """
    record = _record_of(job, path)
    if not record.exists():
        return False
    try:
        found = json.loads(record.read_text())
        return found["config_hash"] == job.config_hash and found["files"] == _digests(record.parent)
    except (ValueError, KeyError, OSError) as error:
        LOG.warning("%s: %r; scoring anew", record, error)
        return False


def _digests(folder: pathlib.Path) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in SCORED_FILES}


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
    missing = [job for job in jobs if not folder_of(job, path).checkpoints.exists()]
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
    failed: dict[str, str],
) -> int | None:
    """Train every job to its end, from its newest checkpoint if there is one.

    Jobs with other static choices have a step of their own, and run after the others. Those that
    fail are put into ``failed``, and stop no other.

    Returns the signal that stopped it early, if one did: then every run under way is saved.
    """
    with contextlib.closing(Stop()) as stop:
        for group in group_jobs(jobs):
            places = min(per_device, -(-len(group) // len(used)))
            slots = create_slots(parallel, places, group, dataset.levels, used)
            training = _Training(group, slots, dataset, path, used, failed)
            with contextlib.closing(training):
                stopping = False
                while not stopping and training.fill():
                    stopping = training.advance(stop)
            if stop.signal is not None:
                break
        return stop.signal


class _Training:
    """Jobs that share one compiled step; a slot whose run has ended takes the next turn."""

    def __init__(
        self,
        jobs: Sequence[Job],
        slots: Slots,
        dataset: data.Dataset,
        path: pathlib.Path,
        used: list[jax.Device],
        failed: dict[str, str],
    ) -> None:
        self._failed = failed
        self._slots, self._dataset, self._path = slots, dataset, path
        self._jobs = jobs
        plans = [job.experiment.training for job in jobs]
        saved = [saved_steps(folder_of(job, path).checkpoints) for job in jobs]
        self._waiting = take_turns(
            done=[max(steps, default=0) for steps in saved],
            lengths=[plan.num_steps for plan in plans],
            num_slots=slots.num,
            multiple=plans[0].checkpoint_every_steps,
        )
        self._length = max(len(job.experiment.schedule) for job in jobs)
        self._steps_per_call, self._in_flight = pace(jobs[0].experiment.training, used)
        self._runs: dict[int, tuple[Turn, Run]] = {}  # by slot
        self._ended: dict[int, Run] = {}  # whose last save may go on, by the number of the job
        self._constants: list[PyTree] = [None] * slots.num  # a schedule and a key
        self._inputs: PyTree = None  # state, schedule and key of every slot, on the devices

    def fill(self) -> bool:
        """Open waiting jobs in the slots that are free; returns whether any run is under way."""
        new = {}
        for slot in range(self._slots.num):
            while slot not in self._runs and (turn := self._next_turn()) is not None:
                job = self._jobs[turn.index]
                if turn.index in self._ended:
                    self._ended.pop(turn.index).close()
                try:
                    run = self._open(job, slot)
                except (RunError, ConfigError) as error:  # no intact checkpoint, or it is in use
                    _fail(job, error, self._failed)
                    continue
                if run.is_done:
                    run.close()
                    continue
                schedule = schedules.pad(job.experiment.schedule, self._length)
                self._constants[slot] = schedule, noise_key(job.seed)
                self._runs[slot], new[slot] = (turn, run), run.state
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

    def _next_turn(self) -> Turn | None:
        """The first that waits, but for those of jobs that still have their turn."""
        names = [title_of(job) for job in self._jobs]
        self._waiting = [t for t in self._waiting if names[t.index] not in self._failed]
        taken = {turn.index for turn, _ in self._runs.values()}
        free = next((turn for turn in self._waiting if turn.index not in taken), None)
        if free is not None:
            self._waiting.remove(free)
        return free

    def _open(self, job: Job, slot: int) -> Run:
        plan, folder = job.experiment.training, folder_of(job, self._path)
        folder.lock()
        folder.record(job.config)
        # by the functions of the first, which are the same and have been compiled
        first, length = self._jobs[0].experiment, len(job.experiment.schedule)
        choices = first.model, first.training.optimizer, first.objective.timesteps
        fresh = init_state(*choices, length, job.seed)
        read = functools.partial(self._slots.get, slot)
        title = title_of(job)
        journal = functools.partial(Journal, max_in_flight=self._in_flight, read=read, name=title)
        waiting = len({turn.index for turn in self._waiting})
        LOG.info("training %s; %d more are waiting", title, waiting)
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
        self._close_ended()  # while the devices work
        stopping = stop.asked(0)
        for slot, (turn, run) in tuple(self._runs.items()):
            try:
                run.took(num_steps, metrics)
                if stopping or run.is_checkpoint_due:
                    run.save(self._slots.get(slot, state))
                ended = run.step >= turn.until  # saved, for turns end with a checkpoint
            except NonFiniteLossError as error:
                _fail(self._jobs[turn.index], error, self._failed)
                ended = True
            if ended:
                self._ended[turn.index] = self._runs.pop(slot)[1]
        return stopping

    def _close_ended(self) -> None:
        while self._ended:
            self._ended.popitem()[1].close()

    def close(self) -> None:
        """Let go of the runs that are under way or have ended, of all even if one fails."""
        with contextlib.ExitStack() as stack:
            for run in [*self._ended.values(), *(run for _, run in self._runs.values())]:
                stack.callback(run.close)


def _fail(job: Job, error: Exception, failed: dict[str, str]) -> None:
    LOG.error("%s: %s", title_of(job), error)
    failed[title_of(job)] = str(error)


def score_jobs(
    jobs: Sequence[Job],
    dataset: data.Dataset,
    path: pathlib.Path,
    used: list[jax.Device],
    command: str,
    failed: dict[str, str],
) -> None:
    """Evaluate and sample from every trained job, with one compilation for those of one T.

    The noise of an evaluation and of samples depends on the seed alone. Jobs that fail are put
    into ``failed``.
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
            LOG.info("scoring %s, %d of %d", title_of(job), number, len(group))
            try:
                _score(job, dataset, path, evaluator, generator, command)
            except (RunError, ConfigError) as error:  # not finite, or in use
                _fail(job, error, failed)


def _score(
    job: Job,
    dataset: data.Dataset,
    path: pathlib.Path,
    evaluator: Evaluator,
    generator: Generator,
    command: str,
) -> None:
    experiment, workdir = job.experiment, folder_of(job, path)
    workdir.lock()
    ema, step = restore_average(experiment.model, "--workdir", workdir.path, None)
    if step != experiment.training.num_steps:
        raise RunError(f"its newest checkpoint is of step {step}")
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
    record = {
        "config_hash": job.config_hash,
        "step": step,
        "files": _digests(workdir.path),
        "versions": versions(),
        "command": command,
    }
    temporary = workdir.path / "finished.tmp"
    temporary.write_text(json.dumps(record, indent=2) + "\n")
    os.replace(temporary, _record_of(job, path))
