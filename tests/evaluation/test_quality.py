"""Distances against closed forms, intervals against known values, the classifier on the digits."""

import functools
import json
import logging
import os
import pathlib
import subprocess
import sys
from math import comb

import jax
import numpy as np
import pytest

from diffusion_jax.data.dataset import DatasetChoice, Split
from diffusion_jax.data.load import load_dataset
from diffusion_jax.data.pixels import to_x_0
from diffusion_jax.evaluation import classifier as classifier_module
from diffusion_jax.evaluation import distances
from diffusion_jax.evaluation.classifier import (
    features,
    load_classifier,
    train_classifier,
)
from diffusion_jax.evaluation.distances import (
    frechet_distance,
    kernel_distance,
    paired_difference,
    with_interval,
)

ARCHIVES = pathlib.Path(
    os.environ.get("DIFFUSION_JAX_ARCHIVES", pathlib.Path(__file__).parents[3] / "shared" / "data")
)
DISTANCES = {"frechet": frechet_distance, "kernel": kernel_distance}


def load(name, folder, archives=None):
    return load_dataset(DatasetChoice(name=name, archives=archives, data_dir=str(folder)))


def with_moments(mean, covariance, n=100, seed=0):
    """Samples whose empirical mean and covariance are exactly these."""
    x = np.random.default_rng(seed).normal(size=(n, len(mean)))
    x -= x.mean(axis=0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
    eigenvalues, vectors = np.linalg.eigh(covariance)
    return mean + x * np.sqrt(np.maximum(eigenvalues, 0)) @ vectors.T


def covariance(d, seed):
    a = np.random.default_rng(seed).normal(size=(d, d + 2))
    return a @ a.T / d


# The Fréchet distance


@pytest.mark.parametrize("variances", [([1, 2, 3], [4, 1, 3]), ([1, 0, 4], [0, 3, 0])])
def test_frechet_of_independent_features(variances):
    """The distance is the sum of (mu_1 - mu_2)^2 + (sigma_1 - sigma_2)^2, also at zero variance."""
    mean = np.array([0.3, -2.0, 1.0])
    x, y = (with_moments(m, np.diag(v), seed=len(m)) for m, v in zip((mean, 0 * mean), variances))
    roots = np.sqrt(variances)
    exact = np.sum(mean**2) + np.sum((roots[0] - roots[1]) ** 2)
    assert frechet_distance(x, y) == pytest.approx(exact, abs=1e-7)


@pytest.mark.parametrize("d", [2, 7])
def test_frechet_of_correlated_features(d):
    """The expected tr (S_1 S_2)^{1/2} comes from the real, positive eigenvalues of S_1 S_2."""
    s_1, s_2, mean = covariance(d, 0), covariance(d, 1), np.arange(d) / d
    x, y = with_moments(mean, s_1, seed=2), with_moments(np.zeros(d), s_2, seed=3)
    overlap = np.sqrt(np.linalg.eigvals(s_1 @ s_2).real).sum()
    if d == 2:
        det = np.linalg.det(s_1 @ s_2)
        assert overlap == pytest.approx(np.sqrt(np.trace(s_1 @ s_2) + 2 * np.sqrt(det)))
    exact = mean @ mean + np.trace(s_1) + np.trace(s_2) - 2 * overlap
    assert frechet_distance(x, y) == pytest.approx(exact, rel=1e-9)
    assert frechet_distance(y, x) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("n", [10, 300])
def test_frechet_distance_of_a_set_to_itself_is_zero(n):
    """This holds for fewer samples than features too, and for float32 features."""
    x = np.random.default_rng(0).normal(size=(n, 40)).astype(np.float32)
    assert 0 <= frechet_distance(x, x) < 1e-10


@pytest.mark.parametrize("n", [20, 60])
def test_frechet_does_not_change_if_both_sets_are_rotated_and_shifted(n):
    source = np.random.default_rng(0)
    x, y = source.normal(size=(n, 30)), 1.3 * source.normal(size=(n, 30)) + 0.2
    rotation, _ = np.linalg.qr(source.normal(size=(30, 30)))
    before = frechet_distance(x, y)
    after = frechet_distance(x @ rotation + 5, y @ rotation + 5)
    assert after == pytest.approx(before, rel=1e-8)


def test_frechet_has_the_bias_that_its_docstring_states():
    d, n = 64, 2000
    reference = with_moments(np.zeros(d), np.eye(d))
    found = frechet_distance(np.random.default_rng(0).normal(size=(n, d)), reference)
    assert found == pytest.approx((d + d * (d + 1) / 4) / n, rel=0.1)
    assert found == pytest.approx(0.55, rel=0.1)


# The kernel distance


def test_kernel_is_the_double_sum():
    source = np.random.default_rng(0)
    x, y = source.normal(size=(9, 3)), source.normal(size=(12, 3)) + 0.3

    def mean(a, b, distinct):
        pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if not (distinct and i == j)]
        return np.mean([(sum(a[i] * b[j]) / 3 + 1) ** 3 for i, j in pairs])

    exact = mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)
    assert kernel_distance(x, y) == pytest.approx(exact, rel=1e-10)


def test_kernel_does_not_depend_on_the_size_of_its_blocks(monkeypatch):
    x, y = np.random.default_rng(0).normal(size=(2, 50, 3))
    whole = kernel_distance(x, y)
    monkeypatch.setattr(distances, "BLOCK", 7)
    assert kernel_distance(x, y) == pytest.approx(whole, rel=1e-10)


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_kernel_is_unbiased(shift):
    """For one feature its expectation is the sum of binom(3, k) (gap of the k-th moments)^2."""
    source = np.random.default_rng(0)
    moments = [1, shift, 1 + shift**2, shift**3 + 3 * shift]
    exact = sum(comb(3, k) * (moments[k] - m) ** 2 for k, m in enumerate([1, 0, 1, 0]))
    found = [
        kernel_distance(source.normal(size=(20, 1)) + shift, source.normal(size=(25, 1)))
        for _ in range(200)
    ]
    assert np.mean(found) == pytest.approx(exact, abs=4 * np.std(found) / np.sqrt(len(found)))
    assert (shift > 0) or np.mean(np.array(found) < 0) > 0.3


# Intervals


def simulate(distance, draw, reference, num_draws=50, **kwargs):
    """The values, low ends and high ends of the intervals of many draws."""
    found = [
        with_interval(distance, draw(seed), reference, seed=seed, **kwargs)
        for seed in range(num_draws)
    ]
    return np.array(found).T


def covers(truth, low, high):
    """The fraction of intervals that contain the true value."""
    return np.mean((low <= truth) & (truth <= high))


def test_the_interval_of_a_frechet_distance_contains_the_true_value():
    """The plain distance has a bias; the interval corrects it."""
    d, n = 12, 150
    reference = with_moments(np.zeros(d), np.eye(d))

    def draw(seed):
        return 1.4 * np.random.default_rng((seed, 1)).normal(size=(n, d)) + 0.1

    truth = d * (0.4**2 + 0.1**2)
    value, low, high = simulate("frechet", draw, reference, num_resamples=100)
    plain = [frechet_distance(draw(seed), reference) for seed in range(len(value))]
    assert covers(truth, low, high) >= 0.86
    assert np.mean(np.array(plain) - truth) > 4 * np.std(value) / np.sqrt(len(value))
    assert np.mean(value) == pytest.approx(truth, abs=0.15 * (np.mean(plain) - truth))
    # The width is that of the sampling distribution
    assert np.mean(high - low) == pytest.approx(2 * 1.96 * np.std(value), rel=0.3)


def test_the_interval_of_equal_distributions_contains_zero():
    d = 8
    reference = with_moments(np.zeros(d), np.eye(d))

    def draw(seed):
        return np.random.default_rng((seed, 2)).normal(size=(120, d))

    value, low, high = simulate("frechet", draw, reference, 40, num_resamples=60)
    assert covers(0, low, high) >= 0.9
    assert np.mean(value) == pytest.approx(0, abs=0.2 * (d + d * (d + 1) / 4) / 120)


def test_the_interval_of_a_kernel_distance_contains_the_true_value():
    """For one feature and a fixed reference the true value follows from the moments."""
    reference = np.random.default_rng(0).uniform(-1, 1, size=(300, 1))
    m, shift = len(reference), 0.4
    moments = [1, shift, 1 / 3 + shift**2, shift**3 + shift]
    of_reference = [np.sum(reference**k) for k in range(7)]
    truth = sum(
        comb(3, k)
        * (
            moments[k] ** 2
            + (of_reference[k] ** 2 - of_reference[2 * k]) / (m * (m - 1))
            - 2 * moments[k] * of_reference[k] / m
        )
        for k in range(4)
    )

    def draw(seed):
        return np.random.default_rng((seed, 3)).uniform(-1, 1, size=(300, 1)) + shift

    value, low, high = simulate("kernel", draw, reference, 60, num_resamples=100)
    assert covers(truth, low, high) >= 0.86
    assert np.mean(value) == pytest.approx(truth, abs=4 * np.std(value) / np.sqrt(len(value)))
    assert np.mean(high - low) == pytest.approx(2 * 1.96 * np.std(value), rel=0.3)


@pytest.mark.parametrize("distance", DISTANCES)
def test_a_higher_level_gives_a_wider_interval_of_the_same_value(distance):
    x, y = np.random.default_rng(0).normal(size=(2, 80, 3))
    estimate = functools.partial(with_interval, distance, x + 0.3, y, num_resamples=200)
    narrow, wide = estimate(seed=0, level=0.5), estimate(seed=0, level=0.9)
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high
    assert narrow.value == wide.value
    assert estimate(seed=0, level=0.5) == narrow
    assert estimate(seed=1, level=0.5) != narrow
    # The value differs from the plain distance by the bias correction alone
    assert narrow.value == pytest.approx(DISTANCES[distance](x + 0.3, y), rel=0.5)


@pytest.mark.parametrize("distance", DISTANCES)
def test_pairing_separates_arms_that_are_close_together(distance):
    d, n = 4, 200
    reference = with_moments(np.zeros(d), np.eye(d))
    source = np.random.default_rng(0)
    noise = source.normal(size=(n, d))
    a = 1.25 * noise + 0.2 + 0.02 * source.normal(size=(n, d))
    b = 1.20 * noise + 0.2 + 0.02 * source.normal(size=(n, d))
    paired = paired_difference(distance, a, b, reference, seed=0, num_resamples=100)
    alone = [with_interval(distance, arm, reference, seed=0, num_resamples=100) for arm in (a, b)]
    unpaired = paired_difference(
        distance, a, source.permutation(b), reference, seed=0, num_resamples=100
    )
    combined = np.hypot(*(arm.high - arm.low for arm in alone))
    assert paired.high - paired.low < 0.4 * combined
    assert unpaired.high - unpaired.low == pytest.approx(combined, rel=0.4)
    assert paired.low > 0
    # The resamples are the same, so the value is the difference of the values of the arms
    assert paired.value == pytest.approx(alone[0].value - alone[1].value, rel=1e-9)
    swapped = paired_difference(distance, b, a, reference, seed=0, num_resamples=100)
    np.testing.assert_allclose(swapped, (-paired.value, -paired.high, -paired.low), rtol=1e-9)
    same = paired_difference(distance, a, a, reference, seed=0, num_resamples=100)
    assert same == (0, 0, 0)


def test_the_interval_of_a_difference_contains_the_true_value():
    d, n = 6, 150
    reference = with_moments(np.zeros(d), np.eye(d))
    truth = d * (0.2**2 - 0.1**2)
    found = []
    for seed in range(40):
        a, b = np.random.default_rng((seed, 4)).normal(size=(2, n, d))
        b = 0.9 * a + np.sqrt(1 - 0.9**2) * b
        pair = 1.2 * a, 1.1 * b, reference
        found.append(paired_difference("frechet", *pair, seed=seed, num_resamples=60))
    value, low, high = np.array(found).T
    assert covers(truth, low, high) >= 0.85
    assert np.mean(high - low) == pytest.approx(2 * 1.96 * np.std(value), rel=0.35)


X = np.random.default_rng(0).normal(size=(30, 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: frechet_distance(X[:1], X), "1 and 30 samples"),
        (lambda: kernel_distance(X, X[:1]), "30 and 1 samples"),
        (lambda: with_interval("frechett", X, X, seed=0), "did you mean 'frechet'"),
        (lambda: paired_difference("fid", X, X, X, seed=0), "unknown distance"),
        (lambda: paired_difference("kernel", X, X[1:], X, seed=0), "30 and 29 samples"),
        (lambda: with_interval("kernel", X, X, seed=0, level=1.0), "level = 1.0"),
        (lambda: with_interval("kernel", X, X, seed=0, num_resamples=39), "40 or more"),
    ],
)
def test_impossible_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


# The classifier


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return load("digits", tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def classifier(digits):
    """A classifier trained in few small steps, because code in the tests is not optimized."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier_module, "BATCH_SIZE", 16)
        patch.setattr(classifier_module, "MIN_STEPS", 320)
        patch.setattr(classifier_module, "LEARNING_RATE", 4e-3)
        return train_classifier(digits, 0)


@pytest.fixture
def few_digits(digits, monkeypatch):
    """100 digits, and a classifier training of four steps."""
    monkeypatch.setattr(classifier_module, "MIN_STEPS", 4)
    some = Split(digits.train.images[:100], digits.train.labels[:100])
    return digits._replace(train=some)


def x_0_of(split, levels):
    return to_x_0(split.images[:], levels)


def test_the_classifier_knows_digits(digits, classifier):
    assert classifier.test_accuracy >= 0.95
    held_out = x_0_of(digits.test, digits.levels)
    _, logits = classifier_module._apply(classifier, held_out)
    accuracy = np.mean(logits.argmax(axis=1) == digits.test.labels)
    assert accuracy == pytest.approx(classifier.test_accuracy)
    of_images = features(classifier, held_out)
    assert of_images.dtype == np.float32
    assert of_images.var(axis=0).mean() == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("distance", DISTANCES.values())
def test_features_rank_digits_by_their_noise(digits, classifier, distance):
    held_out = x_0_of(digits.test, digits.levels)
    noise = np.random.default_rng(0).normal(size=held_out.shape).astype(np.float32)
    reference = features(classifier, x_0_of(digits.train, digits.levels))
    found = [
        distance(features(classifier, held_out + size * noise), reference) for size in (0, 0.3, 0.9)
    ]
    assert found[0] < 0.8 * found[1] < 0.5 * found[2]


def test_images_are_rounded_to_the_levels_and_batches_do_not_matter(
    digits, classifier, monkeypatch
):
    real = x_0_of(digits.test, digits.levels)[:9]
    near = (
        real + 0.9 / (digits.levels - 1) * np.sin(np.arange(real.size).reshape(real.shape))
    ).astype(np.float32)
    found = features(classifier, real)
    np.testing.assert_array_equal(features(classifier, near), found)
    monkeypatch.setattr(classifier_module, "FORWARD_BATCH", 4)
    np.testing.assert_allclose(features(classifier, jax.numpy.asarray(real)), found, 1e-4, 1e-4)


def test_an_image_that_is_not_finite_is_refused(digits, classifier):
    images = x_0_of(digits.test, digits.levels)[:5]
    images[3, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="image 3 of 5 is not finite"):
        features(classifier, images)


def test_the_classifier_follows_from_the_seed(few_digits):
    first, again, other = (train_classifier(few_digits, seed) for seed in (3, 3, 4))
    x_0 = x_0_of(few_digits.test, few_digits.levels)
    found, same, different = (features(one, x_0) for one in (first, again, other))
    np.testing.assert_array_equal(found, same)
    assert first.scale == again.scale
    assert np.abs(found - different).max() > 0.1


@pytest.fixture
def trained(classifier, monkeypatch):
    """The seeds of all classifier trainings; each training returns the same classifier."""
    seeds = []

    def train(dataset, seed):
        seeds.append(seed)
        return classifier

    monkeypatch.setattr(classifier_module, "train_classifier", train)
    return seeds


def test_a_classifier_is_trained_once(digits, classifier, trained, tmp_path, caplog):
    folder = tmp_path / "kept"
    first = load_classifier(digits, 0, folder)
    (path,) = folder.iterdir()
    before = path.stat().st_mtime_ns
    again = load_classifier(digits, 0, folder)
    assert trained == [0]
    assert path.stat().st_mtime_ns == before
    x_0 = x_0_of(digits.test, digits.levels)
    np.testing.assert_array_equal(features(again, x_0), features(first, x_0))
    assert again.test_accuracy == classifier.test_accuracy
    load_classifier(digits, 1, folder)
    assert trained == [0, 1]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(list(folder.iterdir())) == 2


def flip(position):
    def damage(path):
        whole = bytearray(path.read_bytes())
        whole[int(position * len(whole))] ^= 4
        path.write_bytes(whole)

    return damage


def of_other_settings(path):
    """Change the fingerprint of the settings in the file of a classifier."""
    with np.load(path) as file:
        arrays = dict(file)
    fingerprint = json.loads(str(arrays["fingerprint"]))
    fingerprint[0] += 1
    np.savez(path, **arrays | {"fingerprint": json.dumps(fingerprint)})


DAMAGE = {
    "flipped early": flip(0.2),
    "flipped late": flip(0.9),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:5000]),
    "empty": lambda path: path.write_bytes(b""),
    "another format": lambda path: path.write_text("a b c"),
    "another npz": lambda path: np.savez(path, images=np.zeros(3)),
    "other settings": of_other_settings,
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_or_other_file_is_replaced_with_a_warning(
    name, digits, trained, tmp_path, caplog
):
    load_classifier(digits, 0, tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    DAMAGE[name](path)
    load_classifier(digits, 0, tmp_path)
    assert trained == [0, 0]
    (warning,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert str(path) in warning.getMessage()
    assert "\n" not in warning.getMessage()
    assert path.stat().st_size == len(whole)
    load_classifier(digits, 0, tmp_path)
    assert trained == [0, 0]
    assert list(tmp_path.iterdir()) == [path]


def test_other_images_have_another_classifier(digits, trained, tmp_path, caplog):
    load_classifier(digits, 0, tmp_path)
    changed = digits.train.images.copy()
    changed[0, 0, 0, 0] ^= 1
    others = digits._replace(train=Split(changed, digits.train.labels))
    load_classifier(others, 0, tmp_path)
    assert trained == [0, 0]
    assert "of other images or settings" in caplog.text


def without_labels(split):
    return Split(split.images, None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: {"num_classes": None, "train": without_labels(d.train)}, "it has no labels"),
        (lambda d: {"test": without_labels(d.test)}, "it has no labels"),
        (lambda d: {"test": Split(d.test.images, d.test.labels - 1)}, r"outside 0\.\.9"),
        (lambda d: {"test": None}, "no test split"),
        (lambda d: {"levels": None}, "points, not images"),
    ],
)
def test_sets_that_no_classifier_can_be_trained_on_are_refused(change, reason, digits, tmp_path):
    dataset = digits._replace(**change(digits))
    for call in (
        lambda: train_classifier(dataset, 0),
        lambda: load_classifier(dataset, 0, tmp_path / "kept"),
    ):
        with pytest.raises(ValueError, match=rf"'digits' cannot be trained: .*{reason}") as caught:
            call()
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


TRAIN = """
import pathlib, sys
from diffusion_jax.data.dataset import DatasetChoice
from diffusion_jax.data.load import load_dataset
from diffusion_jax.evaluation.classifier import load_classifier
dataset = load_dataset(DatasetChoice(name=sys.argv[1], data_dir=sys.argv[2]))
load_classifier(dataset, 0, pathlib.Path(sys.argv[3]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not ARCHIVES.is_dir(), reason="no real archives")
@pytest.mark.parametrize(("name", "accuracy"), [("mnist", 0.985), ("fashion_mnist", 0.87)])
def test_real_images_are_closer_to_held_out_ones_than_noised_ones(
    name, accuracy, repository, tmp_path
):
    dataset = load(name, tmp_path, str(ARCHIVES / name))
    # A process without this one's XLA_FLAGS trains it, with an optimizing compiler.
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    words = [sys.executable, "-c", TRAIN, name, str(tmp_path), str(tmp_path / "kept")]
    subprocess.run(words, check=True, cwd=repository, env=environment)
    (path,) = (tmp_path / "kept").iterdir()
    before = path.stat().st_mtime_ns
    classifier = load_classifier(dataset, 0, tmp_path / "kept")
    assert path.stat().st_mtime_ns == before
    assert classifier.test_accuracy >= accuracy
    source = np.random.default_rng(0)
    # Drawn at random, because in MNIST the odd training images differ from the even ones.
    x_0 = to_x_0(dataset.train.images[source.permutation(len(dataset.train))[:2000]], 256)
    noised = x_0 + source.normal(scale=0.1, size=x_0.shape).astype(np.float32)
    reference = features(classifier, x_0_of(dataset.test, 256))
    arms = [features(classifier, images) for images in (noised, x_0)]
    assert with_interval("frechet", arms[1], reference, seed=0).value < 0.5
    assert paired_difference("frechet", *arms, reference, seed=0).low > 0
