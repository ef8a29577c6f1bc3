r"""Milliseconds per training step of a job, for each value of ``config.ablate.parallel``.

    python -m benchmarks.parallel --config=configs/digits_offset.py --workdir=DIR [FLAGS]

All devices are used; on a CPU each core is a device. The values take turns, so that a machine that
slows down slows all of them. It prints the median and the quartiles over rounds of five steps.
vmap has two jobs on each device. Nothing is written into DIR.
"""

import sys
import time

import numpy as np
from jax import block_until_ready

from diffusion_jax.__main__ import parse_arguments
from diffusion_jax.ablation import grid
from diffusion_jax.ablation.jobs import Parallel
from diffusion_jax.ablation.slots import create_slots
from diffusion_jax.config.config import load
from diffusion_jax.data.batches import read_batches
from diffusion_jax.data.load import load_dataset
from diffusion_jax.diffusion.streams import Stream, stream_key
from diffusion_jax.experiment.dataset import create_dataset_choice
from diffusion_jax.runtime import devices
from diffusion_jax.training.step import Constants, init_state

WAYS = {"sequence": 1, "device": 1, "vmap": 2}  # jobs on a device
ROUNDS, STEPS = 5, 5


def main(argv: list[str]) -> None:
    """Print a line for each way."""
    arguments = parse_arguments([*argv, "--mode=ablate"])
    config = load(arguments.config_path, arguments.overrides)
    devices.start(config.num_devices, config.train.batch_size, False, divide=True)
    used_devices = devices.select_devices(config.num_devices)
    job = grid.create_jobs(config)[0]
    dataset = load_dataset(create_dataset_choice(config))
    devices.start_cache(config.compilation_cache)
    experiment, plan = job.experiment, job.experiment.training
    schedule = experiment.schedule
    state = init_state(experiment, seed=job.seed, num_timesteps=len(schedule))
    constants = Constants(schedule, stream_key(job.seed, Stream.TRAINING))
    stream = read_batches(dataset.train, plan.batch_size, job.seed)
    batch = {name: array[None] for name, array in next(stream).items()}

    begun = {}
    for way, per_device in WAYS.items():
        slots = create_slots(Parallel(way, per_device), [job] * per_device, used_devices)
        inputs = slots.put([(state, constants)] * slots.num)
        begun[way] = slots, inputs, slots.put_batches([batch] * slots.num)

    milliseconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(ROUNDS + 1):  # the first compiles
        for way, (slots, (at, fixed), batches) in begun.items():
            start = time.perf_counter()
            for _ in range(STEPS):
                at, metrics = slots.steps(at, fixed, slots.indices, batches)
                block_until_ready(metrics)
            seconds = time.perf_counter() - start
            begun[way] = slots, (at, fixed), batches
            if number:
                milliseconds[way].append(1e3 * seconds / STEPS / slots.num)
    print(
        f"{len(used_devices)} {used_devices[0].device_kind} devices, batches of {plan.batch_size}"
    )
    for way, values in milliseconds.items():
        low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
        print(f"{way:10} {median:8.1f} ms per step of a job [{low:.1f}, {high:.1f}]")


if __name__ == "__main__":
    main(sys.argv[1:])
