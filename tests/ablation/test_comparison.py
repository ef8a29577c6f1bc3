"""Confidence intervals against scipy, written-out sums and simulations; the marks of arms."""

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

TRUTH = 0.7  # the true difference of the two arms of a simulation
NUM_DRAWS = 350


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


# Against scipy and written-out sums


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


def test_intervals_of_one_seed_are_over_the_images_and_of_one_image_over_the_seeds():
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
    """Mean squares of the two-way analysis of variance with one value in each cell."""
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
    """Variance of the mean and its degrees of freedom; no variance component is below 0."""
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
    """If all means are equal, the residual's variance counts with the fewest degrees of freedom."""
    values = np.array([[1.0, -1.0], [-1.0, 1.0]])
    assert sums_of_squares(values) == (0, 0, 4)
    half = stats.t.ppf(0.975, 1) * np.sqrt(4 / 4)
    np.testing.assert_allclose(mean_interval(values), (0, -half, half), rtol=1e-10)
    # with an effect of seeds alone: (s_a^2 + s_e^2 / N) / K, as if only seeds varied
    values += [[5.0], [-5.0]]
    assert sums_of_squares(values) == (100, 0, 4)
    interval = mean_interval(values)
    assert interval.high == pytest.approx(half * np.sqrt(100 / 4), rel=0.02)


def test_the_variance_of_the_mean_is_unbiased():
    """It has every term once; in this simulation few variance components are cut off at 0."""
    values, reference = simulate((0.5, 0.3, 0.2), 5, 20, num_draws=1000)
    variances = [comparison._mean(one).variance for one in values - reference]
    error = np.std(variances) / np.sqrt(len(variances))
    assert error < 0.025
    assert np.mean(variances) == pytest.approx(1, abs=4 * error)


def test_intervals_shift_and_scale_with_the_values():
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


# Against simulations with a known difference


def shared(num_seeds, num_images):
    """The effects of seeds and images that both arms share, larger than their difference."""
    return 3 * (normal(num_seeds, 1, seed=8) + normal(num_seeds, num_images, seed=9))


def simulate(shares, num_seeds, num_images, num_draws=NUM_DRAWS, seed=0):
    """Draws of an arm, [draws, seeds, images], and its reference arm, [seeds, images].

    The difference has effects of seeds, of images, and a residual. ``shares`` are their parts of
    the variance of its mean. The parts add up to 1, so the standard deviation of the mean is 1.
    """
    source = np.random.default_rng((seed, num_seeds, num_images))
    scales = np.sqrt(np.multiply(shares, (num_seeds, num_images, num_seeds * num_images)))
    sizes = (num_seeds, 1), (1, num_images), (num_seeds, num_images)
    effects = sum(scale * source.normal(size=(num_draws, *s)) for scale, s in zip(scales, sizes))
    reference = 3 * shared(num_seeds, num_images)
    return reference + TRUTH + effects, reference


def intervals(call, values, *others):
    """The values, low ends and high ends of the intervals of many draws."""
    return np.array([call(one, *others) for one in values]).T


def coverage(bounds, truth=TRUTH):
    """The fraction of intervals that contain the true value."""
    return np.mean((bounds[1] <= truth) & (truth <= bounds[2]))


def assert_within(share, low, high, num_draws=NUM_DRAWS):
    """Assert a measured share, within 3.5 standard errors of a true share in [low, high]."""
    errors = [3.5 * np.sqrt(p * (1 - p) / num_draws) for p in (low, high)]
    assert low - errors[0] <= share <= high + errors[1], share


NOMINAL = (0.945, 0.957)
# Shares of the variance of the mean that belong to seeds, images and the residual, and for each
# number of seeds the range of the true coverage with 20 to 300 images (from 400,000 draws of the
# sums of squares). Intervals of the residual alone are too wide and never too narrow: a seed
# variance that is estimated below 0 counts as 0, but with the few degrees of freedom of the seeds.
# Satterthwaite's approximation is at its worst in "hardest".
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
def test_paired_intervals_contain_the_true_difference(ratio, num_seeds, num_images):
    shares, truly = RATIOS[ratio]
    bounds = intervals(paired_difference, *simulate(shares, num_seeds, num_images))
    assert_within(coverage(bounds), *truly[num_seeds])
    # They miss it equally often on either side
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
def test_paired_intervals_of_one_seed_cover_only_the_variation_of_images(num_images):
    """They contain the true difference if seeds have no effect, and miss it often if they have one.

    With one seed the effects of images and the residual cannot be separated, and need not be.
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
def test_intervals_of_one_source_of_variation_miss_the_true_difference(ratio, naive):
    """The naive intervals take all values as independent, or average over seeds or images first.

    Intervals with both sources contain the true difference.
    """
    values, reference = simulate(RATIOS[ratio][0], 3, 300, num_draws=200)
    assert coverage(intervals(naive, values - reference)) < 0.85
    assert coverage(intervals(mean_interval, values - reference)) > 0.9


@pytest.mark.parametrize("level", [0.5, 0.8, 0.99])
def test_intervals_of_other_levels_have_their_coverage(level):
    values, reference = simulate((0.4, 0.4, 0.2), 5, 20)
    bounds = np.array([paired_difference(one, reference, level) for one in values]).T
    assert_within(coverage(bounds), level - 0.01, level + 0.02 if level < 0.9 else 0.996)


@pytest.mark.parametrize("of_seeds", [False, True])
def test_pairing_narrows_the_intervals_of_arms_with_shared_effects(of_seeds):
    """Shared effects are ten times as large as the others, and cancel in the differences."""
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


# The marks of arms


def arms(**means):
    """Arms of three seeds with these means, whose differences have a noise of 0.1."""
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
        # a reference that is lowest but not significantly so is not the best
        ({"r": 0, "a": 0.02, "b": 9}, {"r": "", "a": "", "b": "worse"}),
        # an arm that is lowest but not significantly below the reference is not the best
        ({"r": 0, "a": -0.02, "b": 9}, {"r": "", "a": "", "b": "worse"}),
        ({"r": 0, "a": -0.02, "b": 0.02}, {"r": "", "a": "", "b": ""}),
        # the lowest is the best even if the next one does not differ significantly from it
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
    """Of the arms that are not the reference a share of 1 - level is marked, half as worse."""
    source = np.random.default_rng(0)

    def draw():
        if len(shape) == 1:
            return source.normal(size=shape)
        return source.normal(size=(shape[0], 1)) + 2 * source.normal(size=(1, shape[1]))

    marks_of_draws = []
    for _ in range(NUM_DRAWS):
        of_arms = marks({name: draw() for name in ("r", "a", "b")}, "r", level)
        marks_of_draws.append([of_arms["a"], of_arms["b"]])
    marked = np.array(marks_of_draws)
    # The arms of one draw share the reference, so they count as one observation
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
def test_impossible_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
