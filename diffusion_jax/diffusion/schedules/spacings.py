"""Spacings: the positions of the N steps of a chain, on the timesteps 1..T or between them."""

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


# Spacings on the timesteps: (T, N) -> N of the timesteps 1..T, in ascending order.


def trailing(num_timesteps: int, num_steps: int) -> Timesteps:
    """round(T - i T/N): includes T, where x_T is N(0, I) (diffusers' "trailing")."""
    i = np.arange(num_steps)[::-1]
    return np.round(num_timesteps - i * num_timesteps / num_steps).astype(int)


def leading(num_timesteps: int, num_steps: int) -> Timesteps:
    """1 + i (T // N): includes 1; the largest is below T if N < T (diffusers' "leading")."""
    return 1 + np.arange(num_steps) * (num_timesteps // num_steps)


def linspace(num_timesteps: int, num_steps: int) -> Timesteps:
    """Evenly spaced from 1 to T, rounded (diffusers' "linspace")."""
    if num_steps == 1:  # a single step starts at T, where x_T is N(0, I)
        return np.array([num_timesteps])
    return 1 + np.round(np.linspace(0, num_timesteps - 1, num_steps)).astype(int)


def quadratic(num_timesteps: int, num_steps: int) -> Timesteps:
    """From 1 to 1 + 0.8 T, denser at low noise (DDIM, appendix D.2)."""
    i = np.arange(num_steps)
    t = 1 + 4 * num_timesteps * i**2 // (5 * max(num_steps - 1, 1) ** 2)
    # distinct timesteps: move up where the parabola is too flat, and down where it would exceed T
    return np.minimum(np.maximum.accumulate(t - i) + i, num_timesteps - i[::-1])


# Spacings between the timesteps: (N, first log SNR, last log SNR, rho) -> Grid.


class Grid(NamedTuple):
    """N log SNRs in descending order, and the N - 1 drops from each to the next.

    The drops are computed in closed form, because the difference of two rounded log SNRs is not
    exact.
    """

    log_snr: LogSnrs
    drops: LogSnrs


def _evenly(num_steps: int, first: Scalar, last: Scalar) -> tuple[LogSnrs, Scalar]:
    """Evenly spaced points from first to last, and the step; a single point is at last (x_T)."""
    xp: ModuleType = jnp if isinstance(first, jax.Array) else np
    weight = np.linspace(0, 1, num_steps) if num_steps > 1 else np.ones(1)
    points = xp.asarray(first) * (1 - weight) + xp.asarray(last) * weight
    return points, (last - first) / max(num_steps - 1, 1)


def log_snr(num_steps: int, first: Scalar, last: Scalar, rho: Scalar) -> Grid:
    """Evenly spaced in log SNR (the grid of DPM-Solver, Lu et al. 2022)."""
    del rho
    points, step = _evenly(num_steps, first, last)
    return Grid(points, -step * np.ones(num_steps - 1))


def karras(num_steps: int, first: Scalar, last: Scalar, rho: Scalar) -> Grid:
    """Evenly spaced in sigma^(1/rho), sigma = exp(-log SNR / 2) (Karras et al. 2022, eq. 5)."""
    xp: ModuleType = jnp if isinstance(first, jax.Array) else np
    points, step = _evenly(num_steps, *(xp.exp(-end / (2 * rho)) for end in (first, last)))
    inner = xp.clip(-2 * rho * xp.log(points), last, first)  # the ends are exact
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
