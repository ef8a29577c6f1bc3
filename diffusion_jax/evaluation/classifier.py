"""The classifier of a data set, whose features compare sets of images; trained once and saved."""

import hashlib
import json
import logging
import pathlib
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Float32, Int, PyTree, UInt8

from diffusion_jax.data.batches import read_batches
from diffusion_jax.data.dataset import Dataset, Split
from diffusion_jax.data.pixels import to_uint8, to_x_0
from diffusion_jax.diffusion.streams import seed_key
from diffusion_jax.models.classifier import ClassifierNetwork, create_classifier
from diffusion_jax.runtime import files
from diffusion_jax.runtime.compilation import named
from diffusion_jax.runtime.numerics import HIGHEST, in_precision

LOG = logging.getLogger("diffusion_jax")

Images = Float[np.ndarray, "n height width channel"] | Float[Array, "n height width channel"]

# Of the saved file; raise it with every change to the network or its training.
VERSION = 1
NUM_EPOCHS = 3
MIN_STEPS = 400  # if three epochs have fewer steps
BATCH_SIZE = 128
LEARNING_RATE = 2e-3
FORWARD_BATCH = 500  # images per call of a trained classifier


class Classifier(NamedTuple):
    """A trained classifier of one data set."""

    apply: Callable[..., Any]  # compiled: (params, x_0) -> (features, logits)
    params: PyTree
    levels: int  # of the set's pixels
    scale: float  # the features are divided by it
    test_accuracy: float  # in [0, 1]


def train_classifier(dataset: Dataset, seed: int) -> Classifier:
    """Train a classifier on the training split by Adam with a cosine decay.

    It is trained for three epochs, but at least 400 steps. On a CPU the same seed gives the same
    bits. It is trained on one device, so that the number of devices does not change it, and in a
    Python loop, because XLA:CPU is slow at the gradient of a convolution inside a scan.

    Raises:
        ValueError: points, no test split, or examples without labels.
    """
    data = _require_labelled_images(dataset)
    network = create_classifier(dataset.shape, data.num_classes)
    num_steps = max(MIN_STEPS, NUM_EPOCHS * len(dataset.train) // BATCH_SIZE)
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, num_steps))

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

    compiled = named("the classifier's step", jax.jit(in_precision(HIGHEST, step)))
    LOG.info("training a classifier of %s for %d steps", dataset.name, num_steps)
    begun = time.monotonic()
    params = network.init(seed_key(seed))
    opt_state = optimizer.init(params)
    stream = read_batches(dataset.train, BATCH_SIZE, seed)
    for _, batch in zip(range(num_steps), stream):
        x_0 = to_x_0(batch["image"], dataset.levels)
        params, opt_state = compiled(params, opt_state, x_0, batch["label"])

    classifier = Classifier(
        apply=_compile(network),
        params=params,
        levels=data.levels,
        scale=1.0,
        test_accuracy=0.0,
    )
    held_out = to_x_0(data.test.images[:], data.levels)
    unscaled, logits = _apply(classifier, held_out)
    classifier = classifier._replace(
        scale=float(np.sqrt(unscaled.var(axis=0, dtype=np.float64).mean())),
        test_accuracy=float(np.mean(logits.argmax(axis=1) == data.test_labels)),
    )
    seconds = time.monotonic() - begun
    accuracy = 100 * classifier.test_accuracy
    LOG.info("the classifier has a test accuracy of %.2f %% after %.0f s", accuracy, seconds)
    return classifier


def load_classifier(dataset: Dataset, seed: int, folder: pathlib.Path) -> Classifier:
    """Load the classifier of a data set and a seed from ``folder``, or train it and save it there.

    A file that is damaged, or is of other images or settings, is replaced with a warning.

    Raises:
        ValueError: as train_classifier.
        OSError: the folder cannot be written.
    """
    data = _require_labelled_images(dataset)
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^\w.-]", "_", dataset.name)  # TFDS names may have "/" and ":"
    path = folder / f"classifier-{name}-{seed}.npz"
    fingerprint = _fingerprint(dataset, data, seed)
    if path.exists():
        try:
            return _restore(path, dataset.shape, data, fingerprint)
        except Exception as error:  # damage shows as any exception of numpy or zipfile
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            LOG.warning("%s cannot be used (%s): training a classifier anew", path, reason)
    classifier = train_classifier(dataset, seed)
    _save(path, classifier, fingerprint)
    return classifier


class _LabelledImages(NamedTuple):
    """The parts of a data set that training a classifier needs, and that some data sets lack."""

    levels: int
    num_classes: int
    test: Split
    train_labels: np.ndarray
    test_labels: np.ndarray


def require_labelled_images(dataset: Dataset) -> None:
    """Refuse a set that no classifier can be trained on.

    Raises:
        ValueError: points, no test split, or examples without labels.
    """
    _require_labelled_images(dataset)


def _require_labelled_images(dataset: Dataset) -> _LabelledImages:
    def refuse(reason: str) -> NoReturn:
        raise ValueError(f"a classifier of {dataset.name!r} cannot be trained: {reason}")

    if dataset.levels is None:
        refuse("it has points, not images")
    if dataset.test is None:
        refuse("it has no test split")
    if dataset.num_classes is None or dataset.train.labels is None or dataset.test.labels is None:
        refuse("it has no labels")
    read = dataset.train.labels[:], dataset.test.labels[:]
    for labels in read:  # some data sets do not publish the labels of a split
        if labels.min() < 0 or labels.max() >= dataset.num_classes:
            refuse(f"it has labels outside 0..{dataset.num_classes - 1}")
    return _LabelledImages(
        levels=dataset.levels,
        num_classes=dataset.num_classes,
        test=dataset.test,
        train_labels=read[0],
        test_labels=read[1],
    )


def _fingerprint(dataset: Dataset, data: _LabelledImages, seed: int) -> str:
    """A text that changes if the classifier would; it has the pixels of 1,000 images per split."""
    digest = hashlib.sha256()
    for split, labels in ((dataset.train, data.train_labels), (data.test, data.test_labels)):
        some = np.unique(np.linspace(0, len(split) - 1, 1000).astype(int))
        digest.update(np.ascontiguousarray(split.images[some]).tobytes())
        digest.update(labels.astype(np.int32).tobytes())
    sizes = dataset.shape, dataset.levels, dataset.num_classes, len(dataset.train)
    settings = NUM_EPOCHS, MIN_STEPS, BATCH_SIZE, LEARNING_RATE
    return json.dumps([VERSION, dataset.name, sizes, seed, settings, digest.hexdigest()])


def _save(path: pathlib.Path, classifier: Classifier, fingerprint: str) -> None:
    flat, _ = ravel_pytree(classifier.params)
    with files.replace(path) as file:
        np.savez(
            file,
            fingerprint=fingerprint,
            params=np.asarray(flat),
            scale=classifier.scale,
            test_accuracy=classifier.test_accuracy,
        )


def _restore(
    path: pathlib.Path, shape: tuple[int, ...], data: _LabelledImages, fingerprint: str
) -> Classifier:
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)  # reading an array checks its CRC-32
    if str(arrays["fingerprint"]) != fingerprint:
        raise ValueError("it is of other images or settings")
    network = create_classifier(shape, data.num_classes)
    shapes = jax.eval_shape(network.init, seed_key(0))
    _, unravel = ravel_pytree(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes))
    return Classifier(
        apply=_compile(network),
        params=unravel(arrays["params"]),
        levels=data.levels,
        scale=float(arrays["scale"]),
        test_accuracy=float(arrays["test_accuracy"]),
    )


def _compile(network: ClassifierNetwork) -> Callable[..., Any]:
    return named("the classifier", jax.jit(in_precision(HIGHEST, network.apply)))


def features(classifier: Classifier, x_0: Images) -> Float32[np.ndarray, "n d"]:
    """The features of images x_0 in [-1, 1]: the inputs of the classifier's last layer.

    They are scaled so that their mean variance over the test split is 1. Images are first rounded
    to the set's levels, as in a file. Otherwise the distances would mainly measure that real images
    lie on these levels and generated x_0 do not.

    Raises:
        ValueError: an image is not finite.
    """
    unscaled, _ = _apply(classifier, x_0)
    return unscaled / np.float32(classifier.scale)


def _apply(
    classifier: Classifier, x_0: Images
) -> tuple[Float32[np.ndarray, "n d"], Float32[np.ndarray, "n classes"]]:
    """Features and logits of any number of images; all batches are of one size, to compile once."""
    x_0 = np.asarray(x_0)
    finite = np.isfinite(x_0).all(axis=(1, 2, 3))
    if not finite.all():
        raise ValueError(f"image {np.argmin(finite)} of {len(x_0)} is not finite")
    pictures: UInt8[np.ndarray, "..."] = to_uint8(x_0, classifier.levels)
    batches = []
    for start in range(0, len(pictures), FORWARD_BATCH):
        batch = to_x_0(pictures[start : start + FORWARD_BATCH], 256)
        fill = np.zeros((FORWARD_BATCH - len(batch), *batch.shape[1:]), np.float32)
        outputs = classifier.apply(classifier.params, np.concatenate([batch, fill]))
        batches.append([np.asarray(output)[: len(batch)] for output in outputs])
    of_images, logits = (np.concatenate(parts) for parts in zip(*batches))
    return of_images, logits
