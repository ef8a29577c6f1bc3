"""The arithmetic of schedules: columns of betas and alpha_bars without loss of precision.

Columns of numpy are float64 on the host, and are rounded once to float32. Columns of jax use the
same formulas, in their own precision, and may be traced.
"""

from types import ModuleType
from typing import overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffusion_jax.diffusion.schedules.schedule import Column, Scalar, Schedule
from diffusion_jax.diffusion.tracing import is_known
from diffusion_jax.errors import require


def array_module(*values: object) -> ModuleType:
    """The module for computing with the values: jax.numpy if one is a jax array, else numpy."""
    return jnp if any(isinstance(value, jax.Array) for value in values) else np


def require_betas(**betas: Scalar) -> None:
    """Raise ConfigError for a beta outside (0, 1]; the message names its argument."""
    for field, beta in betas.items():
        if is_known(beta):  # a beta that float32 rounds to 0 is 0
            require(np.float32(beta) > 0 and beta <= 1, field, beta, "in (0, 1]")


@overload
def log_one_minus(
    x: Float[Array, "*rows"], rest: Float[Array, "*rows"], large: float = ...
) -> Float[Array, "*rows"]: ...
@overload
def log_one_minus(x: Column, rest: Column, large: float = ...) -> Column: ...
def log_one_minus(x: Column, rest: Column, large: float = 0.5) -> Column:
    """log(1 - x) for x in [0, 1]; for x >= ``large`` it is computed as log(rest), rest = 1 - x.

    A relative rounding error of x is x / (1 - x) times as large in 1 - x: 4 times at x = 0.8, 999
    times at x = 0.999.
    """
    xp = array_module(x)
    with np.errstate(divide="ignore"):  # x = 1: -inf
        log: Column = xp.where(x < large, xp.log1p(-xp.minimum(x, large)), xp.log(rest))
    return log


def running_product(log_alpha: Column) -> tuple[Column, Column]:
    """The products alpha_1 ... alpha_t for all t, and 1 minus each product."""
    xp = array_module(log_alpha)
    # A float32 sum near -80 is rounded by 4e-6 at every term. So each term is split: multiples of
    # 2^-16 add up exactly (up to 256; e^-88 is near the least float32), and the sum of the small
    # remainders has a negligible rounding error.
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
    """Build a schedule: add the columns that use the previous row, and round numpy to float32."""
    xp = array_module(beta)
    alpha_bar_prev = xp.concatenate([xp.ones(1), alpha_bar[:-1]])
    one_minus_alpha_bar_prev = xp.concatenate([xp.zeros(1), one_minus_alpha_bar[:-1]])
    posterior_variance = beta * (one_minus_alpha_bar_prev / one_minus_alpha_bar)  # DDPM eq. 7
    columns = {
        "timestep": np.arange(1.0, len(beta) + 1) if timestep is None else timestep,
        "beta": beta,
        "alpha": alpha,
        "alpha_bar": alpha_bar,
        "alpha_bar_prev": alpha_bar_prev,
        "one_minus_alpha_bar": one_minus_alpha_bar,
        "one_minus_alpha_bar_prev": one_minus_alpha_bar_prev,
        "posterior_variance": posterior_variance,
    }
    if is_known(*columns.values()):
        _require_sound(columns)
    dtype = jnp.float32 if xp is np else beta.dtype
    return Schedule(**{name: jnp.asarray(column, dtype) for name, column in columns.items()})


def _require_sound(columns: dict[str, Column]) -> None:
    """Raise ConfigError for a number that is not finite, or for a step that adds no noise.

    The arguments of a schedule are checked earlier, by name. This is a last check of the result.
    """
    for name, column in columns.items():
        column = np.asarray(column, np.float32)
        divides = name in ("beta", "one_minus_alpha_bar")
        wrong = ~np.isfinite(column) | (divides & (column <= 0))
        row = np.argmax(wrong)
        allowed = f"finite{' and above 0' if divides else ''}: the arguments are too extreme"
        require(not wrong[row], f"{name}[{row}]", column[row], allowed)


def from_alpha_bars(
    *,
    beta: Column,
    alpha: Column,
    alpha_bar: Column,
    one_minus_alpha_bar: Column,
    max_beta: Scalar,
    min_beta: Scalar,
) -> Schedule:
    """Build a schedule from closed forms, with beta clipped to [min_beta, max_beta].

    alpha_bar is the closed form before the first clipped row, and a running product from there on.

    Raises:
        ConfigError: max_beta outside (0, 1] or min_beta outside [0, max_beta].
    """
    require_betas(max_beta=max_beta)
    if is_known(max_beta, min_beta):
        require(0 <= min_beta <= max_beta, "min_beta", min_beta, f"in [0, max_beta = {max_beta}]")
    xp = array_module(beta, max_beta, min_beta)
    high, low = beta > max_beta, beta < min_beta
    beta = xp.where(high, max_beta, xp.where(low, min_beta, beta))
    # 1 - float32(0.999) has a relative error of 1.3e-5: subtract the plain bounds in float64
    alpha = xp.where(high, 1 - max_beta, xp.where(low, 1 - min_beta, alpha))
    # of two numbers that add up to 1, compute the larger from the smaller: it stays below 1
    alpha = xp.where(beta < 0.5, 1 - beta, alpha)
    alpha_bar, one_minus_alpha_bar = (
        xp.where(one_minus_alpha_bar < 0.5, 1 - one_minus_alpha_bar, alpha_bar),
        xp.where(alpha_bar < 0.5, 1 - alpha_bar, one_minus_alpha_bar),
    )
    exact = xp.cumsum(high | low) == 0
    last_exact = xp.minimum(np.arange(1, len(beta) + 1), xp.sum(exact))  # 0 means t = 0
    base = xp.concatenate([xp.ones(1), alpha_bar])[last_exact]
    one_minus_base = xp.concatenate([xp.zeros(1), one_minus_alpha_bar])[last_exact]
    tail, one_minus_tail = running_product(xp.where(exact, 0.0, log_one_minus(beta, alpha)))
    return from_columns(
        beta=beta,
        alpha=alpha,
        alpha_bar=base * tail,
        one_minus_alpha_bar=one_minus_base * tail + one_minus_tail,
    )
