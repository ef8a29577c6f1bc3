r"""Sample quality of every sampler on a trained model, by the number of network evaluations.

    python -m benchmarks.samplers --config=configs/mnist.py --workdir=DIR FLAGS \
        --config.sampling.num_images=500

with the FLAGS that trained the model. It prints a Markdown table of the classifier Frechet distance
to the test split (evaluation/distances.py; smaller is better), with 95 % intervals. All chains
start from the same noise. A sampler that evaluates the network twice per step takes half as many
steps, so that a column compares equal work. The chains of ancestral, ddim and predictor_corrector
use "trailing" timesteps, those of the other samplers EDM's grid up to sigma = 80.
"""

import pathlib
import sys

import numpy as np

from diffusion_jax.__main__ import parse_arguments
from diffusion_jax.config.config import load
from diffusion_jax.data.load import load_dataset
from diffusion_jax.data.pixels import to_x_0
from diffusion_jax.diffusion import samplers
from diffusion_jax.evaluation.classifier import features, load_classifier
from diffusion_jax.evaluation.distances import with_interval
from diffusion_jax.experiment.dataset import create_dataset_choice
from diffusion_jax.experiment.experiment import create_experiment
from diffusion_jax.experiment.sampling import Chain
from diffusion_jax.runtime import devices
from diffusion_jax.runtime.checkpoint import restore_average
from diffusion_jax.sampling.generator import Generator

BUDGETS = (10, 20, 50)  # approximate numbers of network evaluations per image
ON_TIMESTEPS = ("ancestral", "ddim", "predictor_corrector")
SAME = (
    "euler",
    "dpmpp_1s",
    "euler_ancestral",
)  # equal to ddim and ancestral, see tests/diffusion/samplers


def chain_of(name: str, num_steps: int) -> Chain:
    """A chain with the spacing that suits a sampler."""
    if name in ON_TIMESTEPS:
        spacing, sigma_max = "trailing", None
    else:
        spacing, sigma_max = "karras", 80.0
    return Chain(num_steps=num_steps, spacing=spacing, rho=7.0, sigma_min=None, sigma_max=sigma_max)


def main(argv: list[str]) -> None:
    """Print a row for each sampler."""
    arguments = parse_arguments([*argv, "--mode=sample"])
    config = load(arguments.config_path, arguments.overrides)
    devices.start(config.num_devices, config.sampling.batch_size, False, divide=False)
    experiment = create_experiment(config)
    dataset = load_dataset(create_dataset_choice(config))
    devices.start_cache(config.compilation_cache)
    ema, step = restore_average(experiment.model.template, pathlib.Path(arguments.workdir), None)
    classifier = load_classifier(dataset, 0, pathlib.Path(arguments.workdir))
    real = features(classifier, to_x_0(dataset.test.images[:], dataset.levels))

    def cell(x_0: np.ndarray) -> str:
        distance = with_interval("frechet", features(classifier, x_0), real, seed=0)
        return f"{distance.value:.2f} [{distance.low:.2f}, {distance.high:.2f}]"

    num_images = config.sampling.num_images
    # a random subset, because MNIST's training archive alternates between two groups of writers
    indices = np.random.default_rng(0).permutation(len(dataset.train))[:num_images]
    training = to_x_0(dataset.train.images[indices], dataset.levels)
    print(f"step {step}, {num_images} images, classifier {classifier.test_accuracy:.4f} right")
    print(f"as many training images: {cell(training)}\n")
    print("| sampler | grid | " + " | ".join(f"{n} calls" for n in BUDGETS) + " |")
    print("|---|---|" + "---|" * len(BUDGETS), flush=True)
    for name, create in samplers.SAMPLERS.items():
        if name in SAME:
            continue
        cells = []
        for budget in BUDGETS:
            num_steps = round(budget * 100 / create().num_evaluations(100))
            plan = experiment.sampling._replace(
                sampler=create(), chain=chain_of(name, num_steps), num_frames=0
            )
            used_devices = devices.select_devices(config.num_devices)
            generator = Generator(experiment._replace(sampling=plan), None, used_devices)
            params = ema, None
            x_0 = [batch.x_0 for batch in generator.batches(params, 0, None)]
            cells.append(f"{cell(np.concatenate(x_0))}, {num_steps} steps")
        print(f"| {name} | {plan.chain.spacing} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
