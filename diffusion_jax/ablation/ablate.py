"""An ablation: train every job, score it, and report how the arms differ.

A job is one arm with one seed: a training run in its own folder, arms/ARM/seed_N. Up to rounding,
its checkpoints are those of `--mode=train` with the arm's config. Jobs with equal static choices
share one compiled step; the schedule, the seed and the state are arguments of the step.
"""

import json
import logging
import os
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from diffusion_jax.ablation.collecting import About, collect
from diffusion_jax.ablation.jobs import (
    Ablation,
    FailedJobsError,
    Job,
    Parallel,
    Site,
    folder_of,
    group_jobs,
    is_finished,
    record_of,
    title_of,
    versions,
)
from diffusion_jax.ablation.report.page import write_csv, write_report
from diffusion_jax.ablation.results import SCORES, Results
from diffusion_jax.ablation.scoring import score_jobs
from diffusion_jax.ablation.training import train_jobs
from diffusion_jax.config.config import OF_THE_TRAINING, require_same
from diffusion_jax.config.default import Effect
from diffusion_jax.data.dataset import Dataset
from diffusion_jax.errors import ConfigError, WorkdirError, require
from diffusion_jax.evaluation.classifier import (
    Classifier,
    load_classifier,
    require_labelled_images,
)
from diffusion_jax.evaluation.interval import Interval
from diffusion_jax.experiment.evaluation import fit
from diffusion_jax.runtime.devices import require_shared_batches
from diffusion_jax.runtime.workdir import Workdir
from diffusion_jax.training.step import init_state

LOG = logging.getLogger("diffusion_jax")

# Of benchmarks.coverage, see docs/RESULTS.md.
SKEWED = (
    "The bound takes some timesteps of each image. Its terms are skewed, so intervals of few "
    "images are too narrow: in simulations with 50 timesteps, 95 % intervals contained the bound "
    "in 79 % of cases with 10 images, 93 % with 100 and 95 % with 300."
)


def check(
    ablation: Ablation, folder: Workdir, devices: list[jax.Device], parallel: Parallel
) -> None:
    """Refuse an ablation that cannot run, before anything is written.

    Raises:
        ConfigError: the folder holds a single run, a job was started with another config, the
            devices cannot share a batch evenly, or the memory or the disk is too small.
    """
    if folder.checkpoints.exists():
        raise WorkdirError(folder.path, "must be a folder for an ablation: a single run is in it")
    for job in ablation.jobs:
        of_job = folder_of(job, folder.path)
        recorded = of_job.read_record()
        if recorded is not None:
            fixed = OF_THE_TRAINING | {Effect.LENGTH}
            require_same(job.config, recorded, fixed, of_job.path)
    if parallel.way == "sequence":
        require_shared_batches(ablation.jobs[0].experiment.training.batch_size, devices)
    check_room(ablation.mine, folder.path, parallel.per_device)


def check_data(ablation: Ablation, dataset: Dataset) -> None:
    """Refuse a data set on which models cannot be evaluated or samples cannot be scored.

    Raises:
        ConfigError: there is no test split, it has too few images, or the set has no labels to
            train the classifier on.
    """
    for job in ablation.jobs:
        fit(job.experiment.evaluation, dataset.test)
    try:
        require_labelled_images(dataset)
    except ValueError as error:
        raise ConfigError(f"config.dataset.name = {dataset.name!r}: {error}") from error


def ablate(ablation: Ablation, site: Site, command: str) -> int | None:
    """Train and score the jobs that are not finished, then write the report.

    Returns the signal that stopped the training, or None. A shard trains and scores its share of
    the jobs and writes no report; a last call without a shard writes it.

    Raises:
        FailedJobsError: some jobs failed. The report leaves out their arms; it is not written if
            the reference arm failed.
    """
    missing = [job for job in ablation.mine if not is_finished(job, site.path)]
    arms = len({job.arm.name for job in ablation.jobs})
    note = f"{len(ablation.mine)} jobs, {len(ablation.mine) - len(missing)} finished"
    LOG.info("%d arms, %s; %s, %d at once on a device", arms, note, *site.parallel)
    failed: dict[str, str] = {}  # from the title of a job to the reason
    stopped_by = train_jobs(missing, site, failed)
    if stopped_by is not None:
        return stopped_by
    trained = [job for job in missing if title_of(job) not in failed]
    score_jobs(trained, site, command, failed)
    if ablation.is_shard:
        LOG.info("this share is done; after all shards, run the command without a shard to report")
    else:
        lost = {job.arm.name for job in ablation.jobs if title_of(job) in failed}
        complete = tuple(job for job in ablation.jobs if job.arm.name not in lost)
        if ablation.reference not in lost:
            report(ablation._replace(jobs=complete), site, command, sorted(lost))
    if failed:
        raise FailedJobsError("; ".join(f"{name}: {error}" for name, error in failed.items()))
    return None


def report(ablation: Ablation, site: Site, command: str, lost: list[str]) -> None:
    """Write ablation.csv and report.html, and print the scores; ``lost`` are arms that failed."""
    dataset, path = site.dataset, site.path
    classifier = load_classifier(dataset, 0, path)
    records = [json.loads(record_of(job, path).read_text()) for job in ablation.jobs]
    about = About(
        command=command,
        versions=versions(),
        facts=_facts(ablation, dataset, classifier),
        notes=_notes(ablation, lost, records),
    )
    results = collect(ablation, dataset, classifier, path, about)
    write_csv(results, path / "ablation.csv")
    write_report(results, path / "report.html")
    print(describe_results(results))
    LOG.info("%s", path / "report.html")


def _notes(
    ablation: Ablation, lost: list[str], records: Sequence[dict[str, Any]]
) -> tuple[str, ...]:
    """What a reader of the scores must know; ``records`` are the finished.json of all jobs."""
    notes = [f"{name} failed and is left out." for name in lost]
    if any(record["versions"] != versions() for record in records):
        notes.append("Some jobs were scored under other versions: see their finished.json.")
    experiments = [job.experiment for job in ablation.jobs]
    if any(each.evaluation.num_timesteps < len(each.schedule) for each in experiments):
        notes.append(SKEWED)
    return tuple(notes)


def _facts(ablation: Ablation, dataset: Dataset, classifier: Classifier) -> dict[str, str]:
    """How the jobs were trained and scored, as texts of the report."""

    def parameters(job: Job) -> str:
        return f"{sum(leaf.size for leaf in jax.tree.leaves(job.experiment.model.template)):,}"

    def bound(job: Job) -> str:
        plan = fit(job.experiment.evaluation, dataset.test)
        whole = len(job.experiment.schedule)
        return f"{plan.num_examples} test images, each at {plan.num_timesteps} of {whole} timesteps"

    def samples(job: Job) -> str:
        plan, name = job.experiment.sampling, job.config.sampling.sampler
        chain = f"{plan.chain.num_steps} steps, {plan.chain.spacing}"
        return f"{plan.num_images} of each job, {name}, {chain}"

    def all_of(fact: Callable[[Job], str]) -> str:
        return "; ".join(dict.fromkeys(fact(job) for job in ablation.jobs))

    def precision(job: Job) -> str:
        training = job.experiment.training.precision
        evaluation = job.experiment.evaluation.precision
        sampling = job.experiment.sampling.precision
        return f"training {training}, evaluation {evaluation}, samples {sampling}"

    plan = ablation.jobs[0].experiment.training
    return {
        "parameters of the network": all_of(parameters),
        "training": f"{plan.num_steps:,} steps of {plan.batch_size}",
        "bound": all_of(bound),
        "samples": all_of(samples),
        "precision of products": all_of(precision),
        "classifier": f"{100 * classifier.test_accuracy:.2f} % accuracy on the test images",
    }


def describe_results(results: Results) -> str:
    """The scores of all arms, as lines of text."""
    lines = []
    for name, kind in SCORES.items():
        lines.append(f"{kind.heading} ({kind.unit}) with 95 % intervals, and the paired difference")
        for arm in results.arms:
            mean, difference, mark = arm.scores[name]
            text = f"  {arm.name:24} {mean.value:9.4f} {_ends(mean)}  "
            if difference is None:
                text += "the reference"
            else:
                text += f"{difference.value:+.4f} {_ends(difference)}"
            lines.append(f"{text}  {mark}".rstrip())
    return "\n".join(lines)


def _ends(interval: Interval) -> str:
    if np.isinf(interval.low):
        return "[one seed: no interval]"
    return f"[{interval.low:.4f}, {interval.high:.4f}]"


def check_room(jobs: Sequence[Job], path: pathlib.Path, per_device: int) -> None:
    """Refuse jobs whose states exceed the memory, or whose checkpoints exceed the free disk space.

    Raises:
        ConfigError: too many arms per device, or too many jobs.
    """
    largest = max((_size_of_state(group[0]) for group in group_jobs(jobs)), default=0)
    statistics = jax.local_devices()[0].memory_stats() or {}
    memory = statistics.get("bytes_limit")
    if memory is None:  # a CPU: its devices share the memory of the host
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        memory //= jax.local_device_count()
    allowed = f"at most {memory // largest}: a state has {largest:,} bytes, a device {memory:,}"
    field = "config.ablate.arms_per_device"
    require(per_device * largest <= memory, field, per_device, allowed)
    missing = [job for job in jobs if not folder_of(job, path).checkpoints.exists()]
    parent = next(
        folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists()
    )
    free = shutil.disk_usage(parent).free
    plan = jobs[0].experiment.training
    saves = plan.keep_last + plan.keep_best
    # A run that saves has one checkpoint more, until it removes the oldest one.
    at_once = min(len(missing), per_device * jax.local_device_count())
    needed = (len(missing) * saves + at_once) * largest
    allowed = f"fewer: {saves} checkpoints of each need {needed:,} bytes, {parent} has {free:,}"
    require(needed <= free, "config.ablate.grid", f"{len(missing)} jobs", allowed)


def _size_of_state(job: Job) -> int:
    """The size of a training state in bytes."""
    experiment = job.experiment
    length = len(experiment.schedule)
    state = jax.eval_shape(lambda: init_state(experiment, seed=job.seed, num_timesteps=length))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
