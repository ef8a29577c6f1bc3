"""The reverse chain: one ``jax.lax.scan`` over the reversed rows of a schedule, any sampler.

A sampler sees per-image keys, ``predict`` and the two rows of its interval, nothing else. It is
a pytree whose numbers (eta) are leaves, so that changing them compiles nothing anew.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from diffusion_jax import process, schedules
from diffusion_jax.process import Predict
from diffusion_jax.schedules import Schedule
from diffusion_jax.variances import VARIANCES

Batch = Float[Array, "batch ..."]


@runtime_checkable
class Sampler(Protocol):
    """An init/step pair; ``state`` is what a multistep method remembers."""

    def init(self, x_T: Batch) -> Any:
        """State before the first step."""
        ...

    def step(
        self,
        keys: Key[Array, " batch"],
        predict: Predict,
        state: Any,
        x_t: Batch,
        row: Schedule,
        row_prev: Schedule,
    ) -> tuple[Batch, Any]:
        """One step from the timestep of ``row`` down to that of ``row_prev``."""
        ...


def normal(keys: Key[Array, " batch"], like: Batch) -> Batch:
    """Standard normal noise in the shape of ``like``, each image from a key of its own."""
    return jax.vmap(lambda key: jax.random.normal(key, like.shape[1:]))(keys)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ancestral:
    """See ``ancestral``."""

    variance: str = dataclasses.field(metadata={"static": True})

    def init(self, x_T: Batch) -> tuple:
        """Nothing to remember."""
        return ()

    def step(
        self,
        keys: Key[Array, " batch"],
        predict: Predict,
        state: tuple,
        x_t: Batch,
        row: Schedule,
        row_prev: Schedule,
    ) -> tuple[Batch, tuple]:
        """x_{t-1} = mu(x_t, x_0) + sigma_t z, z = 0 in the last step (DDPM algorithm 2)."""
        prediction = predict(x_t, row)
        mean = process.posterior_mean(row, prediction.x_0, x_t)
        variance = VARIANCES[self.variance]
        if not variance.is_learned:
            log_variance = variance.log_variance(row, None)
        elif prediction.log_variance is None:
            raise ValueError(f"variance = {self.variance!r}: the network predicts no variance")
        else:
            log_variance = prediction.log_variance
        is_last = row_prev.one_minus_alpha_bar == 0
        deviation = jnp.where(is_last, 0.0, jnp.exp(log_variance / 2))
        return mean + deviation * normal(keys, x_t), state


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ddim:
    """See ``ddim``."""

    eta: float | Float[Array, ""]

    def init(self, x_T: Batch) -> tuple:
        """Nothing to remember."""
        return ()

    def step(
        self,
        keys: Key[Array, " batch"],
        predict: Predict,
        state: tuple,
        x_t: Batch,
        row: Schedule,
        row_prev: Schedule,
    ) -> tuple[Batch, tuple]:
        """x_{t-1} = sqrt(ab_prev) x_0 + sqrt(1 - ab_prev - sigma^2) eps + sigma z (DDIM eq. 12).

        sigma^2 = eta^2 beta~, and 1 - ab_prev - eta^2 beta~ =
        (1 - ab_prev) (1 - eta^2 + eta^2 alpha (1 - ab_prev) / (1 - ab)), which subtracts nothing
        that is nearly equal.
        """
        prediction = predict(x_t, row)
        eta2 = self.eta**2
        kept = 1 - eta2 + eta2 * row.alpha * row.one_minus_alpha_bar_prev / row.one_minus_alpha_bar
        direction = jnp.sqrt(row.one_minus_alpha_bar_prev * kept)
        x_prev = jnp.sqrt(row.alpha_bar_prev) * prediction.x_0 + direction * prediction.eps
        return x_prev + self.eta * jnp.sqrt(row.posterior_variance) * normal(keys, x_t), state


def ancestral(variance: str = "posterior") -> Sampler:
    """Ancestral sampling from p(x_{t-1} | x_t), a Gaussian around the posterior mean (DDPM).

    ``variance`` is "beta" or "posterior" (beta~), the two fixed choices of DDPM section 3.2, or
    one that the network has learned (then both names mean what it predicts).

    Raises:
        ValueError: an unknown variance.
    """
    if variance not in VARIANCES:
        raise ValueError(f"variance = {variance!r}: must be one of {', '.join(VARIANCES)}")
    return Ancestral(variance)


def ddim(eta: float | Float[Array, ""] = 0.0) -> Sampler:
    """Denoising diffusion implicit models (Song et al. 2021).

    ``eta`` in [0, 1]: 0 is deterministic, 1 has the ancestral mean and variance.

    Raises:
        ValueError: eta outside [0, 1] (a traced eta is not checked).
    """
    if not isinstance(eta, jax.core.Tracer) and not 0 <= eta <= 1:
        raise ValueError(f"eta = {eta}: must be in [0, 1]")
    return Ddim(eta)


def sample(
    key: Key[Array, ""],
    predict: Predict,
    schedule: Schedule,
    sampler: Sampler,
    shape: tuple[int, ...],
    x_T: Batch | None = None,
    indices: Int[Array, " batch"] | None = None,
) -> Batch:
    """Draw images from the model: the reverse chain from x_T ~ N(0, I) to x_0.

    ``shape`` is (batch, ...). ``indices`` are the images' global numbers (default 0..batch-1):
    image i depends on ``key`` and i alone, whatever the batch.
    """
    return trajectory(key, predict, schedule, sampler, shape, 0, x_T, indices)[0]


def trajectory(
    key: Key[Array, ""],
    predict: Predict,
    schedule: Schedule,
    sampler: Sampler,
    shape: tuple[int, ...],
    num_frames: int,
    x_T: Batch | None = None,
    indices: Int[Array, " batch"] | None = None,
) -> tuple[Batch, Float[Array, "frames batch ..."]]:
    """As ``sample``, and ``num_frames`` evenly spaced x_t of the chain, from x_T to x_0.

    Only the frames that are kept are stored: memory grows with them, not with the steps.

    Raises:
        ValueError: more frames than the chain has states (one more than its steps).
    """
    if not (num_frames == 0 or 2 <= num_frames <= len(schedule) + 1):
        raise ValueError(f"num_frames = {num_frames}: must be 0 or in 2..{len(schedule) + 1}")
    if indices is None:
        indices = jnp.arange(shape[0])
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, indices)
    if x_T is None:
        x_T = normal(_fold(keys, 0), jnp.empty(shape))

    # state n of the chain (0 is x_T) goes to frame slot_of[n]; slots past the end are dropped
    slot_of = np.full(len(schedule) + 1, num_frames, np.int32)
    slot_of[np.linspace(0, len(schedule), num_frames).round().astype(int)] = np.arange(num_frames)
    frames = jnp.broadcast_to(x_T, (num_frames, *shape))

    def step(carry: tuple, interval: tuple) -> tuple[tuple, None]:
        x_t, state, frames = carry
        number, slot, row, row_prev = interval
        x_t, state = sampler.step(_fold(keys, number), predict, state, x_t, row, row_prev)
        if num_frames:
            frames = frames.at[slot].set(x_t, mode="drop")
        return (x_t, state, frames), None

    number = jnp.arange(len(schedule), 0, -1)
    intervals = (number, slot_of[1:], schedule[::-1], schedules.previous(schedule)[::-1])
    (x_0, _, frames), _ = jax.lax.scan(step, (x_T, sampler.init(x_T), frames), intervals)
    return x_0, frames


def _fold(keys: Key[Array, " batch"], number: int | Int[Array, ""]) -> Key[Array, " batch"]:
    return jax.vmap(jax.random.fold_in, (0, None))(keys, number)


SAMPLERS: dict[str, Callable[..., Sampler]] = {
    "ancestral": ancestral,
    "ddim": ddim,
}
