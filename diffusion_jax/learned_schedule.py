"""The learned schedule of VDM: a monotone network for log SNR between learned end points.

It is trained jointly with the network by the bound in continuous time, u in [0, 1], and is a
``Schedule`` like any other once it is cut into timesteps (Kingma et al. 2021, arXiv 2107.00630).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from diffusion_jax import likelihood, losses, process, schedules, timesteps
from diffusion_jax.losses import BatchLosses, Objective
from diffusion_jax.models import Model
from diffusion_jax.process import Example
from diffusion_jax.schedules import Schedule

HIDDEN = 1024  # units of the monotone network (VDM appendix H)


class LearnedSchedule(NamedTuple):
    """What is chosen: in how many timesteps it is cut, and where the end points begin."""

    num_timesteps: int
    log_snr_start: float
    log_snr_end: float


def init(recipe: LearnedSchedule, key: Key[Array, ""]) -> PyTree:
    """Parameters with which log SNR falls all but linearly from the first end to the last."""
    weight_key, bias_key = jax.random.split(key)
    return {
        "start": jnp.float32(recipe.log_snr_start),
        "gap": jnp.float32(_inverse_softplus(recipe.log_snr_start - recipe.log_snr_end)),
        "linear": jnp.float32(_inverse_softplus(1.0)),
        # the hidden units bend at places all over [0, 1]; together they weigh little at first
        "weight_in": _inverse_softplus(4.0) + jax.random.normal(weight_key, (HIDDEN,)),
        "bias": 4 * jax.random.uniform(bias_key, (HIDDEN,), minval=-1.0, maxval=0.0),
        "weight_out": jnp.full(HIDDEN, _inverse_softplus(0.1 / HIDDEN)),
    }


def joint(model: Model, recipe: LearnedSchedule) -> Model:
    """The network and the schedule as one model: the parameters of both, the output of the one."""

    def init_both(key: Key[Array, ""]) -> PyTree:
        network_key, schedule_key = jax.random.split(key)
        return {"network": model.init(network_key), "schedule": init(recipe, schedule_key)}

    def apply(params: PyTree, *inputs: Any) -> Any:
        return model.apply(params["network"], *inputs)

    return Model(init_both, apply)


def _inverse_softplus(value: float) -> float:
    return math.log(math.expm1(value))


def log_snr(params: PyTree, u: Float[Array, ""]) -> Float[Array, ""]:
    """Log SNR at time u, falling strictly from its start at 0 to its end at 1.

    start - gap (m(u) - m(0)) / (m(1) - m(0)), where m(u) = a u + c . sigmoid(w u + b) grows: a, c
    and w are made positive by a softplus (VDM appendix H, eq. 66 and below).
    """
    rise = (_monotone(params, u) - _monotone(params, 0.0)) / (
        _monotone(params, 1.0) - _monotone(params, 0.0)
    )
    return params["start"] - jax.nn.softplus(params["gap"]) * rise


def _monotone(params: PyTree, u: Float[Array, ""] | float) -> Float[Array, ""]:
    positive = jax.tree.map(
        jax.nn.softplus, {k: params[k] for k in ("linear", "weight_in", "weight_out")}
    )
    hidden = jax.nn.sigmoid(positive["weight_in"] * u + params["bias"])
    return positive["linear"] * u + positive["weight_out"] @ hidden


def timestep_of(recipe: LearnedSchedule, params: PyTree, log_snr: Float[Array, "..."]) -> Array:
    """What the network is told: 1 at the first end to T at the last, linear in log SNR."""
    share = (params["start"] - log_snr) / jax.nn.softplus(params["gap"])
    return 1 + (recipe.num_timesteps - 1) * share


def discretise(recipe: LearnedSchedule, params: PyTree) -> Schedule:
    """The chain of T timesteps at u = (t - 1) / (T - 1)."""
    params = jax.tree.map(jnp.asarray, params)
    u = jnp.linspace(0, 1, recipe.num_timesteps)
    along = jax.vmap(log_snr, (None, 0))(params, u)
    told = timestep_of(recipe, params, along)
    return schedules.from_log_snr(np.asarray(along, np.float64), np.asarray(told, np.float64))


def initial(recipe: LearnedSchedule, seed: int) -> Schedule:
    """The chain before any training."""
    return discretise(recipe, init(recipe, jax.random.key(seed)))


class Row(NamedTuple):
    """A moment in continuous time: the row there, and how fast log SNR falls."""

    row: Schedule
    rate: Float[Array, ""]  # -d log SNR / du


def row_at(recipe: LearnedSchedule, params: PyTree, u: Float[Array, ""]) -> Row:
    """The row at time u, differentiable by the parameters; it is a chain of its own."""
    value, slope = jax.jvp(lambda u: log_snr(params, u), (u,), (jnp.ones(()),))
    told = timestep_of(recipe, params, value)
    return Row(schedules.from_log_snr(value[None], told[None])[0], -slope)


def diffusion_term(rate: Float[Array, ""], eps: Example, predicted_eps: Example) -> Example:
    """-d log SNR / du |eps - predicted|^2 / 2 in nats, whose mean over u is L_1 + .. + L_{T-1}.

    The limit T -> infinity (VDM eq. 17).
    """
    return rate * jnp.square(eps - predicted_eps) / 2


def reconstruction_term(row: Schedule, x_0: Example, eps: Example, levels: int | None) -> Example:
    """L_0 = -log p(x_0|z_0) in nats, p(x_0|z_0) proportional to q(z_0|x_0) over the levels.

    z_0 is x_0 with the noise of the first end, ``row`` (VDM section 3.3). Continuous data have
    the density N(x_0; z_0 / sqrt(alpha_bar), sigma^2).
    """
    if levels is None:
        return (jnp.square(eps) + math.log(2 * math.pi) - row.log_snr) / 2
    values = jnp.linspace(-1, 1, levels)
    distance = (x_0 + row.sigma * eps)[..., None] - values.reshape((1,) * x_0.ndim + (levels,))
    log_q = -jnp.square(distance) * row.snr / 2
    return jnp.square(eps) / 2 + jax.nn.logsumexp(log_q, axis=-1)


def batch_losses(
    objective: Objective,
    recipe: LearnedSchedule,
    apply: Callable[..., Float[Array, "batch ..."]],
    params: PyTree,
    schedule: Schedule,
    timestep_state: Any,
    key: Key[Array, ""],
    x_0: Float[Array, "batch ..."],
    label: Int[Array, " batch"] | None,
    indices: Int[Array, " batch"],
    batch_size: int,
) -> BatchLosses:
    """The bound in continuous time, in bits per dimension, of this device's examples.

    Times are spread evenly with a common offset; ``schedule`` and ``timestep_state`` are those of
    discrete time and are not looked at. Losses are told to be of the rows that u falls into.
    """
    common_key, example_key = jax.random.split(key)
    u = timesteps.spread(common_key, indices, batch_size)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(example_key, indices)
    noise_keys, start_keys, dropout_keys = jax.vmap(lambda k: jax.random.split(k, 3))(keys).T
    of_schedule = params["schedule"]
    rows, rates = jax.vmap(lambda u: row_at(recipe, of_schedule, u))(u)
    start, end = (row_at(recipe, of_schedule, jnp.float32(u)).row for u in (0, 1))

    def noise(key: Key[Array, ""], row: Schedule, x_0: Example) -> tuple[Example, Example]:
        eps = jax.random.normal(key, x_0.shape)
        return eps, process.q_sample(row, x_0, eps)

    eps, x_t = jax.vmap(noise)(noise_keys, rows, x_0)
    output = apply(params, x_t, rows.timestep, label, dropout_keys)

    def loss(
        row: Schedule,
        rate: Float[Array, ""],
        key: Key[Array, ""],
        x_0: Example,
        eps: Example,
        x_t: Example,
        output: Example,
    ) -> Float[Array, ""]:
        predicted = losses.decode_output(objective, row, x_t, output).eps
        start_eps = jax.random.normal(key, x_0.shape)
        terms = (
            likelihood.prior_term(end, x_0)
            + diffusion_term(rate, eps, predicted)
            + reconstruction_term(start, x_0, start_eps, objective.levels)
        )
        return likelihood.bits(jnp.mean(terms))

    found = jax.vmap(loss)(rows, rates, start_keys, x_0, eps, x_t, output)
    position = jnp.minimum((u * recipe.num_timesteps).astype(jnp.int32), recipe.num_timesteps - 1)
    return BatchLosses(found, position, jnp.ones(len(found)))
