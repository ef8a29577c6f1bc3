"""Two-sample test: a 1-nearest-neighbour classifier of a run's samples and held-out images.

    python -m benchmarks.two_sample --config=configs/digits.py --workdir=runs/digits

It prints the leave-one-out accuracy of the classifier "sample or real" (Lopez-Paz & Oquab 2017).
0.5 is perfect; at 1 samples and images are always distinguished; below 0.5 samples are closer to
real images than real images are to each other. The same accuracy for training images is a
reference. The distances of samples and of held-out images to their nearest training image show
whether the model has memorised its training images.
"""

import pathlib
import sys

import numpy as np
from sklearn.neighbors import NearestNeighbors

from diffusion_jax.__main__ import parse_arguments
from diffusion_jax.config.config import load
from diffusion_jax.data.dataset import Split
from diffusion_jax.data.load import load_dataset
from diffusion_jax.data.pixels import to_uint8, to_x_0
from diffusion_jax.experiment.dataset import create_dataset_choice

DRAWS = 10  # random subsets of samples, as many as held-out images or half of all samples


def accuracy(first: np.ndarray, second: np.ndarray) -> float:
    """Leave-one-out accuracy, over both sets, of the set of the nearest neighbour."""
    points = np.concatenate([first, second])
    is_second = np.arange(len(points)) >= len(first)
    _, nearest = NearestNeighbors(n_neighbors=2).fit(points).kneighbors(points)
    own = nearest[:, 0] == np.arange(len(points))  # a duplicate may come before the point itself
    other = np.where(own, nearest[:, 1], nearest[:, 0])
    return float(np.mean(is_second == is_second[other]))


def nearest_distance(points: np.ndarray, training: np.ndarray) -> float:
    """Mean Euclidean distance to the nearest training image."""
    return float(NearestNeighbors(n_neighbors=1).fit(training).kneighbors(points)[0].mean())


def main(argv: list[str]) -> None:
    """Print the accuracies and distances of a run's samples.npz."""
    arguments = parse_arguments(argv)
    config = load(arguments.config_path, arguments.overrides)
    dataset = load_dataset(create_dataset_choice(config))

    def flat(images: np.ndarray) -> np.ndarray:
        return images.reshape(len(images), -1).astype(np.float64)

    def pixels(split: Split) -> np.ndarray:
        x_0 = to_x_0(split.images[:], dataset.levels)
        return flat(to_uint8(x_0, dataset.levels))

    held_out, training = pixels(dataset.test), pixels(dataset.train)
    with np.load(pathlib.Path(arguments.workdir) / "samples" / "samples.npz") as arrays:
        samples = flat(arrays["images"])
    source = np.random.default_rng(0)
    size = min(len(held_out), len(samples) // 2)
    real = source.permutation(held_out)[:size]
    for name, images in {"samples": samples, "training images": training}.items():
        accuracies = [accuracy(source.permutation(images)[:size], real) for _ in range(DRAWS)]
        print(
            f"{name} against {size} held-out images: {np.mean(accuracies):.3f}, "
            f"standard deviation {np.std(accuracies, ddof=1):.3f} over {DRAWS} draws"
        )
    for name, images in {"samples": samples, "held-out images": held_out}.items():
        distance = nearest_distance(images, training)
        print(f"distance of {name} to the nearest training image: {distance:.1f}")


if __name__ == "__main__":
    main(sys.argv[1:])
