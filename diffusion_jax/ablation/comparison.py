"""Whether the arms of an ablation differ: intervals over the seeds and the test images.

All arms are trained with the same seeds, hence on equal batches with equal noise, and arms with the
same network start from equal weights. All arms are evaluated on the same images with the same
noise. The effects of seeds and images that all arms share cancel in paired differences. Lower is
better for every score.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats

from diffusion_jax.errors import require
from diffusion_jax.evaluation.interval import Interval

Values = Float[np.ndarray, " seeds"] | Float[np.ndarray, "seeds images"]
Reference = Float[np.ndarray, " seeds_b"] | Float[np.ndarray, "seeds_b images_b"]


def mean_interval(values: Values, level: float = 0.95) -> Interval:
    """The mean with its confidence interval by Student's t, over random seeds and test images.

    With one number per seed, the interval has K - 1 degrees of freedom. With K seeds and N images,
    both are random and crossed, y_ki = mu + a_k + b_i + e_ki, and the variance of the grand mean is
    s^2(means of the seeds) / K + s^2(means of the images) / N - s^2(e) / (K N), because each of the
    first two terms contains the residual once (analysis of variance: Searle, Casella & McCulloch
    1992, chapter 4; two-way clustering: Cameron, Gelbach & Miller 2011; large crossed tables: Owen
    2007, "The pigeonhole bootstrap"). If the first or second term is below the third, the estimated
    variance of a_k or b_i is negative. It is then set to 0, that is, the term is raised to the
    third. The degrees of freedom are those of Satterthwaite (1946) for the three terms, and at
    least the smaller of K - 1 and N - 1.

    Satterthwaite's degrees of freedom are too many if the variance of a few seeds is small by
    chance. With normal effects, the 95 % interval contains the true mean in at least 87 % of cases
    with two seeds, 92 % with three and 94 % with five. The worst case is an a_k that contributes
    about ten times as much variance to the mean as b_i. With two seeds and mostly residual, the
    interval is too wide and always contains the true mean. With lognormal effects of
    seeds (sigma = 1) it contains the true mean in 89 % of cases with two seeds, and in 82 to 84 %
    with three to ten.

    With one seed, the interval is over the images alone and does not show how much trainings
    differ. With one image, the interval is over the seeds. With one number, it is infinite.

    Raises:
        ValueError: there are no values, one is not finite, or the level is outside (0, 1).
    """
    _check("values", values)
    return _interval(_mean(values), level)


def paired_difference(values: Values, reference: Reference, level: float = 0.95) -> Interval:
    """The mean difference between two arms that share seeds and images, with its interval.

    It is ``mean_interval`` of values - reference. If the interval excludes 0, the arms differ.

    Raises:
        ValueError: as in ``mean_interval``, or the arms have different shapes.
    """
    _check_pair(values, reference)
    difference = values.astype(np.float64) - reference.astype(np.float64)
    return _interval(_mean(difference), level)


def excludes_zero(interval: Interval) -> bool:
    """Whether 0 is outside the closed interval."""
    return interval.low > 0 or interval.high < 0


def marks(values: dict[str, Values], reference: str, level: float = 0.95) -> dict[str, str]:
    """Mark each arm by its paired difference to the reference: "best", "better", "worse" or "".

    An arm is "better" than the reference if the interval of its difference is below 0, and "worse"
    if the interval is above 0. The arm with the lowest mean is "best" if it is better than the
    reference. The reference is "best" if all other arms are worse. Other arms may be as good as the
    best one: see ``not_told_apart``. A single arm has no mark.

    The comparisons are not corrected for their number: of the arms that equal the reference, a
    share of 1 - level is marked by chance.

    Raises:
        ValueError: as in ``paired_difference``, or the reference is not among the arms.
    """
    require(reference in values, "reference", reference, f"one of {', '.join(values)}")
    differences = _against(reference, values, level)
    del differences[reference]
    by_arm = marks_of(differences, reference)
    return {name: by_arm[name] for name in values}


def marks_of(differences: dict[str, Interval], reference: str) -> dict[str, str]:
    """As ``marks``, from the differences of the other arms to the reference arm."""
    by_arm = dict.fromkeys([*differences, reference], "")
    for name, difference in differences.items():
        if excludes_zero(difference):
            by_arm[name] = "worse" if difference.low > 0 else "better"
    if differences and all(by_arm[name] == "worse" for name in differences):
        by_arm[reference] = "best"
    lowest = min(differences, key=lambda name: differences[name].value, default=reference)
    if by_arm[lowest] == "better":
        by_arm[lowest] = "best"
    return by_arm


def not_told_apart(values: dict[str, Values], level: float = 0.95) -> tuple[str, list[str]]:
    """The arm with the lowest mean, and the arms that do not differ from it significantly.

    The interval of the paired difference of such an arm to the lowest one contains 0. The lowest
    arm is chosen by the same values, so it is the lowest partly by chance: among three or more
    equal arms, the list lacks one more often than in a share of 1 - level.

    Raises:
        ValueError: as in ``paired_difference``, or there are no arms.
    """
    require(len(values), "values", values, "one arm or more")
    for name, arm in values.items():
        _check(f"values[{name!r}]", arm)
    lowest = min(values, key=lambda name: values[name].mean(dtype=np.float64))
    differences = _against(lowest, values, level)
    equal = [name for name, interval in differences.items() if not excludes_zero(interval)]
    return lowest, [name for name in equal if name != lowest]


def _against(reference: str, values: dict[str, Values], level: float) -> dict[str, Interval]:
    """The paired difference of every arm, the reference included, to the reference."""
    shape = values[reference].shape
    for name, arm in values.items():
        field = f"values[{name!r}]"
        _check(field, arm)
        require(arm.shape == shape, field, arm, f"of {reference!r}'s shape, {shape}")
    return {name: paired_difference(arm, values[reference], level) for name, arm in values.items()}


def _check(field: str, values: Values) -> None:
    allowed = "finite, of one seed and one image or more"
    require(values.size > 0 and np.isfinite(values).all(), field, values, allowed)


def _check_pair(values: Values, reference: Reference) -> None:
    _check("values", values)
    _check("reference", reference)
    if values.shape != reference.shape:
        raise ValueError(f"arms of shapes {values.shape} and {reference.shape} cannot be compared")


class _Mean(NamedTuple):
    """A mean, the estimated variance of this mean, and the variance's degrees of freedom."""

    value: float
    variance: float
    freedom: float


def _mean(values: Values) -> _Mean:
    values = values.astype(np.float64)
    value = float(values.mean())
    if values.size == 1:
        return _Mean(value, np.inf, 1.0)
    if values.ndim == 1 or 1 in values.shape:  # only the seeds vary, or only the images
        return _Mean(value, float(values.var(ddof=1)) / values.size, values.size - 1.0)

    num_seeds, num_images = values.shape
    of_seeds, of_images = values.mean(axis=1), values.mean(axis=0)
    residual = values - of_seeds[:, None] - of_images[None, :] + value
    freedom = (num_seeds - 1.0, num_images - 1.0)
    shared = float((residual**2).sum()) / (freedom[0] * freedom[1]) / values.size
    # The maximum also limits the degrees of freedom if the variance of a few seeds is small by
    # chance; otherwise they would be those of the many images.
    seeds = max(float(of_seeds.var(ddof=1)) / num_seeds, shared)
    images = max(float(of_images.var(ddof=1)) / num_images, shared)
    variance = seeds + images - shared
    parts = zip((seeds, images, shared), (*freedom, freedom[0] * freedom[1]))
    return _Mean(value, variance, _freedom(variance, *parts))


def _freedom(total: float, *parts: tuple[float, float]) -> float:
    """Satterthwaite's degrees of freedom of a sum of variances, whose ``parts`` may be subtracted.

    A part is (variance, degrees of freedom). The result is at least the fewest degrees of freedom
    of a part, because subtracting a part can give less.
    """
    fewest = min(freedom for _, freedom in parts)
    if not 0 < total < np.inf:  # the interval is a point, or infinite, for any degrees of freedom
        return fewest
    return max(1 / sum((part / total) ** 2 / freedom for part, freedom in parts), fewest)


def _interval(mean: _Mean, level: float) -> Interval:
    require(0 < level < 1, "level", level, "between 0 and 1")
    half = float(stats.t.isf((1 - level) / 2, mean.freedom)) * np.sqrt(mean.variance)
    return Interval(mean.value, float(mean.value - half), float(mean.value + half))
