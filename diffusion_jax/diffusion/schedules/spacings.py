"""The positions of the N steps of a chain: on N of the timesteps 1..T, or between them."""

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Timesteps = Int[np.ndarray, " num_steps"]
LogSnrs = Float[np.ndarray, " _"] | Float[Array, " _"]
Scalar = float | np.floating | Float[Array, ""]


# On the timesteps, in ascending order: (T, N) -> timesteps.


def trailing(num_timesteps: int, num_steps: int) -> Timesteps:
    """round(T - i T/N): starts at T, where x_T is N(0, I) (diffusers' "trailing")."""
    i = np.arange(num_steps)[::-1]
    return np.round(num_timesteps - i * num_timesteps / num_steps).astype(int)


def leading(num_timesteps: int, num_steps: int) -> Timesteps:
    """1 + i (T // N): ends at 1 and starts below T (diffusers' "leading")."""
    return 1 + np.arange(num_steps) * (num_timesteps // num_steps)


def linspace(num_timesteps: int, num_steps: int) -> Timesteps:
    """Evenly from 1 to T (diffusers' "linspace")."""
    if num_steps == 1:  # one step cannot have both ends: start where x_T is N(0, I)
        return np.array([num_timesteps])
    return 1 + np.round(np.linspace(0, num_timesteps - 1, num_steps)).astype(int)


def quadratic(num_timesteps: int, num_steps: int) -> Timesteps:
    """From 1 to 1 + 0.8 T, denser at low noise (DDIM, appendix D.2)."""
    i = np.arange(num_steps)
    t = 1 + 4 * num_timesteps * i**2 // (5 * max(num_steps - 1, 1) ** 2)
    # at least one row per step, also where the parabola is flatter, and room for those that follow
    return np.minimum(np.maximum.accumulate(t - i) + i, num_timesteps - i[::-1])


# Between them: (N, the first and the last log SNR, rho) -> Grid.


class Grid(NamedTuple):
    """N log SNRs in descending order, and how far they fall from each to the next.

    The drops are known in closed form: the difference of two rounded neighbours is not exact.
    """

    log_snr: LogSnrs
    drops: LogSnrs


def _evenly(num_steps: int, first: Scalar, last: Scalar) -> tuple[LogSnrs, Scalar]:
    """From first to last, and the step; a single point is at the last, where x_T is N(0, I)."""
    xp: ModuleType = jnp if isinstance(first, jax.Array) else np
    weight = np.linspace(0, 1, num_steps) if num_steps > 1 else np.ones(1)
    points = xp.asarray(first) * (1 - weight) + xp.asarray(last) * weight
    return points, (last - first) / max(num_steps - 1, 1)


def log_snr(num_steps: int, first: Scalar, last: Scalar, rho: Scalar) -> Grid:
    """Evenly in log SNR (the grid of DPM-Solver, Lu et al. 2022)."""
    del rho
    points, step = _evenly(num_steps, first, last)
    return Grid(points, -step * np.ones(num_steps - 1))


def karras(num_steps: int, first: Scalar, last: Scalar, rho: Scalar) -> Grid:
    """Evenly in sigma^(1/rho), sigma = exp(-log SNR / 2) (Karras et al. 2022, eq. 5)."""
    xp: ModuleType = jnp if isinstance(first, jax.Array) else np
    points, step = _evenly(num_steps, *(xp.exp(-end / (2 * rho)) for end in (first, last)))
    inner = xp.clip(-2 * rho * xp.log(points), last, first)  # the ends to the last digit
    return Grid(inner, 2 * rho * xp.log1p(step / points[:-1]))


SPACINGS: dict[str, Callable[[int, int], Timesteps]] = {
    "trailing": trailing,
    "leading": leading,
    "linspace": linspace,
    "quadratic": quadratic,
}
GRIDS: dict[str, Callable[[int, Scalar, Scalar, Scalar], Grid]] = {
    "log_snr": log_snr,
    "karras": karras,
}
