r"""Coverage of the confidence intervals of --mode=evaluate's bound, on a trained model.

    python -m benchmarks.coverage --config=configs/digits.py --workdir=DIR FLAGS

with the FLAGS that trained the model. It computes the term of every test image at every timestep:
these terms are the population. Then it draws evaluations from it, of few images with replacement
and of few timesteps, one in each stratum as in `--mode=evaluate`. It counts how often the
population's mean lies within 1.96 standard errors of the estimate, and prints a Markdown table.
"""

import pathlib
import sys

import jax
import numpy as np
from jaxtyping import Float, PyTree

from diffusion_jax.__main__ import parse_arguments
from diffusion_jax.config.config import load
from diffusion_jax.data.load import load_dataset
from diffusion_jax.data.pixels import to_x_0
from diffusion_jax.diffusion.bound import Strata, bound_terms, stratify
from diffusion_jax.diffusion.examples import Examples
from diffusion_jax.diffusion.streams import Stream, stream_key
from diffusion_jax.experiment.dataset import create_dataset_choice
from diffusion_jax.experiment.experiment import create_experiment
from diffusion_jax.runtime import devices
from diffusion_jax.runtime.checkpoint import restore_average
from diffusion_jax.runtime.numerics import in_precision

IMAGES = (10, 30, 100, 300)
TIMESTEPS = (2, 5, 10, 50)  # of each image
DRAWS = 2000  # evaluations of each size
AT_ONCE = 10  # timesteps in a call, each of all images
LEVEL = 1.96  # half the width of a 95 % interval, in standard errors

Population = Float[np.ndarray, "timesteps images"]


def compute_terms(argv: list[str]) -> Population:
    """The term of the bound, in bits/dim, of each test image at each timestep (one eps each)."""
    arguments = parse_arguments([*argv, "--mode=evaluate"])
    config = load(arguments.config_path, arguments.overrides)
    devices.start(1, config.evaluate.batch_size, False, divide=False)
    experiment = create_experiment(config)
    dataset = load_dataset(create_dataset_choice(config))
    assert dataset.test is not None
    params, step = restore_average(experiment.model.template, pathlib.Path(arguments.workdir), None)
    schedule = experiment.schedule_of(params)
    num_images = len(dataset.test.images)
    examples = Examples(
        x_0=to_x_0(dataset.test.images[:], dataset.levels),
        label=dataset.test.labels,
        indices=np.arange(num_images),
        batch_size=num_images,
    )
    key = stream_key(config.seed, Stream.EVALUATION)
    clip_x_0 = experiment.evaluation.clip_x_0

    def compute(params: PyTree, x_0: Float[jax.Array, "batch ..."], strata: Strata) -> jax.Array:
        terms = bound_terms(
            experiment.network,
            params,
            schedule,
            key,
            examples._replace(x_0=x_0),
            strata=strata,
            clip_x_0=clip_x_0,
        )
        return terms[1].bits

    compiled = jax.jit(in_precision(experiment.evaluation.precision, compute))
    every = stratify(len(schedule), len(schedule))  # strata of one timestep
    calls = [
        Strata(*(field[start : start + AT_ONCE] for field in every))
        for start in range(0, len(schedule), AT_ONCE)
    ]
    print(f"step {step}, {num_images} images, {len(schedule)} timesteps\n")
    return np.concatenate(
        [np.asarray(compiled(params, examples.x_0, strata), np.float64) for strata in calls]
    )


def compute_coverage(
    population: Population, num_images: int, num_timesteps: int, source: np.random.Generator
) -> tuple[float, float]:
    """The share of intervals that contain the mean, and mean squared error / squared std. error."""
    truth = population.sum(axis=0).mean()
    strata = stratify(len(population), num_timesteps)
    shape = (DRAWS, num_images)
    images = source.integers(population.shape[1], size=shape)
    bound = np.zeros(shape)
    for first, size in zip(strata.first, strata.size):
        bound += size * population[first + source.integers(size, size=shape), images]
    error = bound.std(axis=1, ddof=1) / np.sqrt(num_images)
    deviation = bound.mean(axis=1) - truth
    share = float(np.mean(np.abs(deviation) <= LEVEL * error))
    return share, float(np.mean(deviation**2) / np.mean(error**2))


def main(argv: list[str]) -> None:
    """Print the coverage of each number of images and of timesteps."""
    population = compute_terms(argv)
    source = np.random.default_rng(0)
    print("| images | " + " | ".join(f"{n} timesteps" for n in TIMESTEPS) + " |")
    print("|---|" + "---|" * len(TIMESTEPS))
    for num_images in IMAGES:
        row = [compute_coverage(population, num_images, n, source) for n in TIMESTEPS]
        cells = [f"{share:.3f} ({ratio:.2f})" for share, ratio in row]
        print(f"| {num_images} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
