"""The data sets as numpy arrays, each read from its authors' own archives.

A new set is a ``Source`` in a file here (one file per family) and its line in DATASETS. Only
builder.py imports TFDS: what is known of a set costs no import.
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
