"""The reverse chain: one ``jax.lax.scan`` over the reversed rows of a schedule, any sampler.

A sampler sees per-image keys, ``predict`` and the two rows of its step, nothing else. It is
a pytree whose numbers (eta) are leaves, so that changing them compiles nothing anew.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from diffusion_jax.diffusion import schedules
from diffusion_jax.diffusion.process import Predict, Prediction
from diffusion_jax.diffusion.samplers.base import Batch, Sampler, Step, fold, normal
from diffusion_jax.diffusion.schedules.schedule import Schedule
from diffusion_jax.diffusion.tracing import is_known
from diffusion_jax.errors import require


def sample(
    key: Key[Array, ""],
    predict: Predict,
    schedule: Schedule,
    sampler: Sampler,
    shape: tuple[int, ...],
    *,
    x_T: Batch | None = None,
    indices: Int[Array, " batch"] | None = None,
    native: Schedule | None = None,
) -> Batch:
    """Draw images from the model: the reverse chain from x_T ~ N(0, I) to x_0.

    ``shape`` is (batch, ...). ``indices`` are the images' global numbers (default 0..batch-1):
    image i depends on ``key`` and i alone, whatever the batch. Samplers that evaluate between the
    rows of ``schedule`` look up what the network is told there in ``native``, the schedule that it
    was trained with (default: ``schedule`` itself).
    """
    inputs = key, predict, schedule, sampler, shape
    return trajectory(*inputs, num_frames=0, x_T=x_T, indices=indices, native=native).x_0


class Trajectory(NamedTuple):
    """The end of a chain, and frames of its way there: x_t, and the x_0 that was predicted."""

    x_0: Batch
    x_t: Float[Array, "frames batch ..."]
    predicted_x_0: Float[Array, "frames batch ..."]


def trajectory(
    key: Key[Array, ""],
    predict: Predict,
    schedule: Schedule,
    sampler: Sampler,
    shape: tuple[int, ...],
    *,
    num_frames: int,
    x_T: Batch | None = None,
    indices: Int[Array, " batch"] | None = None,
    native: Schedule | None = None,
) -> Trajectory:
    """As ``sample``, and ``num_frames`` evenly spaced states of the chain, from x_T to x_0.

    Only the frames that are kept are stored: memory grows with them, not with the steps.

    Raises:
        ValueError: more frames than the chain has states (one more than its steps), or frames
            of a chain that goes back up.
    """
    path = sampler.path(len(schedule))
    fits = num_frames == 0 or 2 <= num_frames <= len(path)
    require(fits, "num_frames", num_frames, f"0 or in 2..{len(path)}")
    goes_down = len(path) == len(schedule) + 1
    require(
        not num_frames or goes_down, "num_frames", num_frames, "0 for a chain that goes back up"
    )
    if indices is None:
        indices = jnp.arange(shape[0])
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, indices)
    if x_T is None:
        x_T = normal(fold(keys, 0), jnp.empty(shape))

    # state n of the chain (0 is x_T) goes to frame slot_of[n]; slots past the end are dropped
    slot_of = np.full(len(path), num_frames, np.int32)
    slot_of[np.linspace(0, len(path) - 1, num_frames).round().astype(int)] = np.arange(num_frames)
    frames = jnp.broadcast_to(x_T, (num_frames, *shape))

    def step(carry: tuple, interval: tuple) -> tuple[tuple, None]:
        x_t, state, frames, predicted = carry
        number, slot, row, row_prev = interval
        seen = []

        def watched(x_t: Batch, row: Schedule) -> Prediction:
            prediction = predict(x_t, row)
            seen.append(prediction.x_0)
            return prediction

        now = Step(
            keys=fold(keys, number),
            predict=watched if num_frames else predict,
            state=state,
            x_t=x_t,
            row=row,
            row_prev=row_prev,
        )
        x_prev, state = sampler.step(now)
        if num_frames:
            frames = frames.at[slot].set(x_t, mode="drop")
            predicted = predicted.at[slot].set(seen[0], mode="drop")
        return (x_prev, state, frames, predicted), None

    rows = schedules.with_terminal_row(schedule)
    number = jnp.arange(len(path) - 1, 0, -1)
    intervals = (number, slot_of[:-1], rows[path[:-1]], rows[path[1:]])
    carry = (
        x_T,
        sampler.init(x_T, schedule, schedule if native is None else native),
        frames,
        frames,
    )
    (x_0, _, frames, predicted), _ = jax.lax.scan(step, carry, intervals)
    if num_frames:
        frames, predicted = frames.at[-1].set(x_0), predicted.at[-1].set(x_0)
    return Trajectory(x_0, frames, predicted)


INVERSION_ROUNDS = 5


def invert(
    predict: Predict, schedule: Schedule, x_0: Batch, num_iterations: int = INVERSION_ROUNDS
) -> Batch:
    """DDIM backwards, from an image to the x_T that DDIM (eta 0) would make it of: one scan.

    Each step solves x_{t-1} = DDIM(x_t) for x_t by ``num_iterations`` >= 1 rounds of
    x_t = sqrt(alpha) x_{t-1} + beta / (sqrt(1 - ab) + sqrt(alpha (1 - ab_prev))) eps(x_t, t).
    One round, eps taken at x_{t-1}, is the published inversion (Dhariwal & Nichol 2021, section
    3.2). The rounds converge where steps are small and the data are not between two modes: of a
    mixture on the cosine schedule DDIM brings x_0 back to 0.2 with 20 steps, 0.03 with 200 and
    0.006 with 1,000; on the linear one to 1e-4 from 200 steps on.

    Raises:
        ValueError: num_iterations < 1.
    """
    require(
        not is_known(num_iterations) or num_iterations >= 1,
        "num_iterations",
        num_iterations,
        "at least 1",
    )

    def step(x_prev: Batch, row: Schedule) -> tuple[Batch, None]:
        kept = jnp.sqrt(row.alpha)
        root = jnp.sqrt(row.one_minus_alpha_bar_prev)
        share = row.beta / (jnp.sqrt(row.one_minus_alpha_bar) + kept * root)

        def improve(_: Int[Array, ""], x_t: Batch) -> Batch:
            return kept * x_prev + share * predict(x_t, row).eps

        return jax.lax.fori_loop(0, num_iterations, improve, x_prev), None

    return jax.lax.scan(step, x_0, schedule)[0]
