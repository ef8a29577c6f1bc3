"""The data sets as numpy arrays, each read from the archives of its authors.

A new set is a ``Source`` in a file here (one file per family) and its line in DATASETS. Only
builder.py imports TFDS, so the properties of a set are known without that slow import.
"""

from diffusion_jax.data.sources import cifar10, digits, idx, toy2d
from diffusion_jax.data.sources.source import Source

DATASETS: dict[str, Source] = {
    "digits": digits.DIGITS,
    "mnist": idx.MNIST,
    "fashion_mnist": idx.FASHION_MNIST,
    "kmnist": idx.KMNIST,
    "cifar10": cifar10.CIFAR10,
    "toy2d": toy2d.TOY2D,
}
