"""MNIST and the sets with the same four IDX files: Fashion-MNIST and Kuzushiji-MNIST."""

import functools
from pathlib import Path

import numpy as np

from diffusion_jax.data.sources import archives
from diffusion_jax.data.sources.source import Arrays, Source

FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)

# sha256 of the decompressed files, in the order of FILES, so that recompressed files are accepted.
SUMS = {
    "mnist": (
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
    "fashion_mnist": (
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
}

# sha256 of the compressed files (TFDS, url_checksums/kmnist.txt). No checksums of the decompressed
# files are published, so only the original .gz files are accepted.
SUMS_OF_GZ = {
    "kmnist": (
        "51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4",
        "e38f9ebcd0f3ebcdec7fc8eabdcdaef93bb0df8ea12bee65224341c8183d8e17",
        "edd7a857845ad6bb1d0ba43fe7e794d164fe2dce499a1694695a792adfac43c5",
        "20bb9a0ef54c7db3efc55a92eef5582c109615df22683c380526788f98e42a1c",
    ),
}


def read(name: str, folder: Path) -> Arrays:
    """Read the images and labels of one of the sets.

    Raises:
        ConfigError: a file is missing, truncated or damaged, or has another checksum.
    """
    paths = archives.locate(folder, FILES)
    arrays = [parse(_checked(name, index, paths[file])) for index, file in enumerate(FILES)]
    images, labels = arrays[0::2], arrays[1::2]
    return {
        split: (images[half][..., None], labels[half].astype(np.int64))
        for half, split in enumerate(("train", "test"))
    }


def parse(content: bytes) -> np.ndarray:
    """Parse an IDX file: two zero bytes, the type (8: uint8), the rank, the lengths, the data."""
    rank = content[3]
    shape = np.frombuffer(content, ">i4", rank, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)


def _checked(name: str, index: int, path: Path) -> bytes:
    if name in SUMS_OF_GZ:
        archives.check(path.name, path.read_bytes(), SUMS_OF_GZ[name][index])
        return archives.contents(path)
    content = archives.contents(path)
    # All the sets have the same file names, so users confuse their folders.
    owners = {sums[index]: f"that of {other}" for other, sums in SUMS.items()}
    archives.check(path.name, content, SUMS[name][index], others=owners)
    return content


def _source(name: str, url: str) -> Source:
    urls = tuple(f"{url}/{file}" for file in FILES)
    return Source((28, 28, 1), 256, 10, urls, functools.partial(read, name))


MNIST = _source("mnist", "https://storage.googleapis.com/cvdf-datasets/mnist")
FASHION_MNIST = _source(
    "fashion_mnist", "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
)
KMNIST = _source("kmnist", "http://codh.rois.ac.jp/kmnist/dataset/kmnist")
