"""An estimate with its confidence interval."""

from typing import NamedTuple


class Interval(NamedTuple):
    """An estimate and the two ends of its confidence interval."""

    value: float
    low: float
    high: float
