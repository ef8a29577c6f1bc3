"""Score trained jobs: evaluate the variational bound of each, and sample from it."""

import json
import logging
from collections.abc import Sequence

from diffusion_jax.ablation.jobs import (
    Job,
    Site,
    digests_of,
    fail,
    folder_of,
    group_jobs,
    record_of,
    title_of,
    versions,
)
from diffusion_jax.errors import ConfigError, RunError
from diffusion_jax.evaluation.evaluate import Evaluator, Trained
from diffusion_jax.experiment.evaluation import fit
from diffusion_jax.experiment.sampling import identity_of_samples
from diffusion_jax.runtime import files
from diffusion_jax.runtime.checkpoint import restore_average
from diffusion_jax.sampling.gallery import Samples, write_samples
from diffusion_jax.sampling.generator import Generator

LOG = logging.getLogger("diffusion_jax")


def score_jobs(jobs: Sequence[Job], site: Site, command: str, failed: dict[str, str]) -> None:
    """Evaluate every trained job and sample from it.

    Jobs with equal static choices and equal T share the compiled functions. Arms with the same
    seed are evaluated and sampled with the same noise. A job that fails is put into ``failed``.
    """
    for group in group_jobs(jobs, key=lambda job: len(job.experiment.schedule)):
        first = group[0].experiment
        plan = fit(first.evaluation, site.dataset.test)
        evaluator = Evaluator(first.network, plan, site.devices)
        generator = Generator(first, None, site.devices)
        for number, job in enumerate(group, start=1):
            LOG.info("scoring %s, %d of %d", title_of(job), number, len(group))
            try:
                with folder_of(job, site.path).lock():
                    _score(job, site, evaluator, generator, command)
            except (RunError, ConfigError) as error:  # a result not finite, or folder in use
                fail(job, error, failed)


def _score(job: Job, site: Site, evaluator: Evaluator, generator: Generator, command: str) -> None:
    """Evaluate one job, sample from it, and record that it is finished."""
    experiment, workdir = job.experiment, folder_of(job, site.path)
    ema, step = restore_average(experiment.model.template, workdir.path, None)
    if step != experiment.training.num_steps:
        raise RunError(f"its newest checkpoint is of step {step}")
    schedule = experiment.schedule_of(ema)
    assert site.dataset.test is not None  # check_data has required it
    evaluator.evaluate(
        Trained(params=ema, step=step, schedule=schedule, seed=job.seed),
        site.dataset.test,
        about=experiment.about,
        folder=workdir.path,
    )
    params = ema, None
    samples = Samples(
        generator=generator.of_schedule(experiment.schedule_of, job.seed),
        params=params,
        plan=experiment.sampling,
        schedule=schedule,
        dataset=site.dataset,
    )
    write_samples(samples, identity_of_samples(job.config, params, None), workdir.samples)
    record = {
        "config_hash": job.config_hash,
        "step": step,
        "files": digests_of(workdir.path),
        "versions": versions(),
        "command": command,
    }
    files.replace_text(record_of(job, site.path), json.dumps(record, indent=2) + "\n")
