"""Format the numbers of a report: in sentences, in the table, at the ticks of an axis."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from diffusion_jax.evaluation.interval import Interval

if TYPE_CHECKING:
    from matplotlib.axis import Axis


def short_number(value: float) -> str:
    """A number with three significant digits; a dash if it is not finite."""
    if not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    if abs(value) >= 1e-3:
        return with_minus(f"{value:#.3g}".rstrip("."))
    mantissa, exponent = f"{value:.2e}".split("e")
    return with_minus(f"{mantissa}e{int(exponent)}")


def with_minus(number: str) -> str:
    """A number with a minus sign instead of a hyphen."""
    return number.replace("-", "−")


def decimals(intervals: Sequence[Interval]) -> int:
    """The number of decimals, at most six, that gives the median half-width two significant digits.

    Without a finite half-width, the largest value gets four significant digits.
    """
    halves = [(interval.high - interval.low) / 2 for interval in intervals]
    halves = [half for half in halves if math.isfinite(half) and half > 0]
    if halves:
        return int(np.clip(1 - math.floor(math.log10(np.median(halves))), 0, 6))
    sizes = [abs(interval.value) for interval in intervals]
    largest = max((size for size in sizes if math.isfinite(size) and size > 0), default=1.0)
    return int(np.clip(3 - math.floor(math.log10(largest)), 0, 6))


def describe_interval(interval: Interval) -> str:
    """A number and its interval as text; the number alone if the interval is infinite."""
    half = (interval.high - interval.low) / 2
    if not math.isfinite(half):
        return f"{interval.value:.4g}"
    digits = decimals([interval])
    value, low, high = (f"{x:.{digits}f}" for x in interval)
    return f"{value} (95 % interval {low} to {high})"


def set_logarithmic_ticks(axis: "Axis") -> None:
    """Set the ticks of a logarithmic axis as plain numbers, because mathtext is switched off."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = sorted(axis.get_view_interval())
    is_narrow = low > 0 and high / low < 100
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if is_narrow else (1,), numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _plain_number(value)))
    axis.set_minor_locator(NullLocator())


def _plain_number(value: float) -> str:
    if 1e-4 <= value < 1e6:
        return f"{value:.10f}".rstrip("0").rstrip(".")
    mantissa, exponent = f"{value:e}".split("e")
    return with_minus(f"{float(mantissa):g}e{int(exponent)}")


def set_step_ticks(axis: "Axis") -> None:
    """Set the ticks of an axis of training steps, for example 5000 and 20k."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(
        FuncFormatter(lambda step, _: f"{step / 1000:g}k" if abs(step) >= 10_000 else f"{step:g}")
    )
