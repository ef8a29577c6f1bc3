"""Timestep samplers: they draw the training timestep of each example, and the weight of its loss.

A timestep sampler has three pure functions, init, draw and update. Its state is part of the train
state.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

HISTORY = 10  # losses per timestep in the history of importance sampling (iDDPM)
UNIFORM_SHARE = 1e-3  # of p_t, so that no timestep has probability 0 (iDDPM's code)
Rows = Int[Array, " batch"]
Weights = Float[Array, " batch"]
Losses = Float[Array, " batch"]
NumTimesteps = int | Int[Array, ""]


class TimestepDraw(NamedTuple):
    """The inputs of a draw: ``key`` is common to the batch, ``keys`` has one per example.

    ``indices`` are the positions of the examples in the global batch of ``batch_size``.
    """

    key: Key[Array, ""]
    keys: Key[Array, " batch"]
    indices: Int[Array, " batch"]
    batch_size: int


class TimestepSampler(NamedTuple):
    """A distribution of timesteps.

    init(num_timesteps) -> state
    draw(state, draw, num_timesteps) -> rows 0..T-1, and weights. The weighted mean loss is an
        unbiased estimate of the mean loss over all timesteps. ``num_timesteps`` may be traced,
        unless the state has a row for each timestep.
    update(state, rows, losses) -> state; rows and losses are those of the *global* batch.
    """

    init: Callable[[int], Any]
    draw: Callable[..., tuple[Rows, Weights]]
    update: Callable[[Any, Rows, Losses], Any]


def uniform(
    state: tuple[()], draw: TimestepDraw, num_timesteps: NumTimesteps
) -> tuple[Rows, Weights]:
    """Independent uniform timesteps (DDPM algorithm 1, line 3)."""
    rows = jax.vmap(lambda k: jax.random.randint(k, (), 0, num_timesteps))(draw.keys)
    return rows, jnp.ones(len(draw.keys))


def spread(
    key: Key[Array, ""], indices: Int[Array, " batch"], batch_size: int
) -> Float[Array, " batch"]:
    """Times (u + i / batch_size) mod 1 in [0, 1), where u ~ U[0, 1) is common to the batch.

    Each time is uniform, and the mean loss of the batch has a smaller variance than with
    independent times (Kingma et al. 2021, VDM, appendix I.1).
    """
    return (jax.random.uniform(key) + indices / batch_size) % 1.0


def low_discrepancy(
    state: tuple[()], draw: TimestepDraw, num_timesteps: NumTimesteps
) -> tuple[Rows, Weights]:
    """Evenly spread timesteps: the rows floor(T u_i), where u_i are the times of ``spread``."""
    u = spread(draw.key, draw.indices, draw.batch_size)
    # float32 may round T * 0.99999997 up to T
    rows = jnp.minimum((u * num_timesteps).astype(jnp.int32), num_timesteps - 1)
    return rows, jnp.ones(len(draw.keys))


class LossHistory(NamedTuple):
    """The last HISTORY losses of each timestep (a ring buffer), and how many it has had so far."""

    losses: Float[Array, "timesteps history"]
    counts: Int[Array, " timesteps"]


def _init_history(num_timesteps: int) -> LossHistory:
    return LossHistory(jnp.zeros((num_timesteps, HISTORY)), jnp.zeros(num_timesteps, jnp.int32))


def importance_probabilities(state: LossHistory) -> Float[Array, " timesteps"]:
    """p_t proportional to sqrt(E[L_t^2]), once every timestep has HISTORY losses; uniform before.

    Nichol & Dhariwal 2021 (iDDPM), eq. 18. A share UNIFORM_SHARE of p_t is uniform.
    """
    num_timesteps = len(state.counts)
    moment = jnp.sqrt(jnp.mean(jnp.square(state.losses), axis=1))
    total = jnp.sum(moment)
    is_warm = jnp.all(state.counts >= HISTORY) & (total > 0)
    share = jnp.where(is_warm, moment / jnp.where(total > 0, total, 1.0), 1 / num_timesteps)
    return (1 - UNIFORM_SHARE) * share + UNIFORM_SHARE / num_timesteps


def importance(
    state: LossHistory, draw: TimestepDraw, num_timesteps: NumTimesteps
) -> tuple[Rows, Weights]:
    """Independent timesteps from ``importance_probabilities``, weighted by 1 / (T p_t)."""
    p = importance_probabilities(state)
    rows = jax.vmap(lambda k: jax.random.choice(k, len(p), p=p))(draw.keys)
    return rows, 1 / (len(p) * p[rows])


def update_history(state: LossHistory, rows: Rows, losses: Losses) -> LossHistory:
    """Each new loss replaces the oldest loss of its timestep."""
    same = rows[:, None] == rows[None, :]
    order = jnp.arange(len(rows))
    earlier = jnp.sum(same & (order[None, :] < order[:, None]), axis=1)
    later = jnp.sum(same & (order[None, :] > order[:, None]), axis=1)
    slots = (state.counts[rows] + earlier) % HISTORY
    # a timestep may get more than HISTORY losses: indices out of range drop all but the last
    targets = jnp.where(later < HISTORY, rows, len(state.counts))
    return LossHistory(
        state.losses.at[targets, slots].set(losses, mode="drop"), state.counts.at[rows].add(1)
    )


def _no_state(num_timesteps: int) -> tuple[()]:
    return ()


def _keep(state: tuple[()], rows: Rows, losses: Losses) -> tuple[()]:
    return state


TIMESTEP_SAMPLERS: dict[str, TimestepSampler] = {
    "uniform": TimestepSampler(_no_state, uniform, _keep),
    "low_discrepancy": TimestepSampler(_no_state, low_discrepancy, _keep),
    "importance": TimestepSampler(_init_history, importance, update_history),
}
