"""The handwritten digits that come with scikit-learn: 1,797 images of 8 x 8, 17 grey levels."""

from pathlib import Path

import numpy as np

from diffusion_jax.data.sources.source import Arrays, Source

NUM_TEST = 300


def read(folder: Path) -> Arrays:
    """Split scikit-learn's digits, which have no test split, into 1,497 and 300 images.

    The test split has 30 images of each class, evenly spaced in the file. The file is ordered by
    writer, so both splits have images of every writer (and no writer is held out).
    """
    from sklearn.datasets import load_digits  # here, because it takes a second

    digits = load_digits()
    images = digits.images.astype(np.uint8)[..., None]  # sums of 4 x 4 black pixels: 0 .. 16
    labels = digits.target
    per_class = NUM_TEST // 10
    is_test = np.zeros(len(labels), bool)
    for label in range(10):
        places = np.flatnonzero(labels == label)
        is_test[places[np.arange(per_class) * len(places) // per_class]] = True
    return {
        "train": (images[~is_test], labels[~is_test]),
        "test": (images[is_test], labels[is_test]),
    }


DIGITS = Source(shape=(8, 8, 1), levels=17, num_classes=10, urls=(), read=read)
