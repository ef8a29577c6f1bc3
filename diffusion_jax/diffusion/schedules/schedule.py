"""A noise schedule: the chain x_1 .. x_T as one row per transition, and what is asked of rows."""

import dataclasses
from types import ModuleType
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from diffusion_jax.diffusion.tracing import is_known
from diffusion_jax.errors import require

Scalar = float | int | Float[Array, ""]
Column = Float[Array, "*rows"] | Float[np.ndarray, "*rows"]


@no_type_check  # jax also builds it with shapes, specs and placeholders as leaves
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Schedule:
    """The chain q(x_t|x_{t-1}) = N(sqrt(alpha_t) x_{t-1}, beta_t I), one row per transition.

    Row i is t = i + 1 and ``len(schedule)`` is T; ``schedule[i]`` is a row with scalar columns,
    ``schedule[a:b]`` a shorter schedule. Being a pytree it is an argument of compiled functions:
    another schedule of the same length does not compile them again.
    """

    timestep: Float[Array, "*rows"]  # what the network is told: 1..T on the native grid
    beta: Float[Array, "*rows"]
    alpha: Float[Array, "*rows"]  # 1 - beta
    alpha_bar: Float[Array, "*rows"]  # product of alpha_1 .. alpha_t
    alpha_bar_prev: Float[Array, "*rows"]  # of the row before; 1 in the first
    one_minus_alpha_bar: Float[Array, "*rows"]  # variance of q(x_t|x_0)
    one_minus_alpha_bar_prev: Float[Array, "*rows"]
    posterior_variance: Float[Array, "*rows"]  # beta tilde, the variance of q(x_{t-1}|x_t,x_0)

    def __getitem__(self, index: int | slice | Array | np.ndarray) -> "Schedule":
        # jax clamps an index out of range: `for row in schedule` would never end.
        if isinstance(index, int) and not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of a schedule of {len(self)} rows")
        return jax.tree.map(lambda column: column[index], self)

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
        """Log of beta tilde, its 0 at t = 1 replaced by the value of t = 2 (by beta if T = 1).

        Raises ValueError: for a row, which cannot see the next: index the whole schedule's
        property.
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

    L_0 needs a density; everything else never looks at beta tilde of t = 1.
    """
    variance = schedule.posterior_variance
    following = jnp.concatenate([variance[..., 1:], schedule.beta[..., -1:]], axis=-1)
    following = jnp.where(following > 0, following, schedule.beta)  # T = 1, padded
    clipped = jnp.where(variance > 0, variance, following)
    return dataclasses.replace(schedule, posterior_variance=clipped)


def with_terminal_row(schedule: Schedule) -> Schedule:
    """The rows of t = 0, 1 .. T: row i of the schedule is row i + 1, the one before it row i."""
    return jax.tree.map(
        lambda first, column: jnp.concatenate([first[None].astype(column.dtype), column]),
        terminal_row(),
        schedule,
    )


def pad(schedule: Schedule, length: int) -> Schedule:
    """A schedule with ``length`` rows, of which those past T are copies of row T.

    Schedules of several T so have one shape, and one compiled function serves them: the mask of
    the rows that count is row < ``num_timesteps``.

    Raises:
        ValueError: the schedule is longer already.
    """
    require_length("length", length)
    require(
        length >= len(schedule), "length", length, f"at least the {len(schedule)} rows there are"
    )
    more = length - len(schedule)
    return jax.tree.map(lambda column: np.pad(column, (0, more), mode="edge"), schedule)


def num_timesteps(schedule: Schedule) -> Int[Array, ""]:
    """T of a schedule on its native grid, padded or not: what its last row is told."""
    return jnp.asarray(schedule.timestep[-1], jnp.int32)


def array_module(*values: object) -> ModuleType:
    """The module that computes with the values: jax's if one of them is an array of jax."""
    return jnp if any(isinstance(value, jax.Array) for value in values) else np


def require_length(field: str, value: object, longest: int | None = None) -> None:
    """Refuse a number of rows that is not a whole number from 1 to ``longest``."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    allowed = f"a whole number {'>= 1' if longest is None else f'in 1..{longest}'}"
    require(whole and 1 <= value <= (longest or value), field, value, allowed)


def require_betas(**betas: Scalar) -> None:
    """Refuse betas outside (0, 1]; the names of the arguments are those in the message."""
    for field, beta in betas.items():
        if is_known(beta):  # what rounds to 0 in float32 is 0
            require(np.float32(beta) > 0 and beta <= 1, field, beta, "in (0, 1]")


def log_alphas(beta: Column, alpha: Column) -> Column:
    """log(alpha) from the one of beta and alpha that holds it to full relative precision."""
    xp = array_module(beta)
    with np.errstate(divide="ignore"):  # beta = 1: -inf, hence alpha_bar = 0
        return xp.where(beta < 0.5, xp.log1p(-beta), xp.log(alpha))


def running_product(log_alpha: Column) -> tuple[Column, Column]:
    """The products alpha_1 ... alpha_t, and 1 minus them."""
    xp = array_module(log_alpha)
    # A float32 sum near -80 rounds by 4e-6 at every term. Multiples of 2^-16 add up exactly (to
    # 256; e^-88 is the least of float32), and what they leave of each term is too small to matter.
    coarse = xp.trunc(xp.maximum(log_alpha, -100) * 2**16) / 2**16
    fine = xp.cumsum(log_alpha - coarse)
    coarse = xp.cumsum(coarse)
    return xp.exp(coarse) * xp.exp(fine), -xp.expm1(coarse + fine)


def from_columns(
    *,
    beta: Column,
    alpha: Column,
    alpha_bar: Column,
    one_minus_alpha_bar: Column,
    timestep: Column | None = None,
) -> Schedule:
    """Add the columns that look at the row before; round once to float32 on the host."""
    xp = array_module(beta)
    alpha_bar_prev = xp.concatenate([xp.ones(1), alpha_bar[:-1]])
    one_minus_alpha_bar_prev = xp.concatenate([xp.zeros(1), one_minus_alpha_bar[:-1]])
    posterior_variance = beta * (one_minus_alpha_bar_prev / one_minus_alpha_bar)  # DDPM eq. 7
    columns = (
        np.arange(1, len(beta) + 1) if timestep is None else timestep,
        *(beta, alpha, alpha_bar, alpha_bar_prev),
        *(one_minus_alpha_bar, one_minus_alpha_bar_prev, posterior_variance),
    )
    dtype = jnp.float32 if xp is np else beta.dtype
    return Schedule(*(jnp.asarray(column, dtype) for column in columns))
