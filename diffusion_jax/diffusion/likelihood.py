"""The likelihood of data: the variational bound term by term, and the probability flow.

A term is in nats and has one number per dimension of ONE example at ONE row; ``bits`` converts nats
into bits. L_T + sum over t > 1 of L_{t-1} + L_0 bounds -log p(x_0) from above (DDPM eq. 5).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import log_ndtr
from jaxtyping import Array, Float, Key

from diffusion_jax.diffusion import schedules, weightings
from diffusion_jax.diffusion.process import Example, Predict
from diffusion_jax.diffusion.schedules.columns import log_one_minus
from diffusion_jax.diffusion.schedules.schedule import Schedule
from diffusion_jax.errors import choose, require

# y and the accumulated change of log p, or the slopes of both
Flow = tuple[Example, Float[Array, " batch"]]
Divergence = Callable[[Callable[[Example], Example], Example, Example], Flow]


def decoder_log_likelihood(
    x_0: Example, mean: Example, log_variance: Example, levels: int | None
) -> Example:
    """Log p(x_0|x_1) per dimension: the mass of N(mean, sigma^2) in the bin of x_0 (DDPM eq. 13).

    Pixels have ``levels`` equidistant values in [-1, 1] with bins of half-width 1 / (levels - 1);
    the two outer bins reach to infinity. Continuous data (levels None) have their log density.
    """
    deviation = jnp.exp(log_variance / 2)
    distance = (x_0 - mean) / deviation
    if levels is None:
        return -(jnp.square(distance) + log_variance + math.log(2 * math.pi)) / 2
    half = 1 / (levels - 1) / deviation
    # Phi(b) - Phi(a) = Phi(-a) - Phi(-b): no digits are lost in the tail where Phi is small
    low, high = -jnp.abs(distance) - half, -jnp.abs(distance) + half
    log_low, log_high = log_ndtr(low), log_ndtr(high)
    tiny = jnp.finfo(log_high.dtype).tiny  # no gradient of log(0) in an empty bin
    inner = log_high + jnp.log(-jnp.expm1(-jnp.maximum(log_high - log_low, tiny)))
    quarter = 0.5 / (levels - 1)  # of a bin: float32 rounding moves x_0 off its level by less
    return jnp.select(
        [x_0 < -1 + quarter, x_0 > 1 - quarter],
        [log_ndtr(distance + half), log_ndtr(half - distance)],
        inner,
    )


def bits(nats: Float[Array, "..."]) -> Float[Array, "..."]:
    """Convert nats into bits."""
    return nats / math.log(2)


def kl_of_variances(log_variance: Example, log_variance_of_p: Example) -> Example:
    """KL of two Gaussians with equal means: (e^d - 1 - d) / 2, d = log sigma^2 - log sigma_p^2."""
    d = log_variance - log_variance_of_p
    return (jnp.expm1(d) - d) / 2


def prior_term(row: Schedule, x_0: Example) -> Example:
    """L_T = KL(q(x_T|x_0) || N(0, I)), where ``row`` is the last row of the schedule.

    (alpha_bar x_0^2 - alpha_bar - log(1 - alpha_bar)) / 2
    """
    log_variance = log_one_minus(row.alpha_bar, row.one_minus_alpha_bar)
    return (row.alpha_bar * x_0**2 - row.alpha_bar - log_variance) / 2


def variational_term(
    row: Schedule, x_0: Example, predicted_x_0: Example, log_variance: Example, levels: int | None
) -> Example:
    """L_{t-1} = KL(q(x_{t-1}|x_t,x_0) || p(x_{t-1}|x_t)), or L_0 = -log p(x_0|x_1) at t = 1.

    The difference of the two means is computed as the gain of the posterior mean times the error of
    x_0, which avoids subtracting nearly equal numbers. ``row`` must come from
    ``clip_posterior_variance``.
    """
    error = weightings.vlb_weight(row, log_variance) * jnp.square(x_0 - predicted_x_0)
    kl = error + kl_of_variances(jnp.log(row.posterior_variance), log_variance)
    # at t = 1 the mean of p is the predicted x_0 itself
    decoded = -decoder_log_likelihood(x_0, predicted_x_0, log_variance, levels)
    return jnp.where(row.one_minus_alpha_bar_prev == 0, decoded, kl)


# The probability flow. In the coordinates y = x_t / sqrt(alpha_bar), with u = log sigma, its ODE
# is dy/du = sigma eps (Song et al. 2021, eq. 13; Karras et al. 2022, eq. 1), and the density p_u
# of y changes along it by d log p_u(y) / du = -div_y(sigma eps).


def flow_log_likelihood(
    predict: Predict,
    schedule: Schedule,
    keys: Key[Array, " batch"],
    x_0: Float[Array, "batch ..."],
    *,
    num_steps: int,
    solver: str,
    divergence: str,
) -> Float[Array, " batch"]:
    """Log density of each x_0 under the probability flow of a network, in nats.

    The flow starts at the lowest noise level of the schedule, where y is approximated by x_0, and
    ends at the highest, where x_T ~ N(0, I). It takes ``num_steps`` steps that are evenly spaced in
    log SNR, in one scan. ``solver`` is "heun" (order 2) or "rk4" (order 4). ``divergence`` is
    "exact" (one jvp per dimension) or "hutchinson" (one jvp along a random vector of signs, which
    is the same in every step).

    Raises:
        ConfigError: an unknown solver or divergence, or num_steps < 1.
    """
    tableau: Tableau = choose("solver", solver, SOLVERS, "solver")
    trace: Divergence = choose("divergence", divergence, DIVERGENCES, "divergence")
    require(num_steps >= 1, "num_steps", num_steps, "at least 1")
    probes = jax.vmap(lambda key: jax.random.rademacher(key, x_0.shape[1:], x_0.dtype))(keys)

    def slope(row: Schedule, y: Example) -> tuple[Example, Float[Array, " batch"]]:
        def velocity(y: Example) -> Example:
            return row.sigma * predict(jnp.sqrt(row.alpha_bar) * y, row).eps

        return trace(velocity, y, probes)

    # a stage with tableau node c lies at node + c (next node - node)
    ends = schedule.log_snr[0], schedule.log_snr[-1]
    nodes = jnp.linspace(*ends, num_steps + 1)
    width = (ends[0] - ends[1]) / num_steps / 2  # in u = log sigma = -log SNR / 2
    stages = [
        schedules.at_log_snr(schedule, nodes[:-1] + fraction * (nodes[1:] - nodes[:-1]))
        for fraction in tableau.nodes
    ]

    def step(carry: Flow, rows: list[Schedule]) -> tuple[Flow, None]:
        y, total = carry
        slopes: list[Flow] = []
        for row, coefficients in zip(rows, tableau.matrix):
            mixed = sum((c * s for c, (s, _) in zip(coefficients, slopes)), jnp.zeros_like(y))
            slopes.append(slope(row, y + width * mixed))
        y += width * sum(w * s for w, (s, _) in zip(tableau.weights, slopes))
        total += width * sum(w * d for w, (_, d) in zip(tableau.weights, slopes))
        return (y, total), None

    (y, total), _ = jax.lax.scan(step, (x_0, jnp.zeros(len(x_0))), stages)
    alpha_bar = schedule.alpha_bar[-1]
    of_x_T = -(alpha_bar * jnp.square(y) + math.log(2 * math.pi) - jnp.log(alpha_bar)) / 2
    return jnp.sum(of_x_T.reshape(len(y), -1), axis=1) + total


class Tableau(NamedTuple):
    """An explicit Runge-Kutta method (Butcher's tableau)."""

    nodes: tuple[float, ...]
    matrix: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]


SOLVERS: dict[str, Tableau] = {
    "heun": Tableau((0.0, 1.0), ((), (1.0,)), (1 / 2, 1 / 2)),
    "rk4": Tableau(
        (0.0, 0.5, 0.5, 1.0),
        ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)),
        (1 / 6, 1 / 3, 1 / 3, 1 / 6),
    ),
}


def _hutchinson(
    velocity: Callable[[Example], Example], y: Example, probes: Example
) -> tuple[Example, Float[Array, " batch"]]:
    """v(y), and z . J z for one probe z per example; its mean over z is the trace of J."""
    value, along = jax.jvp(velocity, (y,), (probes,))
    return value, jnp.sum((probes * along).reshape(len(y), -1), axis=1)


def _exact(
    velocity: Callable[[Example], Example], y: Example, probes: Example
) -> tuple[Example, Float[Array, " batch"]]:
    """v(y), and the trace of its Jacobian, summed over the unit vectors one at a time."""
    value = velocity(y)

    def add(total: Float[Array, " batch"], unit: Example) -> tuple[Array, None]:
        _, along = jax.jvp(velocity, (y,), (jnp.broadcast_to(unit, y.shape),))
        return total + jnp.sum((unit[None] * along).reshape(len(y), -1), axis=1), None

    units = jnp.eye(y[0].size, dtype=y.dtype).reshape(y[0].size, *y.shape[1:])
    return value, jax.lax.scan(add, jnp.zeros(len(y)), units)[0]


DIVERGENCES: dict[str, Divergence] = {
    "hutchinson": _hutchinson,
    "exact": _exact,
}


def dequantise(key: Key[Array, ""], x_0: Float[Array, "..."], levels: int) -> Float[Array, "..."]:
    """Add noise that is uniform over the bin of each pixel, whose width is 2 / (levels - 1)."""
    return x_0 + jax.random.uniform(key, x_0.shape, minval=-1, maxval=1) / (levels - 1)


def bits_per_dim(
    log_likelihood: Float[Array, "..."], num_dims: int, levels: int | None
) -> Float[Array, "..."]:
    """Bits per dimension of a log density in nats; with ``levels``, of dequantised pixels.

    -log p / (D ln 2) - log2(2 / (levels - 1)). The mass of a bin is its mean density times its
    width, and by Jensen's inequality the mean log density is a lower bound of the log mean density
    (Theis et al. 2016).
    """
    density = -bits(log_likelihood) / num_dims
    return density if levels is None else density - math.log2(2 / (levels - 1))
