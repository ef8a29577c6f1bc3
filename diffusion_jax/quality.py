"""How close generated images are to real ones, in the eyes of a classifier of the same data set.

Sets of images are compared through the features of a small classifier that was trained on the
set itself, by a Fréchet or a kernel distance. These are the formulas of FID and KID with other
features: the numbers compare samplers and models of one data set under one classifier, and are
not to be put beside FIDs or KIDs. Every number has a confidence interval, and two arms that
began with the same noise are compared in pairs.
"""

import hashlib
import json
import logging
import os
import pathlib
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Float32, Int, PyTree, UInt8

from diffusion_jax import data
from diffusion_jax.config import choose, require
from diffusion_jax.models.classifier import create_classifier

LOG = logging.getLogger("diffusion_jax")

Images = Float[np.ndarray, "n height width channel"] | Float[Array, "n height width channel"]
Features = Float[np.ndarray, "n d"]
Reference = Float[np.ndarray, "m d"]
Counts = Float[np.ndarray, " n"]  # how often each sample counts; all ones: the samples as they are
Statistic = Callable[[Counts], float]

# Of a classifier that is kept: to be raised with every change to the network or its training.
VERSION = 1
NUM_EPOCHS = 3
MIN_STEPS = 400  # where three epochs are fewer
BATCH_SIZE = 128
LEARNING_RATE = 2e-3

FORWARD_BATCH = 500  # images at once where nothing is trained
CONFIDENT = 0.9  # a probability
BLOCK = 1000  # rows of a kernel matrix at once


class Classifier(NamedTuple):
    """A trained classifier of one data set."""

    apply: Callable[..., Any]  # compiled: (params, x_0) -> (features, logits)
    params: PyTree
    levels: int  # of the set's pixels
    scale: float  # features are divided by it
    test_accuracy: float


def train_classifier(dataset: data.Dataset, seed: int) -> Classifier:
    """A classifier trained on the training split by Adam with a cosine decay, for three epochs.

    On a CPU the same seed gives the same bits. It runs on one device, so that the number of
    devices makes no difference, and in a Python loop, for XLA:CPU is slow at the gradient of a
    convolution inside a scan.

    Raises:
        ValueError: points, no test split, or examples without labels.
    """
    check(dataset)
    network = create_classifier(dataset.shape, dataset.num_classes)
    num_steps = max(MIN_STEPS, NUM_EPOCHS * len(dataset.train) // BATCH_SIZE)
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, num_steps))

    @jax.jit
    def step(
        params: PyTree,
        opt_state: PyTree,
        x_0: Float[Array, "batch height width channel"],
        label: Int[Array, " batch"],
    ) -> tuple[PyTree, PyTree]:
        def loss(params: PyTree) -> Float[Array, ""]:
            _, logits = network.apply(params, x_0)
            return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()

        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state)
        return optax.apply_updates(params, updates), opt_state

    LOG.info("training a classifier of %s for %d steps", dataset.name, num_steps)
    begun = time.monotonic()
    params = network.init(jax.random.key(seed))
    opt_state = optimizer.init(params)
    stream = data.batches(dataset.train, BATCH_SIZE, seed)
    for _, batch in zip(range(num_steps), stream):
        x_0 = data.to_x_0(batch["image"], dataset.levels)
        params, opt_state = step(params, opt_state, x_0, batch["label"])

    classifier = Classifier(jax.jit(network.apply), params, dataset.levels, 1.0, 0.0)
    held_out = data.to_x_0(dataset.test.images[:], dataset.levels)
    found, logits = _apply(classifier, held_out)
    classifier = classifier._replace(
        scale=float(np.sqrt(found.var(axis=0, dtype=np.float64).mean())),
        test_accuracy=float(np.mean(logits.argmax(axis=1) == dataset.test.labels[:])),
    )
    seconds = time.monotonic() - begun
    accuracy = 100 * classifier.test_accuracy
    LOG.info("the classifier has a test accuracy of %.2f %% after %.0f s", accuracy, seconds)
    return classifier


def load_classifier(dataset: data.Dataset, seed: int, folder: pathlib.Path) -> Classifier:
    """The classifier that ``folder`` keeps of a data set and a seed; trained first if need be.

    A file that is damaged, or is of other images or settings, is replaced with a warning.

    Raises:
        ValueError: as train_classifier.
        OSError: the folder cannot be written.
    """
    check(dataset)
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^\w.-]", "_", dataset.name)  # TFDS names may have "/" and ":"
    path = folder / f"classifier-{name}-{seed}.npz"
    fingerprint = _fingerprint(dataset, seed)
    if path.exists():
        try:
            return _restore(path, dataset, fingerprint)
        except Exception as error:  # damage shows as any exception of numpy or zipfile
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            LOG.warning("%s cannot be used (%s): training a classifier anew", path, reason)
    classifier = train_classifier(dataset, seed)
    _save(path, classifier, fingerprint)
    return classifier


def check(dataset: data.Dataset) -> None:
    """Refuse a set that no classifier can be trained on.

    Raises:
        ValueError: points, no test split, or examples without labels.
    """

    def refuse(reason: str) -> None:
        raise ValueError(f"a classifier of {dataset.name!r} cannot be trained: {reason}")

    if dataset.levels is None:
        refuse("it has points, not images")
    if dataset.test is None:
        refuse("it has no test split")
    if dataset.num_classes is None or dataset.train.labels is None or dataset.test.labels is None:
        refuse("it has no labels")
    for split in (dataset.train, dataset.test):  # some sets keep a split's labels to themselves
        labels = split.labels[:]
        if labels.min() < 0 or labels.max() >= dataset.num_classes:
            refuse(f"it has labels outside 0..{dataset.num_classes - 1}")


def _fingerprint(dataset: data.Dataset, seed: int) -> str:
    """What the classifier depends on; of the pixels a thousand images of each split."""
    digest = hashlib.sha256()
    for split in (dataset.train, dataset.test):
        some = np.unique(np.linspace(0, len(split) - 1, 1000).astype(int))
        digest.update(np.ascontiguousarray(split.images[some]).tobytes())
        digest.update(split.labels[:].astype(np.int32).tobytes())
    sizes = dataset.shape, dataset.levels, dataset.num_classes, len(dataset.train)
    settings = NUM_EPOCHS, MIN_STEPS, BATCH_SIZE, LEARNING_RATE
    return json.dumps([VERSION, dataset.name, sizes, seed, settings, digest.hexdigest()])


def _save(path: pathlib.Path, classifier: Classifier, fingerprint: str) -> None:
    """Write the file, whole or not at all."""
    flat, _ = ravel_pytree(classifier.params)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        np.savez(
            file,
            fingerprint=fingerprint,
            params=np.asarray(flat),
            scale=classifier.scale,
            test_accuracy=classifier.test_accuracy,
        )
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _restore(path: pathlib.Path, dataset: data.Dataset, fingerprint: str) -> Classifier:
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)  # each is checked against its CRC-32
    if str(arrays["fingerprint"]) != fingerprint:
        raise ValueError("it is of other images or settings")
    network = create_classifier(dataset.shape, dataset.num_classes)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    _, unravel = ravel_pytree(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes))
    return Classifier(
        jax.jit(network.apply),
        unravel(arrays["params"]),
        dataset.levels,
        float(arrays["scale"]),
        float(arrays["test_accuracy"]),
    )


def features(classifier: Classifier, x_0: Images) -> Float32[np.ndarray, "n d"]:
    """What the classifier's last layer reads of each image, x_0 in [-1, 1].

    In units in which the mean variance of a feature over the test split is 1. Images are rounded
    to the set's levels first, as a picture of them is, for real images differ from generated ones
    in nothing more plainly than in being on that grid.

    Raises:
        ValueError: an image is not finite.
    """
    found, _ = _apply(classifier, x_0)
    return found / np.float32(classifier.scale)


def probabilities(classifier: Classifier, x_0: Images) -> Float32[np.ndarray, "n classes"]:
    """The probability of each class, of images x_0 in [-1, 1].

    Raises:
        ValueError: an image is not finite.
    """
    _, logits = _apply(classifier, x_0)
    return np.asarray(jax.nn.softmax(logits, axis=1))


def _apply(
    classifier: Classifier, x_0: Images
) -> tuple[Float32[np.ndarray, "n d"], Float32[np.ndarray, "n classes"]]:
    """Features and logits of any number of images; all batches are of one size, to compile once."""
    x_0 = np.asarray(x_0)
    finite = np.isfinite(x_0).all(axis=(1, 2, 3))
    if not finite.all():
        raise ValueError(f"image {np.argmin(finite)} of {len(x_0)} is not finite")
    pictures: UInt8[np.ndarray, "..."] = data.to_uint8(x_0, classifier.levels)
    found = []
    for start in range(0, len(pictures), FORWARD_BATCH):
        batch = data.to_x_0(pictures[start : start + FORWARD_BATCH], 256)
        fill = np.zeros((FORWARD_BATCH - len(batch), *batch.shape[1:]), np.float32)
        outputs = classifier.apply(classifier.params, np.concatenate([batch, fill]))
        found.append([np.asarray(output)[: len(batch)] for output in outputs])
    of_images, logits = (np.concatenate(parts) for parts in zip(*found))
    return of_images, logits


class ClassBalance(NamedTuple):
    """Whether images are plainly of one class, and whether all classes occur."""

    confident: float  # the share of images of which one class has a probability of 0.9 or more
    entropy: float  # of the histogram of the likeliest classes, in bits; at most log2(classes)


def class_balance(probabilities: Float[np.ndarray, "n classes"]) -> ClassBalance:
    """The share of confident images and the entropy of the classes that they are taken for.

    To be read beside the same of real images: many doubtful images are blurs or mixtures, and an
    entropy below the real one says that classes are missing.
    """
    share = np.bincount(probabilities.argmax(axis=1)) / len(probabilities)
    share = share[share > 0]
    confident = np.mean(probabilities.max(axis=1) >= CONFIDENT)
    return ClassBalance(float(confident), float(-(share * np.log2(share)).sum()))


def frechet_distance(features: Features, reference: Reference) -> float:
    """The classifier Fréchet distance, that of the Gaussians fitted to two sets of features.

    |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^{1/2}) (Dowson & Landau 1982; of images, Heusel et
    al. 2017, arXiv 1706.08500, eq. 6), which is 0 only for equal moments. Its expectation over
    samples lies above the distance of what they are drawn from, by about c/n, and c depends on
    that distribution: 64 features of independent unit variance are 0.55 from themselves at
    n = 2000. So it compares sets of equal size only; ``with_interval`` corrects for it, and
    ``kernel_distance`` has no bias.

    Raises:
        ValueError: fewer than two samples in a set.
    """
    return _frechet(features, reference)(np.ones(len(features)))


def kernel_distance(features: Features, reference: Reference) -> float:
    """The classifier kernel distance: the unbiased MMD^2 of two sets under a cubic kernel.

    mean k(x_i, x_j) + mean k(y_i, y_j) - 2 mean k(x_i, y_j), i and j distinct in the first two,
    k(x, y) = (x y / d + 1)^3 (Gretton et al. 2012, eq. 3; of images, Bińkowski et al. 2018, arXiv
    1801.01401, section 4). It sees the moments up to the third. Its expectation is 0 for equal
    distributions at every sample size, so single values are negative about as often as not.
    Needs 16 n^2 bytes for n samples or so.

    Raises:
        ValueError: fewer than two samples in a set.
    """
    return _kernel(features, reference)(np.ones(len(features)))


def _frechet(features: Features, reference: Reference) -> Statistic:
    x, y = _float64(features, reference)
    mean_y, covariance_y = _moments(y, np.ones(len(y)))
    root_y = _root(covariance_y)

    def of_counts(counts: Counts) -> float:
        mean, covariance = _moments(x, counts)
        # tr (S_1 S_2)^{1/2} = tr (S_1^{1/2} S_2 S_1^{1/2})^{1/2}, the sum of the singular values
        # of S_1^{1/2} S_2^{1/2}: the roots of its eigenvalues, without the loss in squaring them.
        overlap = np.linalg.svd(_root(covariance) @ root_y, compute_uv=False).sum()
        spread = np.trace(covariance) + np.trace(covariance_y) - 2 * overlap
        return max(float(np.sum((mean - mean_y) ** 2) + spread), 0.0)  # below 0 it is rounding

    return of_counts


def _moments(
    x: Features, counts: Counts
) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, "d d"]]:
    """Mean and unbiased covariance of samples that count so many times each."""
    total = counts.sum()
    mean = counts @ x / total
    centred = x - mean
    return mean, (centred * counts[:, None]).T @ centred / (total - 1)


def _root(covariance: Float[np.ndarray, "d d"]) -> Float[np.ndarray, "d d"]:
    """The symmetric square root."""
    eigenvalues, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.maximum(eigenvalues, 0))) @ vectors.T


def _kernel(features: Features, reference: Reference) -> Statistic:
    x, y = _float64(features, reference)

    def kernel(a: Features, b: Reference) -> Float[np.ndarray, "n m"]:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def sums(a: Features, b: Reference) -> Float[np.ndarray, " n"]:
        starts = range(0, len(a), BLOCK)
        return np.concatenate([kernel(a[i : i + BLOCK], b).sum(axis=1) for i in starts])

    across = sums(x, y) / len(y)
    own = ((y * y).mean(axis=1) + 1) ** 3  # k(y_i, y_i)
    within_y = (sums(y, y).sum() - own.sum()) / (len(y) * (len(y) - 1))
    within_x = kernel(x, x)
    np.fill_diagonal(within_x, 0)

    def of_counts(counts: Counts) -> float:
        total = counts.sum()
        # A sample that a resample has twice makes no pair with itself either.
        mean = counts @ within_x @ counts / (total**2 - counts @ counts)
        return float(mean + within_y - 2 * counts @ across / total)

    return of_counts


def _float64(features: Features, reference: Reference) -> tuple[Features, Reference]:
    if min(len(features), len(reference)) < 2:
        sizes = f"{len(features)} and {len(reference)}"
        raise ValueError(f"sets of {sizes} samples: a distance needs two in each at least")
    return features.astype(np.float64), reference.astype(np.float64)


class Estimate(NamedTuple):
    """A number, its bias removed, and the interval that holds the truth."""

    value: float
    low: float
    high: float


def with_interval(
    distance: str,
    features: Features,
    reference: Reference,
    seed: int,
    num_resamples: int = 500,
    level: float = 0.95,
) -> Estimate:
    """A distance ("frechet" or "kernel") with its basic bootstrap interval over the samples.

    With theta the distance of the n samples and theta* that of n of them drawn with replacement,
    the value is 2 theta - mean theta* and the interval [2 theta - q_{1-a/2}, 2 theta - q_{a/2}], q
    the quantiles of theta* (Davison & Hinkley 1997, sections 2.1.3 and 5.2). theta* is above
    theta by as much as theta is above the truth, for resampling adds the same noise again, so
    both subtract the bias of a Fréchet distance; a percentile interval would have it twice, and
    miss the truth every time. The value is therefore below frechet_distance and, as that of any
    unbiased estimate of a small distance, can be negative. n should be many times the number of
    features: with 64 of them, 2000 are good and 500 leave a twentieth of the bias.

    The truth meant is the distance of the generator, with infinitely many samples, to these very
    reference features, which are not resampled: how far those are from the real distribution is
    the same for every arm that is compared. Near distance 0 the interval is wider than need be;
    where few samples with heavy tails decide it is too narrow (of one normal feature and 400
    samples the 95 % interval of the kernel distance holds the truth 89 times in 100).

    Raises:
        ValueError: an unknown distance, fewer than two samples in a set, a level outside (0, 1)
            or too few resamples for it.
    """
    statistic = choose("distance", distance, DISTANCES, "distance")(features, reference)
    return _basic_interval(statistic, len(features), seed, num_resamples, level)


def paired_difference(
    distance: str,
    features_a: Features,
    features_b: Float[np.ndarray, "n_b d"],
    reference: Reference,
    seed: int,
    num_resamples: int = 500,
    level: float = 0.95,
) -> Estimate:
    """How much farther arm a is than arm b, whose samples i began with the same noise.

    The interval is that of ``with_interval``; a resample takes the same samples of both arms, so
    that what chance does to both alike cancels. Where it excludes 0 the arms differ.

    Raises:
        ValueError: as with_interval, or arms of different sizes.
    """
    sizes = len(features_a), len(features_b)
    if sizes[0] != sizes[1]:
        raise ValueError(f"arms of {sizes[0]} and {sizes[1]} samples cannot be paired")
    create = choose("distance", distance, DISTANCES, "distance")
    a, b = create(features_a, reference), create(features_b, reference)

    def difference(counts: Counts) -> float:
        return a(counts) - b(counts)

    return _basic_interval(difference, sizes[0], seed, num_resamples, level)


def _basic_interval(
    statistic: Statistic, size: int, seed: int, num_resamples: int, level: float
) -> Estimate:
    require(0 < level < 1, "level", level, "between 0 and 1")
    tail = (1 - level) / 2
    fewest = int(np.ceil(1 / tail))
    allowed = f"{fewest} or more for a level of {level}"
    require(num_resamples >= fewest, "num_resamples", num_resamples, allowed)
    source = np.random.default_rng(seed)
    uniform = np.full(size, 1 / size)
    drawn = (source.multinomial(size, uniform) for _ in range(num_resamples))
    resampled = [statistic(counts.astype(np.float64)) for counts in drawn]
    observed = statistic(np.ones(size))
    low, high = 2 * observed - np.quantile(resampled, [1 - tail, tail])
    return Estimate(float(2 * observed - np.mean(resampled)), float(low), float(high))


DISTANCES = {"frechet": _frechet, "kernel": _kernel}
