"""Checks of the numbers that a function of the library is given."""

from collections.abc import Callable
from typing import Any

import jax


def require(field: str, value: Any, holds: Callable[[Any], Any], allowed: str) -> None:
    """Refuse a value that is known and does not hold; one traced by jax has no number yet.

    Raises:
        ValueError: in one line, "field = value: must be allowed".
    """
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(value))
    if not traced and not holds(value):
        shown = f"array of shape {value.shape}" if getattr(value, "ndim", 0) else value
        raise ValueError(f"{field} = {shown}: must be {allowed}")
