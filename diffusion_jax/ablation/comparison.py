"""Whether the arms of an ablation differ: intervals over the seeds and the test images.

All arms are trained with the same seeds, hence from equal initial weights on equal batches and
noise, and are tested on the same images under the same noise. The effects of seeds and images that
all arms share cancel in paired differences. Lower is better for every score.
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
    """The mean and its interval by Student's t, over other seeds and other images.

    One number per seed gives K - 1 degrees of freedom. With K seeds and N images both are random
    and crossed, y_ki = mu + a_k + b_i + e_ki, and the grand mean has the variance
    s^2(means of the seeds) / K + s^2(means of the images) / N - s^2(e) / (K N), because each of the
    first two terms contains the residual once (the analysis of variance: Searle, Casella &
    McCulloch 1992, chapter 4; as two-way clustering Cameron, Gelbach & Miller 2011; of large
    crossed tables Owen 2007, "The pigeonhole bootstrap"). A first or second term below the third
    means a negative variance of a_k or b_i, which is set to 0: neither counts for less than the
    third. The degrees of freedom are Satterthwaite's (1946) of the three terms, and at least the
    smaller of K - 1 and N - 1.

    Satterthwaite's degrees of freedom are too many if the variance of a few seeds is small by
    chance. With normal effects the 95 % interval holds the truth, in the worst case (a_k having
    about ten times as much of the variance of the mean as b_i), 87 times in 100 with two seeds,
    92 with three, 94 with five. With two seeds and mostly residual it always holds it, being wider
    than necessary.

    One seed with images gives the interval over the images alone, which says nothing about the
    spread of trainings; several seeds with one image give the interval over the seeds. The interval
    of a single number is infinite.

    Raises:
        ValueError: no values, one that is not finite, or a level outside (0, 1).
    """
    _check("values", values)
    return _interval(_mean(values), level)


def paired_difference(values: Values, reference: Reference, level: float = 0.95) -> Interval:
    """The mean difference of an arm to another arm with the same seeds and images.

    It is ``mean_interval`` of values - reference. If it excludes 0, the arms differ.

    Raises:
        ValueError: as mean_interval, or arms of different shapes.
    """
    _check_pair(values, reference)
    difference = values.astype(np.float64) - reference.astype(np.float64)
    return _interval(_mean(difference), level)


def excludes_zero(interval: Interval) -> bool:
    """Whether 0 lies outside; an end that is 0 does not exclude it."""
    return interval.low > 0 or interval.high < 0


def marks(values: dict[str, Values], reference: str, level: float = 0.95) -> dict[str, str]:
    """The mark of each arm: "best", "better", "worse" or "".

    An arm is "better" or "worse" than the reference if its paired interval against it is below or
    above 0. The arm with the lowest mean is the "best" if it is better than the reference, or if it
    is the reference and all others are worse; it may be equal to other arms, which
    ``not_told_apart`` names. A single arm has no mark.

    Every arm is compared at the level by itself: among arms that equal the reference, a share of
    1 - level is marked by chance.

    Raises:
        ValueError: as paired_difference, or the reference is not among the arms.
    """
    require(reference in values, "reference", reference, f"one of {', '.join(values)}")
    differences = _against(reference, values, level)
    del differences[reference]
    by_arm = marks_of(differences, reference)
    return {name: by_arm[name] for name in values}


def marks_of(differences: dict[str, Interval], reference: str) -> dict[str, str]:
    """``marks`` from the differences of the other arms to the reference arm."""
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
    """The arm with the lowest mean, and the others whose paired interval against it holds 0.

    The arm is chosen by the same values and is lowest partly by chance: among three or more equal
    arms, one is missing from the list more often than in a share of 1 - level.

    Raises:
        ValueError: as paired_difference, or there are no arms.
    """
    require(len(values), "values", values, "one arm or more")
    for name, arm in values.items():
        _check(f"values[{name!r}]", arm)
    lowest = min(values, key=lambda name: values[name].mean(dtype=np.float64))
    differences = _against(lowest, values, level)
    equal = [name for name, interval in differences.items() if not excludes_zero(interval)]
    return lowest, [name for name in equal if name != lowest]


def _against(reference: str, values: dict[str, Values], level: float) -> dict[str, Interval]:
    """The paired interval of every arm; that of the reference is 0 to 0."""
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
    """A mean, its estimated variance, and the degrees of freedom of the variance."""

    value: float
    variance: float
    freedom: float


def _mean(values: Values) -> _Mean:
    values = values.astype(np.float64)
    value = float(values.mean())
    if values.size == 1:
        return _Mean(value, np.inf, 1.0)
    if values.ndim == 1 or 1 in values.shape:  # one kind of effect, of seeds or of images
        return _Mean(value, float(values.var(ddof=1)) / values.size, values.size - 1.0)

    num_seeds, num_images = values.shape
    of_seeds, of_images = values.mean(axis=1), values.mean(axis=0)
    residual = values - of_seeds[:, None] - of_images[None, :] + value
    freedom = (num_seeds - 1.0, num_images - 1.0)
    shared = float((residual**2).sum()) / (freedom[0] * freedom[1]) / values.size
    # The maximum also keeps the degrees of freedom few if the variance of a few seeds is small by
    # chance; otherwise it would count as known to be small.
    seeds = max(float(of_seeds.var(ddof=1)) / num_seeds, shared)
    images = max(float(of_images.var(ddof=1)) / num_images, shared)
    variance = seeds + images - shared
    parts = zip((seeds, images, shared), (*freedom, freedom[0] * freedom[1]))
    return _Mean(value, variance, _freedom(variance, *parts))


def _freedom(total: float, *parts: tuple[float, float]) -> float:
    """Satterthwaite's degrees of freedom of a sum of (variance, degrees of freedom), signs aside.

    They are at least those of the part with the fewest: a part that is subtracted could bring them
    below that.
    """
    fewest = min(freedom for _, freedom in parts)
    if not 0 < total < np.inf:  # no variance, or no estimate of it: they make no difference
        return fewest
    return max(1 / sum((part / total) ** 2 / freedom for part, freedom in parts), fewest)


def _interval(mean: _Mean, level: float) -> Interval:
    require(0 < level < 1, "level", level, "between 0 and 1")
    half = float(stats.t.isf((1 - level) / 2, mean.freedom)) * np.sqrt(mean.variance)
    return Interval(mean.value, float(mean.value - half), float(mean.value + half))
