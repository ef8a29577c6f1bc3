"""Intervals against scipy and longhand, and against known truths; what is said of arms."""

import numpy as np
import pytest
from scipy import stats

from diffusion_jax.ablation import comparison
from diffusion_jax.ablation.comparison import (
    excludes_zero,
    marks,
    mean_interval,
    not_told_apart,
    paired_difference,
)
from diffusion_jax.evaluation.interval import Interval

TRUTH = 0.7  # how much more the one arm of a simulation has
NUM_DRAWS = 350


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


# Against scipy and longhand


@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
@pytest.mark.parametrize("num_seeds", [2, 3, 8])
def test_numbers_per_seed_have_the_intervals_of_scipy(num_seeds, level):
    values, reference = normal(2, num_seeds) * [[1.0], [3.0]] + 5
    mean = stats.ttest_1samp(values, 0).confidence_interval(level)
    paired = stats.ttest_rel(values, reference).confidence_interval(level)
    for interval, exact in (
        (mean_interval(values, level), mean),
        (paired_difference(values, reference, level), paired),
    ):
        np.testing.assert_allclose(interval[1:], (exact.low, exact.high), rtol=1e-10)
        assert interval.value == pytest.approx((exact.low + exact.high) / 2)


def test_one_seed_is_taken_over_the_images_and_one_image_over_the_seeds():
    values, reference = normal(2, 9)
    flat = paired_difference(values, reference)
    assert paired_difference(values[None, :], reference[None, :]) == flat
    assert paired_difference(values[:, None], reference[:, None]) == flat
    assert flat.low < flat.value < flat.high
    assert mean_interval(values[None, :]) == mean_interval(values[:, None]) == mean_interval(values)


@pytest.mark.parametrize("shape", [(1,), (1, 1)])
def test_a_single_number_excludes_nothing(shape):
    values, reference = np.full(shape, 3.0), np.full(shape, 1.0)
    infinite = -np.inf, np.inf
    assert mean_interval(values) == (3.0, *infinite)
    assert paired_difference(values, reference) == (2.0, *infinite)
    assert marks({"a": values, "b": reference}, "a") == {"a": "", "b": ""}
    assert not_told_apart({"a": values, "b": reference}) == ("b", ["a"])


def sums_of_squares(values):
    """Mean squares of a two-way table with one value in each cell, element by element."""
    num_seeds, num_images = values.shape
    seeds = images = residual = 0.0
    for k in range(num_seeds):
        seeds += num_images * (values[k].mean() - values.mean()) ** 2 / (num_seeds - 1)
    for i in range(num_images):
        images += num_seeds * (values[:, i].mean() - values.mean()) ** 2 / (num_images - 1)
    for k in range(num_seeds):
        for i in range(num_images):
            fitted = values[k].mean() + values[:, i].mean() - values.mean()
            residual += (values[k, i] - fitted) ** 2 / ((num_seeds - 1) * (num_images - 1))
    return seeds, images, residual


def longhand(values):
    """Variance of the mean and degrees of freedom where no component is estimated below 0."""
    (num_seeds, num_images), squares = values.shape, sums_of_squares(values)
    assert squares[2] < min(squares[:2])
    freedom = num_seeds - 1, num_images - 1, (num_seeds - 1) * (num_images - 1)
    total = squares[0] + squares[1] - squares[2]
    below = sum(square**2 / f for square, f in zip(squares, freedom))
    return total / values.size, total**2 / below


@pytest.mark.parametrize("shape", [(2, 2), (2, 9), (4, 7), (7, 4)])
def test_crossed_effects_are_the_analysis_of_variance(shape):
    effects = 2 * normal(shape[0], 1, seed=1), 3 * normal(1, shape[1], seed=2)
    values = sum(effects) + 0.2 * normal(*shape, seed=3)
    v, f = longhand(values)
    half = stats.t.ppf(0.975, f) * np.sqrt(v)
    exact = values.mean() + np.array([0, -half, half])
    np.testing.assert_allclose(mean_interval(values), exact, rtol=1e-10)


def test_effects_without_a_residual_add_up():
    a, b = normal(3, 1), normal(1, 8, seed=1)
    parts = a.var(ddof=1) / 3, b.var(ddof=1) / 8
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / 2 + parts[1] ** 2 / 7)
    interval = mean_interval(a + b)
    half = stats.t.ppf(0.975, freedom) * np.sqrt(sum(parts))
    assert interval.high - interval.value == pytest.approx(half, rel=1e-9)


def test_no_component_counts_below_zero():
    """Without means that differ the residual's variance is left, and the fewest freedoms."""
    values = np.array([[1.0, -1.0], [-1.0, 1.0]])
    assert sums_of_squares(values) == (0, 0, 4)
    half = stats.t.ppf(0.975, 1) * np.sqrt(4 / 4)
    np.testing.assert_allclose(mean_interval(values), (0, -half, half), rtol=1e-10)
    # of seeds alone: (s_a^2 + s_e^2 / N) / K, as if there were nothing but the seeds
    values += [[5.0], [-5.0]]
    assert sums_of_squares(values) == (100, 0, 4)
    interval = mean_interval(values)
    assert interval.high == pytest.approx(half * np.sqrt(100 / 4), rel=0.02)


def test_the_variance_of_the_mean_is_unbiased():
    """So that no term is left out or counted twice, where none is cut off often."""
    values, reference = simulate((0.5, 0.3, 0.2), 5, 20, num_draws=1000)
    variances = [comparison._mean(one).variance for one in values - reference]
    error = np.std(variances) / np.sqrt(len(variances))
    assert error < 0.025
    assert np.mean(variances) == pytest.approx(1, abs=4 * error)


def test_intervals_move_and_stretch_with_the_values():
    values = normal(4, 9)
    interval = mean_interval(values)
    np.testing.assert_allclose(mean_interval(values.T), interval, rtol=1e-9)
    np.testing.assert_allclose(mean_interval(values[::-1, ::-1]), interval, rtol=1e-9)
    np.testing.assert_allclose(
        mean_interval(1e-90 * values), np.multiply(interval, 1e-90), rtol=1e-9
    )
    np.testing.assert_allclose(mean_interval(values + 2), np.add(interval, 2), rtol=1e-9)
    np.testing.assert_allclose(
        mean_interval(-values), (-interval.value, -interval.high, -interval.low), rtol=1e-9
    )


def test_float32_is_subtracted_in_float64():
    values, reference = (1000 + normal(3, 50)).astype(np.float32), normal(3, 50).astype(np.float32)
    exact = values.astype(np.float64), reference.astype(np.float64)
    assert mean_interval(values) == mean_interval(exact[0])
    assert paired_difference(values, reference) == paired_difference(*exact)


@pytest.mark.parametrize("shape", [(3,), (1, 9), (3, 9)])
def test_an_arm_does_not_differ_from_itself(shape):
    values = normal(*shape)
    assert paired_difference(values, values) == (0, 0, 0)
    assert not excludes_zero(paired_difference(values, values))


# Against known truths


def shared(num_seeds, num_images):
    """What seeds and images do to both arms of a simulation, larger than what they differ in."""
    return 3 * (normal(num_seeds, 1, seed=8) + normal(num_seeds, num_images, seed=9))


def simulate(shares, num_seeds, num_images, num_draws=NUM_DRAWS, seed=0):
    """Many arms and the arm they are compared with, [draws, seeds, images] and [seeds, images].

    The difference has effects of seeds, images and a residual whose shares of the variance of its
    mean are given and add up to 1, so that half-widths are in units of its standard deviation.
    """
    source = np.random.default_rng((seed, num_seeds, num_images))
    scales = np.sqrt(np.multiply(shares, (num_seeds, num_images, num_seeds * num_images)))
    sizes = (num_seeds, 1), (1, num_images), (num_seeds, num_images)
    effects = sum(scale * source.normal(size=(num_draws, *s)) for scale, s in zip(scales, sizes))
    reference = 3 * shared(num_seeds, num_images)
    return reference + TRUTH + effects, reference


def intervals(call, values, *others):
    return np.array([call(one, *others) for one in values]).T


def coverage(bounds, truth=TRUTH):
    return np.mean((bounds[1] <= truth) & (truth <= bounds[2]))


def assert_within(share, low, high, num_draws=NUM_DRAWS):
    """Within 3.5 standard errors of a share that is truly between low and high."""
    errors = [3.5 * np.sqrt(p * (1 - p) / num_draws) for p in (low, high)]
    assert low - errors[0] <= share <= high + errors[1], share


NOMINAL = (0.945, 0.957)
# Shares of the variance of the mean that are the seeds', the images' and the residual's, and for
# each number of seeds what the coverage truly lies between, with 20 to 300 images (from 400,000
# draws of the sums of squares). Intervals of the residual alone are too wide, one-sidedly: where
# the seeds' variance is estimated below 0 it counts for 0, but as known from these few seeds
# only. Satterthwaite's approximation is at its worst in "hardest".
RATIOS = {
    "seeds": ((0.94, 0.01, 0.05), {2: (0.95, 0.98), 3: NOMINAL, 5: NOMINAL}),
    "images": ((0.01, 0.94, 0.05), {2: NOMINAL, 3: NOMINAL, 5: NOMINAL}),
    "balanced": ((0.4, 0.4, 0.2), {2: (0.955, 0.98), 3: (0.95, 0.97), 5: NOMINAL}),
    "residual": ((0.0, 0.0, 1.0), {2: (0.99, 1), 3: (0.99, 1), 5: (0.99, 1)}),
    "hardest": ((0.9, 0.1, 0.0), {2: (0.87, 0.885), 3: (0.92, 0.928), 5: (0.94, 0.945)}),
}


@pytest.mark.parametrize("num_images", [20, 300])
@pytest.mark.parametrize("num_seeds", [2, 3, 5])
@pytest.mark.parametrize("ratio", RATIOS)
def test_paired_intervals_hold_the_truth(ratio, num_seeds, num_images):
    shares, truly = RATIOS[ratio]
    bounds = intervals(paired_difference, *simulate(shares, num_seeds, num_images))
    assert_within(coverage(bounds), *truly[num_seeds])
    # as often as they exclude it, they do so on either side
    missed = [np.mean(bounds[1] > TRUTH), np.mean(bounds[2] < TRUTH)]
    assert max(missed) <= (1 - truly[num_seeds][0]) / 2 + 3.5 * np.sqrt(0.05 / NUM_DRAWS)


@pytest.mark.parametrize(("num_seeds", "truly"), [(2, 0.894), (3, 0.84), (5, 0.824), (10, 0.84)])
def test_intervals_of_lognormal_seeds_are_too_narrow(num_seeds, truly):
    """The shares are those of 20,000 other draws; the report and the docstring state them."""
    source = np.random.default_rng((4, num_seeds))
    effects = np.exp(source.normal(size=(8 * NUM_DRAWS, num_seeds)))
    share = coverage(intervals(mean_interval, effects), np.exp(0.5))
    assert_within(share, truly - 0.005, truly + 0.005, 8 * NUM_DRAWS)


@pytest.mark.parametrize("num_images", [20, 300])
def test_paired_intervals_of_one_seed_hold_what_that_seed_has(num_images):
    """Where trainings do not differ: of their spread one seed tells nothing, as its coverage does.

    Residual and images' effects cannot be told apart and need not be.
    """
    bounds = intervals(paired_difference, *simulate((0, 0.5, 0.5), 1, num_images))
    assert_within(coverage(bounds), 0.95, 0.95)
    bounds = intervals(paired_difference, *simulate((0.9, 0.1, 0), 1, num_images))
    assert coverage(bounds) < 0.6


@pytest.mark.parametrize(
    ("ratio", "naive"),
    [
        ("seeds", lambda difference: mean_interval(difference.ravel())),
        ("images", lambda difference: mean_interval(difference.ravel())),
        ("balanced", lambda difference: mean_interval(difference.ravel())),
        ("seeds", lambda difference: mean_interval(difference.mean(axis=0))),
        ("images", lambda difference: mean_interval(difference.mean(axis=1))),
    ],
)
def test_intervals_of_one_kind_of_chance_miss_the_truth(ratio, naive):
    """All values as independent ones, images alone and seeds alone; both kinds at once do not."""
    values, reference = simulate(RATIOS[ratio][0], 3, 300, num_draws=200)
    assert coverage(intervals(naive, values - reference)) < 0.85
    assert coverage(intervals(mean_interval, values - reference)) > 0.9


@pytest.mark.parametrize("level", [0.5, 0.8, 0.99])
def test_other_levels_are_kept(level):
    values, reference = simulate((0.4, 0.4, 0.2), 5, 20)
    bounds = np.array([paired_difference(one, reference, level) for one in values]).T
    assert_within(coverage(bounds), level - 0.01, level + 0.02 if level < 0.9 else 0.996)


@pytest.mark.parametrize("of_seeds", [False, True])
def test_pairing_narrows_the_intervals_of_arms_with_shared_chance(of_seeds):
    """The shared effects, ten times as large as the others, cancel in the differences."""
    source = np.random.default_rng(0)

    def effects(size):
        both = size * source.normal(size=(NUM_DRAWS, 5, 1))
        return both if of_seeds else both + size * source.normal(size=(NUM_DRAWS, 1, 60))

    reference = effects(1.0)
    values = reference + TRUTH + effects(0.1)
    if of_seeds:
        values, reference = values[:, :, 0], reference[:, :, 0]
    paired = np.array([paired_difference(*arms) for arms in zip(values, reference)]).T
    alone = np.array([mean_interval(arm) for arm in values]).T
    assert np.mean(paired[2] - paired[1]) < np.mean(alone[2] - alone[1]) / 8
    assert_within(coverage(paired), 0.94, 0.957)


# What is said of arms


def arms(**means):
    """Arms that differ from each other by their means, give or take 0.1."""
    noise = np.array([-0.1, 0.0, 0.1])
    of_both = np.array([10.0, 20.0, 30.0])
    return {
        name: of_both + mean + np.roll(noise, shift)
        for shift, (name, mean) in enumerate(means.items())
    }


@pytest.mark.parametrize(
    ("means", "expected"),
    [
        ({"r": 0, "a": -5}, {"r": "", "a": "best"}),
        ({"r": 0, "a": 5}, {"r": "best", "a": "worse"}),
        ({"r": 0, "a": -5, "b": -9}, {"r": "", "a": "better", "b": "best"}),
        ({"r": 0, "a": -5, "b": 5}, {"r": "", "a": "best", "b": "worse"}),
        ({"r": 0, "a": 5, "b": 9}, {"r": "best", "a": "worse", "b": "worse"}),
        ({"a": 5, "r": 0, "b": 9}, {"a": "worse", "r": "best", "b": "worse"}),
        # one that cannot be told from the reference keeps it from being the best
        ({"r": 0, "a": 0.02, "b": 9}, {"r": "", "a": "", "b": "worse"}),
        # nor is it the best itself, though it is lowest
        ({"r": 0, "a": -0.02, "b": 9}, {"r": "", "a": "", "b": "worse"}),
        ({"r": 0, "a": -0.02, "b": 0.02}, {"r": "", "a": "", "b": ""}),
        # the lowest is the best though the next is not told apart from it
        ({"r": 0, "a": -5, "b": -5.01}, {"r": "", "a": "better", "b": "best"}),
        ({"r": 0}, {"r": ""}),
    ],
)
def test_marks(means, expected):
    values = arms(**means)
    assert marks(values, "r") == expected
    crossed = {name: arm[:, None] + np.linspace(0, 1, 4) for name, arm in values.items()}
    assert marks(crossed, "r") == expected
    assert list(marks(values, "r")) == list(means)


def test_marks_of_equal_arms():
    values = arms(r=0)["r"]
    assert marks({"r": values, "a": values}, "r") == {"r": "", "a": ""}
    both = {"r": values, "a": values - 5, "b": values - 5}
    assert marks(both, "r") == {"r": "", "a": "best", "b": "better"}
    assert not_told_apart(both) == ("a", ["b"])


def test_marks_depend_on_the_level():
    values = arms(r=0, a=-0.5)
    assert marks(values, "r", 0.5) == {"r": "", "a": "best"}
    assert marks(values, "r", 0.999) == {"r": "", "a": ""}
    assert not_told_apart(values, 0.5) == ("a", [])
    assert not_told_apart(values, 0.999) == ("a", ["r"])


@pytest.mark.parametrize(
    ("means", "expected"),
    [
        ({"a": 0}, ("a", [])),
        ({"a": 0, "b": -5, "c": 9}, ("b", [])),
        ({"a": 0.02, "b": 5, "c": 0}, ("c", ["a"])),
        ({"a": 0.02, "b": 0, "c": 0.03}, ("b", ["a", "c"])),
    ],
)
def test_not_told_apart(means, expected):
    assert not_told_apart(arms(**means)) == expected


@pytest.mark.parametrize(("shape", "level"), [((3,), 0.95), ((5, 20), 0.95), ((5, 20), 0.8)])
def test_equal_arms_are_marked_as_often_as_the_level_says(shape, level):
    """A share of 1 - level of those that are not the reference, half of it to either side."""
    source = np.random.default_rng(0)

    def draw():
        if len(shape) == 1:
            return source.normal(size=shape)
        return source.normal(size=(shape[0], 1)) + 2 * source.normal(size=(1, shape[1]))

    said_of_draws = []
    for _ in range(NUM_DRAWS):
        said = marks({name: draw() for name in ("r", "a", "b")}, "r", level)
        said_of_draws.append([said["a"], said["b"]])
    marked = np.array(said_of_draws)
    # All have the reference in common, so that the arms of one draw count for one.
    for share, expected in (
        (np.mean(marked != ""), 1 - level),
        (np.mean(marked == "worse"), (1 - level) / 2),
    ):
        assert_within(share, expected, expected)


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        ((2.0, 1.0, 3.0), True),
        ((-2.0, -3.0, -1.0), True),
        ((1.0, -1.0, 3.0), False),
        ((1.0, 0.0, 2.0), False),
        ((-1.0, -2.0, 0.0), False),
        ((1.0, -np.inf, np.inf), False),
    ],
)
def test_excludes_zero(interval, expected):
    assert excludes_zero(Interval(*interval)) is expected


X = np.arange(12.0).reshape(3, 4)
HOLED = np.where(X == 5, np.nan, X)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: mean_interval(HOLED),
            r"^values = array of shape \(3, 4\): must be finite, of one",
        ),
        (lambda: mean_interval(X / 0.0), "must be finite, of one"),
        (lambda: mean_interval(X[:0]), "one seed and one image or more"),
        (lambda: mean_interval(X[:, :0]), "one seed and one image or more"),
        (lambda: mean_interval(X, 0.0), "level = 0.0: must be between 0 and 1"),
        (lambda: mean_interval(X, 95.0), "level = 95.0"),
        (lambda: mean_interval(X[0], np.nan), "level = nan"),
        (lambda: paired_difference(X, HOLED), "reference = .*finite"),
        (lambda: paired_difference(HOLED, X), "values = .*finite"),
        (lambda: paired_difference(X, X[:2]), r"shapes \(3, 4\) and \(2, 4\)"),
        (lambda: paired_difference(X, X[:, 0]), r"shapes \(3, 4\) and \(3,\)"),
        (lambda: paired_difference(X, X, 1.0), "level = 1.0"),
        (lambda: marks({"a": X, "b": X}, "c"), "reference = 'c': must be one of a, b"),
        (lambda: marks({"a": X, "b": X[1:]}, "a"), r"values\['b'\] = .*'a''s shape, \(3, 4\)"),
        (lambda: marks({"a": X, "b": HOLED}, "a"), r"values\['b'\] = .*finite"),
        (lambda: marks({"a": X}, "a", 2.0), "level = 2.0"),
        (lambda: not_told_apart({}), "one arm or more"),
        (lambda: not_told_apart({"a": X, "b": HOLED}), r"values\['b'\] = .*finite"),
        (lambda: not_told_apart({"a": X, "b": X[:, 1:] + 1}), r"values\['b'\].*'a''s shape"),
        (lambda: not_told_apart({"a": X, "b": X}, 1.0), "level = 1.0"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
