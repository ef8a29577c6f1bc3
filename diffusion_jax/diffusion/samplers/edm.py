"""The two samplers of EDM: Heun's method and the stochastic sampler (Karras et al. 2022)."""

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from diffusion_jax.diffusion import schedules
from diffusion_jax.diffusion.samplers.base import (
    Batch,
    Number,
    Sampler,
    Step,
    TwoStage,
    ddim_step,
    normal,
)
from diffusion_jax.diffusion.schedules.schedule import Schedule
from diffusion_jax.diffusion.tracing import is_known
from diffusion_jax.errors import require

SAME = 1e-5  # float32 log SNRs that are closer may be two roundings of one number


def _heun(now: Step) -> Batch:
    """y_prev = y + (sigma_prev - sigma) (eps + eps') / 2, where eps' is at the Euler step's end.

    The last step is an Euler step, because eps is undefined at sigma = 0.
    """
    prediction = now.predict(now.x_t, now.row)
    euler = ddim_step(prediction, now.row_prev)

    def correct() -> Batch:
        slope = now.predict(euler, now.row_prev).eps - prediction.eps
        return euler + now.drop_of_sigma * slope / 2

    x_prev: Batch = jax.lax.cond(now.is_last, lambda: euler, correct)
    return x_prev


class Heun(TwoStage):
    """See ``heun``."""

    def step(self, now: Step) -> tuple[Batch, tuple[Any, ...]]:
        """One step of algorithm 1 of EDM (Karras et al. 2022)."""
        return _heun(now), now.state


class EdmState(NamedTuple):
    """The schedule, in which rows of raised noise levels are interpolated, and the step count."""

    schedule: Schedule
    num_steps: Int[Array, ""]


class Edm(TwoStage):
    """See ``edm``."""

    goes_off_grid: ClassVar[bool] = True

    churn: Number
    churn_min: Number
    churn_max: Number
    noise: Number

    def init(self, x_T: Batch, rows: Schedule, schedule: Schedule) -> EdmState:
        """The native schedule, and the number of steps of the chain."""
        return EdmState(schedule, jnp.asarray(len(rows)))

    def step(self, now: Step) -> tuple[Batch, EdmState]:
        """Raise sigma by the factor 1 + gamma with fresh noise, then take a step of Heun's method.

        gamma = min(churn / num_steps, sqrt(2) - 1) for sigma in [churn_min, churn_max], else 0
        (EDM algorithm 2). The raised sigma is at most the largest sigma of the schedule.
        """
        x_t, row, state = now.x_t, now.row, now.state
        room = row.log_snr - state.schedule.log_snr[-1]
        inside = (row.sigma >= self.churn_min) & (row.sigma <= self.churn_max) & (room > SAME)
        gamma = jnp.where(inside, jnp.minimum(self.churn / state.num_steps, np.sqrt(2) - 1), 0)
        rise = jnp.minimum(2 * jnp.log1p(gamma), jnp.where(inside, room, 0))  # of -log SNR
        raised = schedules.at_log_snr(state.schedule, (row.log_snr - rise)[None])[0]
        # y + sqrt(sigma_hat^2 - sigma^2) z, times sqrt(alpha_bar) at the raised level
        signal = jnp.sqrt(raised.alpha_bar / row.alpha_bar) * x_t
        deviation = jnp.sqrt(raised.one_minus_alpha_bar * -jnp.expm1(-rise))
        x_hat = signal + self.noise * deviation * normal(now.keys, x_t)
        return _heun(now._replace(x_t=x_hat, row=raised)), now.state


def heun() -> Sampler:
    """Heun's second-order method on the sigmas of the chain (Karras et al. 2022, algorithm 1).

    Too few steps with fast-growing sigmas amplify errors without bound. An example is 2 to 5 of the
    1,000 timesteps of the cosine schedule: even with the exact denoiser, samples of a distribution
    with two modes in [-1, 1] reach 411 to 59, with one mode 44 to 5. On this schedule 10 steps of
    spacing "log_snr" or 20 of "karras" stay bounded. On the linear schedule a few steps of spacing
    "trailing" stay bounded.
    """
    return Heun()


def edm(
    churn: Number = 40.0, churn_min: Number = 0.05, churn_max: Number = 50.0, noise: Number = 1.003
) -> Sampler:
    """EDM's stochastic sampler: fresh noise before each step of Heun's method (algorithm 2).

    ``churn`` >= 0 is S_churn, ``churn_min`` and ``churn_max`` are S_tmin and S_tmax in units of
    sigma, ``noise`` > 0 is S_noise; the defaults are EDM's for ImageNet-64 (table 5). Too few steps
    amplify errors as in ``heun``: with 2 to 5 of the cosine schedule's timesteps, samples of data
    in [-1, 1] reach 211 to 14.

    Raises:
        ConfigError: a number out of its range, or churn_min above churn_max.
    """
    require(not is_known(churn) or 0 <= churn < np.inf, "churn", churn, "a finite number >= 0")
    require(not is_known(churn_min) or churn_min >= 0, "churn_min", churn_min, "at least 0")
    require(not is_known(churn_max) or churn_max >= 0, "churn_max", churn_max, "at least 0")
    fits = not is_known(churn_min, churn_max) or churn_min <= churn_max
    require(fits, "churn_min", churn_min, f"at most churn_max = {churn_max}")
    require(not is_known(noise) or 0 < noise < np.inf, "noise", noise, "a finite number > 0")
    return Edm(churn, churn_min, churn_max, noise)
