"""Which timestep each example of a batch is trained at, and what its loss then counts.

A sampler is an init/draw/update triple of pure functions; its state is part of the train state.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

HISTORY = 10  # losses that importance sampling remembers of each timestep (iDDPM)
UNIFORM_SHARE = 1e-3  # of the draws, so that no timestep is given up (iDDPM's code)
Rows = Int[Array, " batch"]
Weights = Float[Array, " batch"]
Timesteps = int | Int[Array, ""]  # how many


class TimestepDraw(NamedTuple):
    """What timesteps are drawn by: a key common to the batch, and for each example one more.

    ``indices`` are the places of the examples in the global batch of ``batch_size``.
    """

    key: Key[Array, ""]
    keys: Key[Array, " batch"]
    indices: Int[Array, " batch"]
    batch_size: int


class TimestepSampler(NamedTuple):
    """How timesteps are drawn.

    init(num_timesteps) -> state
    draw(state, draw, num_timesteps) -> rows 0..T-1 and the weights that make the weighted mean loss
        an unbiased estimate of the mean over all timesteps. ``num_timesteps`` may be traced, unless
        the state has a row for each.
    update(state, rows, losses) -> state, of the *global* batch.
    """

    init: Callable[[int], Any]
    draw: Callable[..., tuple[Rows, Weights]]
    update: Callable[[Any, Rows, Weights], Any]


def uniform(state: tuple, draw: TimestepDraw, num_timesteps: Timesteps) -> tuple[Rows, Weights]:
    """Independent uniform timesteps (DDPM algorithm 1, line 3)."""
    rows = jax.vmap(lambda k: jax.random.randint(k, (), 0, num_timesteps))(draw.keys)
    return rows, jnp.ones(len(draw.keys))


def spread(
    key: Key[Array, ""], indices: Int[Array, " batch"], batch_size: int
) -> Float[Array, " batch"]:
    """Times (u + i / batch_size) mod 1 in [0, 1], u ~ U[0, 1) common to the batch.

    Each is uniform, and the batch's mean loss has a smaller variance than that of independent
    ones (Kingma et al. 2021, VDM, appendix I.1).
    """
    return (jax.random.uniform(key) + indices / batch_size) % 1.0


def low_discrepancy(
    state: tuple, draw: TimestepDraw, num_timesteps: Timesteps
) -> tuple[Rows, Weights]:
    """Evenly spread timesteps: floor(T u_i) of the times u_i that ``spread`` draws."""
    u = spread(draw.key, draw.indices, draw.batch_size)
    # float32 may round T * 0.99999997 up to T
    rows = jnp.minimum((u * num_timesteps).astype(jnp.int32), num_timesteps - 1)
    return rows, jnp.ones(len(draw.keys))


class LossHistory(NamedTuple):
    """The last losses at each timestep, in no order, and how many there ever were."""

    losses: Float[Array, "timesteps history"]
    counts: Int[Array, " timesteps"]


def _init_history(num_timesteps: int) -> LossHistory:
    return LossHistory(jnp.zeros((num_timesteps, HISTORY)), jnp.zeros(num_timesteps, jnp.int32))


def importance_probabilities(state: LossHistory) -> Float[Array, " timesteps"]:
    """p_t proportional to sqrt(E[L_t^2]), once every timestep has its losses; uniform before.

    Nichol & Dhariwal 2021 (iDDPM), eq. 18.
    """
    num_timesteps = len(state.counts)
    moment = jnp.sqrt(jnp.mean(jnp.square(state.losses), axis=1))
    total = jnp.sum(moment)
    is_warm = jnp.all(state.counts >= HISTORY) & (total > 0)
    share = jnp.where(is_warm, moment / jnp.where(total > 0, total, 1.0), 1 / num_timesteps)
    return (1 - UNIFORM_SHARE) * share + UNIFORM_SHARE / num_timesteps


def importance(
    state: LossHistory, draw: TimestepDraw, num_timesteps: Timesteps
) -> tuple[Rows, Weights]:
    """Independent timesteps from ``importance_probabilities``, weighted by 1 / (T p_t)."""
    p = importance_probabilities(state)
    rows = jax.vmap(lambda k: jax.random.choice(k, len(p), p=p))(draw.keys)
    return rows, 1 / (len(p) * p[rows])


def update_history(state: LossHistory, rows: Rows, losses: Weights) -> LossHistory:
    """Put each loss in the place of the oldest one of its timestep."""
    same = rows[:, None] == rows[None, :]
    order = jnp.arange(len(rows))
    earlier = jnp.sum(same & (order[None, :] < order[:, None]), axis=1)
    later = jnp.sum(same & (order[None, :] > order[:, None]), axis=1)
    slots = (state.counts[rows] + earlier) % HISTORY
    # of more than fit the last ones stay; a row out of range is dropped
    kept = jnp.where(later < HISTORY, rows, len(state.counts))
    return LossHistory(
        state.losses.at[kept, slots].set(losses, mode="drop"), state.counts.at[rows].add(1)
    )


def _no_state(num_timesteps: int) -> tuple:
    return ()


def _keep(state: tuple, rows: Rows, losses: Weights) -> tuple:
    return state


TIMESTEP_SAMPLERS: dict[str, TimestepSampler] = {
    "uniform": TimestepSampler(_no_state, uniform, _keep),
    "low_discrepancy": TimestepSampler(_no_state, low_discrepancy, _keep),
    "importance": TimestepSampler(_init_history, importance, update_history),
}
