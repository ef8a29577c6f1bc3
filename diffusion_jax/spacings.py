"""Which N of the timesteps 1..T a shorter chain keeps, in ascending order."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Int

Timesteps = Int[np.ndarray, " num_steps"]


def trailing(num_timesteps: int, num_steps: int) -> Timesteps:
    """round(T - i T/N): begins at T, where N(0, I) is true (diffusers' "trailing")."""
    i = np.arange(num_steps)[::-1]
    return np.round(num_timesteps - i * num_timesteps / num_steps).astype(int)


def leading(num_timesteps: int, num_steps: int) -> Timesteps:
    """1 + i (T // N): ends at 1 and begins short of T (diffusers' "leading")."""
    return 1 + np.arange(num_steps) * (num_timesteps // num_steps)


def linspace(num_timesteps: int, num_steps: int) -> Timesteps:
    """Evenly from 1 to T (diffusers' "linspace")."""
    if num_steps == 1:  # both ends cannot stay: begin where N(0, I) is true
        return np.array([num_timesteps])
    return 1 + np.round(np.linspace(0, num_timesteps - 1, num_steps)).astype(int)


def quadratic(num_timesteps: int, num_steps: int) -> Timesteps:
    """From 1 to 1 + 0.8 T, denser where there is little noise (DDIM, appendix D.2)."""
    i = np.arange(num_steps)
    t = 1 + 4 * num_timesteps * i**2 // (5 * max(num_steps - 1, 1) ** 2)
    # Steps of at least one row, also where the parabola is flatter, that leave room for the rest
    return np.minimum(np.maximum.accumulate(t - i) + i, num_timesteps - i[::-1])


SPACINGS: dict[str, Callable[[int, int], Timesteps]] = {
    "trailing": trailing,
    "leading": leading,
    "linspace": linspace,
    "quadratic": quadratic,
}
