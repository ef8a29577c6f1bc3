"""Train, sample and score denoising diffusion models.

    python main.py --config=configs/digits.py --workdir=DIR                 train, then sample
    python main.py --config=configs/digits.py --workdir=DIR --mode=sample   sample again
    python main.py --config=configs/digits.py --workdir=DIR --mode=evaluate bits/dim of the test set
    python main.py --config=configs/digits_offset.py --workdir=DIR --mode=ablate  all of a grid

The same command in the same folder goes on where it stopped. Any field of a config is a flag:
--config.schedule.s=0.02. configs/default.py says what fields there are.

Exit status: 0 done; 1 a failure while running; 2 a mistake in the command line or the config,
and nothing was written; 143 stopped by SIGTERM after saving (130 by Ctrl-C). Sampling, evaluation
and ablations go on where they were killed.
"""

import logging
import pathlib
import shlex
import sys

from absl import flags
from absl import logging as absl_logging
from ml_collections import ConfigDict

from diffusion_jax import config as configuration
from diffusion_jax.config import ConfigError, RunError

LOG = logging.getLogger("diffusion_jax")
MODES = ("train", "sample", "evaluate", "ablate")


def main(argv: list[str]) -> int:
    """Run one mode; returns the exit status."""
    if {"--help", "-h"} & set(argv):
        print(__doc__)
        return 0
    flags.FLAGS.mark_as_parsed()  # ours are parsed below; absl's logging asks for this
    LOG.addHandler(absl_logging.get_absl_handler())
    LOG.setLevel(logging.INFO)
    LOG.propagate = False
    try:
        arguments = configuration.parse_arguments(argv, MODES)
        config = configuration.load(arguments.config_path, arguments.overrides)
        path = pathlib.Path(arguments.workdir)
        if arguments.mode == "ablate":
            return run_ablation(config, path, shlex.join(["python", "main.py", *argv]))
        return run(arguments.mode, config, path)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # while training it is a request to save, see stop.Stop
        print("interrupted", file=sys.stderr)
        return 130


def run(mode: str, config: ConfigDict, path: pathlib.Path) -> int:
    """Check everything, then start the devices, prepare the data, and train or sample."""
    # imported here so that --help and a mistyped flag answer at once
    import jax
    from jax.experimental import multihost_utils

    from diffusion_jax import data, devices, evaluate, plots, workdir
    from diffusion_jax.checkpoint import restore_average
    from diffusion_jax.experiment import (
        create_edited_images,
        create_experiment,
        create_job,
        create_weak,
        require_batches,
    )
    from diffusion_jax.gallery import write_samples
    from diffusion_jax.generate import Generator, Network
    from diffusion_jax.train import train

    is_training = mode == "train"
    require_batches(config)
    section = {"train": config.train, "sample": config.sampling, "evaluate": config.evaluate}[mode]
    devices.start(config.num_devices, section.batch_size, config.distributed, divide=is_training)
    used = devices.used(config.num_devices)
    experiment = create_experiment(config)
    folder = workdir.Workdir(path)
    fixed = workdir.OF_THE_TRAINING if is_training else workdir.OF_THE_MODEL
    is_there = folder.check(config, fixed)
    if not is_training and not is_there:
        raise ConfigError(f"--workdir={path}: holds no run; train one first")
    weak = create_weak(config, experiment, path)
    given = create_edited_images(config, experiment.dataset)
    dataset = data.load(config.dataset)
    if mode == "evaluate":
        evaluation = evaluate.fit(experiment.evaluation, dataset.test)
    devices.start_compilation_cache(config.compilation_cache)
    is_first = jax.process_index() == 0
    levels, title = experiment.dataset.levels, experiment.schedule_title
    card = folder.path / "schedule.png"
    if is_first:
        folder.lock()
        devices.log(used)
        if is_training:
            folder.record(config)
            if not is_there or config.schedule.name != "learned":
                described = plots.describe_schedule(
                    experiment.schedule, levels, experiment.num_clipped, title
                )
                print(described)
            if not card.exists():  # a run that goes on has its card already
                plots.schedule_card(experiment.schedule, levels, title, card)

    generator = Generator(
        Network(experiment.model, experiment.objective),
        None if weak is None else weak.network,
        experiment.dataset,
        experiment.schedule_of,
        experiment.sampling,
        experiment.seed,
        used,
    )
    try:
        if is_training:
            state, stopped_by = train(
                experiment.training,
                experiment.seed,
                experiment.model,
                experiment.batch_losses,
                experiment.objective.timesteps,
                experiment.schedule,
                dataset,
                folder,
                used,
                generator,
            )
            if stopped_by is not None:
                LOG.info("stopped by signal %d after saving step %d", stopped_by, state.step)
                return 128 + stopped_by
            ema, step = devices.local_copy(state.ema), int(state.step)
        else:
            ema, step = restore_average(experiment.model, "--workdir", path, None)
            LOG.info(
                "%s step %d", {"sample": "sampling from", "evaluate": "evaluating"}[mode], step
            )
        if not is_first:
            multihost_utils.sync_global_devices("done")  # leaving early would end the others
            return 0
        schedule = experiment.schedule_of(ema)
        if schedule is not experiment.schedule:  # it was learned
            print(plots.describe_schedule(schedule, levels, experiment.num_clipped, title))
            plots.schedule_card(schedule, levels, title, card)
        if mode == "evaluate":
            about = {name: config.loss[name] for name in ("prediction", "weighting", "variance")}
            about["schedule"] = experiment.schedule_title
            evaluator = evaluate.Evaluator(experiment.model, experiment.objective, evaluation, used)
            report = evaluator.evaluate(
                schedule, experiment.seed, ema, step, dataset.test, about, folder.path
            )
            print(evaluate.describe(report))
        else:
            weak_ema = None
            if weak is not None:
                where = "config.guidance.weak_step", weak.workdir, weak.step
                weak_ema, weak_step = restore_average(weak.network.model, *where)
                LOG.info("guided away from step %d of %s", weak_step, weak.workdir)
            params = ema, weak_ema
            write_samples(
                generator,
                params,
                experiment.sampling,
                schedule,
                dataset,
                given,
                create_job(config, params, given),
                folder.samples,
            )
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("done")
    except (RunError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def run_ablation(config: ConfigDict, path: pathlib.Path, command: str) -> int:
    """Check every arm, then train, evaluate and sample all of them, and report."""
    from diffusion_jax import ablate, data, devices, grid, workdir
    from diffusion_jax.experiment import require_batches

    require_batches(config)
    num_jobs = grid.count_jobs(config)
    side_by_side = config.ablate.parallel in ablate.SIDE_BY_SIDE
    side_by_side |= config.ablate.parallel == "auto" and num_jobs >= devices.count_cores()
    devices.start(
        config.num_devices,
        config.train.batch_size,
        config.distributed,
        divide=not side_by_side,
        num_jobs=num_jobs if side_by_side else None,
    )
    used = devices.used(config.num_devices)
    ablation = grid.create_ablation(config)
    folder = workdir.Workdir(path)
    ablate.check(ablation, folder, used)
    dataset = data.load(config.dataset)
    ablate.check_data(ablation, dataset)
    devices.start_compilation_cache(config.compilation_cache)
    folder.lock(config.ablate.shard)
    devices.log(used)
    try:
        stopped_by = ablate.ablate(ablation, dataset, folder, used, command)
    except (RunError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    if stopped_by is not None:
        LOG.info("stopped by signal %d; what was under way is saved", stopped_by)
        return 128 + stopped_by
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
