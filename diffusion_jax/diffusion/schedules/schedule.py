"""A noise schedule as a pytree with one row per timestep, and functions of its rows."""

import dataclasses
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from diffusion_jax.diffusion.trees import map_leaves
from diffusion_jax.errors import require

Scalar = float | int | Float[Array, ""]
Column = Float[Array, "*rows"] | Float[np.ndarray, "*rows"]


@no_type_check  # jax also puts shapes, specs and placeholders in place of the leaves
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Schedule:
    """The chain q(x_t|x_{t-1}) = N(sqrt(alpha_t) x_{t-1}, beta_t I), one row per transition.

    Row i is t = i + 1, and ``len(schedule)`` is T. ``schedule[i]`` is a row with scalar columns,
    ``schedule[a:b]`` a shorter schedule. A schedule is a pytree, so it can be an argument of a
    compiled function: another schedule of the same length does not compile the function again.
    """

    timestep: Float[Array, "*rows"]  # the network's input: 1..T on the native grid
    beta: Float[Array, "*rows"]
    alpha: Float[Array, "*rows"]  # 1 - beta
    alpha_bar: Float[Array, "*rows"]  # product of alpha_1 .. alpha_t
    alpha_bar_prev: Float[Array, "*rows"]  # alpha_bar of the previous row; 1 in the first row
    one_minus_alpha_bar: Float[Array, "*rows"]  # variance of q(x_t|x_0)
    one_minus_alpha_bar_prev: Float[Array, "*rows"]
    posterior_variance: Float[Array, "*rows"]  # beta tilde, the variance of q(x_{t-1}|x_t,x_0)

    def __getitem__(self, index: int | slice | Array | np.ndarray) -> "Schedule":
        # jax clamps an index out of range, so that `for row in schedule` would never end
        if isinstance(index, int) and not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of a schedule of {len(self)} rows")
        if isinstance(index, np.ndarray) and index.dtype != bool:  # -1 is an error, not row T
            outside = index[(index < 0) | (index >= len(self))]
            if outside.size:
                raise IndexError(f"row {outside[0]} of a schedule of {len(self)} rows")
        return map_leaves(lambda column: column[index], self)

    def __len__(self) -> int:
        return self.beta.shape[0]

    @property
    def snr(self) -> Float[Array, "*rows"]:
        """Signal-to-noise ratio alpha_bar / (1 - alpha_bar)."""
        return self.alpha_bar / self.one_minus_alpha_bar

    @property
    def log_snr(self) -> Float[Array, "*rows"]:
        """Natural logarithm of the SNR: -inf at zero terminal SNR, inf at t = 0."""
        return jnp.log(self.alpha_bar) - jnp.log(self.one_minus_alpha_bar)

    @property
    def sigma(self) -> Float[Array, "*rows"]:
        """Noise level sqrt((1 - alpha_bar) / alpha_bar) of EDM and k-diffusion."""
        return jnp.sqrt(self.one_minus_alpha_bar / self.alpha_bar)

    @property
    def posterior_log_variance_clipped(self) -> Float[Array, "*rows"]:
        """Log of beta tilde, whose 0 at t = 1 is replaced by its value at t = 2 (by beta if T = 1).

        Raises:
            ValueError: the schedule is one row. Use this property of the whole schedule instead.
        """
        if self.beta.ndim == 0:
            raise ValueError("posterior_log_variance_clipped: needs a schedule, not a row")
        return jnp.log(clip_posterior_variance(self).posterior_variance)


def terminal_row() -> Schedule:
    """The row t = 0: alpha_bar = 1 and no noise."""
    zero, one = jnp.zeros(()), jnp.ones(())
    return Schedule(zero, zero, one, one, one, zero, zero, zero)


def clip_posterior_variance(schedule: Schedule) -> Schedule:
    """Replace beta tilde's 0 at t = 1 by its value at t = 2 (by beta if T = 1), as iDDPM does.

    L_0 needs a variance above 0, and only L_0 depends on beta tilde at t = 1.
    """
    variance = schedule.posterior_variance
    following = jnp.concatenate([variance[..., 1:], schedule.beta[..., -1:]], axis=-1)
    following = jnp.where(following > 0, following, schedule.beta)  # T = 1, padded
    clipped = jnp.where(variance > 0, variance, following)
    return dataclasses.replace(schedule, posterior_variance=clipped)


def with_terminal_row(schedule: Schedule) -> Schedule:
    """Put the row t = 0 in front: row i of the result is row i - 1 of ``schedule``."""
    return map_leaves(
        lambda first, column: jnp.concatenate([first[None].astype(column.dtype), column]),
        terminal_row(),
        schedule,
    )


def pad(schedule: Schedule, length: int) -> Schedule:
    """Extend a schedule to ``length`` rows with copies of its last row.

    Schedules of different T then have one shape, and share a compiled function. The original rows
    are those with index < ``num_timesteps``.

    Raises:
        ConfigError: ``length`` is not a whole number, or is less than the number of rows.
    """
    require_length("length", length)
    allowed = f"at least the {len(schedule)} rows there are"
    require(length >= len(schedule), "length", length, allowed)
    more = ((0, length - len(schedule)),)
    return map_leaves(lambda column: np.pad(column, more, mode="edge"), schedule)


def num_timesteps(schedule: Schedule) -> Int[Array, ""]:
    """T of a schedule on its native grid, padded or not: the timestep of its last row."""
    return jnp.asarray(schedule.timestep[-1], jnp.int32)


def require_length(field: str, value: Any, longest: int | None = None) -> None:
    """Raise ConfigError for a number of rows that is not a whole number from 1 to ``longest``."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    allowed = f"a whole number {'>= 1' if longest is None else f'in 1..{longest}'}"
    require(whole and 1 <= value <= (longest or value), field, value, allowed)
