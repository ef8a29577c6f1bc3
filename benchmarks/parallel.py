r"""Milliseconds of a training step of one job, by ``config.ablate.parallel``.

    python -m benchmarks.parallel --config=configs/digits_offset.py --workdir=DIR [FLAGS]

On all devices, a CPU's cores being one each. The ways take turns, so that a machine that slows down
slows all of them; prints the median and the quartiles of rounds of five steps. vmap has two jobs on
a device. DIR is not written.
"""

import sys
import time

import numpy as np
from jax import block_until_ready

from diffusion_jax.__main__ import parse_arguments
from diffusion_jax.ablation import grid
from diffusion_jax.ablation.slots import create_slots
from diffusion_jax.config import config as configuration
from diffusion_jax.data.batches import read_batches
from diffusion_jax.data.load import load_dataset
from diffusion_jax.runtime import devices
from diffusion_jax.training.step import init_state, noise_key

WAYS = {"sequence": 1, "device": 1, "vmap": 2}  # jobs on a device
ROUNDS, STEPS = 5, 5


def main(argv: list[str]) -> None:
    """Print a line for each way."""
    arguments = parse_arguments([*argv, "--mode=ablate"], ("ablate",))
    config = configuration.load(arguments.config_path, arguments.overrides)
    devices.start(config.num_devices, config.train.batch_size, False, divide=True)
    used = devices.select_devices(config.num_devices)
    job = grid.create_jobs(config)[0]
    dataset = load_dataset(config.dataset)
    devices.start_compilation_cache(config.compilation_cache)
    experiment, plan = job.experiment, job.experiment.training
    schedule, timesteps = experiment.schedule, experiment.objective.timesteps
    state = init_state(experiment.model, plan.optimizer, timesteps, len(schedule), job.seed)
    stream = read_batches(dataset.train, plan.batch_size, job.seed)
    batch = {name: array[None] for name, array in next(stream).items()}

    begun = {}
    for way, per_device in WAYS.items():
        slots = create_slots(way, per_device, [job], dataset.levels, used)
        inputs = slots.put([(state, schedule, noise_key(job.seed))] * slots.num)
        begun[way] = slots, inputs, slots.put_batches([batch] * slots.num)

    milliseconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(ROUNDS + 1):  # the first compiles
        for way, (slots, (at, *constants), batches) in begun.items():
            start = time.perf_counter()
            for _ in range(STEPS):
                at, metrics = slots.steps(at, *constants, slots.indices, batches)
                block_until_ready(metrics)
            seconds = time.perf_counter() - start
            begun[way] = slots, (at, *constants), batches
            if number:
                milliseconds[way].append(1e3 * seconds / STEPS / slots.num)
    print(f"{len(used)} {used[0].device_kind} devices, batches of {plan.batch_size}")
    for way, values in milliseconds.items():
        low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
        print(f"{way:10} {median:8.1f} ms per step of a job [{low:.1f}, {high:.1f}]")


if __name__ == "__main__":
    main(sys.argv[1:])
