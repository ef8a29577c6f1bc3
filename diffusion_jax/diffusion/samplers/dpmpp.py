"""DPM-Solver++: exponential integrators of x_0, single-step and multistep (Lu et al. 2022)."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.diffusion.samplers.base import (
    Batch,
    Memory,
    Number,
    Sampler,
    Step,
    TwoStage,
    ddim_step,
    no_memory,
    normal,
    phi,
    ratio,
    width,
)
from diffusion_jax.diffusion.schedules.schedule import Schedule
from diffusion_jax.diffusion.tracing import is_known
from diffusion_jax.errors import require


class Dpmpp2S(TwoStage):
    """See ``dpmpp_2s``; its state is the native schedule."""

    goes_off_grid: ClassVar[bool] = True

    def init(self, x_T: Batch, rows: Schedule, schedule: Schedule) -> Schedule:
        """The native schedule, in which the middle rows of the steps are interpolated."""
        return schedule

    def step(self, now: Step) -> tuple[Batch, Schedule]:
        """Algorithm 1 of DPM-Solver++ (Lu et al. 2022) with r_1 = 1/2: x_0 at the middle."""
        x_t, row, row_prev = now.x_t, now.row, now.row_prev
        prediction = now.predict(x_t, row)
        euler = ddim_step(prediction, row_prev)

        def correct() -> Batch:
            middle = now.middle(now.state)
            x_0 = now.predict(ddim_step(prediction, middle), middle).x_0
            share = -jnp.expm1(-width(row)) * jnp.sqrt(row_prev.alpha_bar)
            return euler + share * (x_0 - prediction.x_0)

        return jax.lax.cond(now.is_last, lambda: euler, correct), now.state


class Dpmpp2M(Sampler):
    """See ``dpmpp_2m`` and ``dpmpp_2m_sde``."""

    eta: Number

    def init(self, x_T: Batch, rows: Schedule, schedule: Schedule) -> Memory:
        """The state before the first step."""
        return no_memory(x_T)

    def step(self, now: Step) -> tuple[Batch, Memory]:
        """Extrapolate x_0 to the middle of the step from the previous step, r = h_before / h.

        x_prev = sigma_prev / sigma e^(-eta h) x_t + sqrt(ab_prev) (1 - e^(-(1 + eta) h)) D
        + sigma_prev sqrt(1 - e^(-2 eta h)) z, D = x_0 + (x_0 - x_0_before) / (2 r)
        (DPM-Solver++, algorithm 2 and its SDE form; sigma here is sqrt(1 - ab)).
        """
        x_t, row, row_prev = now.x_t, now.row, now.row_prev
        prediction = now.predict(x_t, row)
        h = width(row)
        noisy = jnp.where(self.eta > 0, self.eta * h, 0)  # 0 * inf is nan
        deviation = jnp.sqrt(row_prev.one_minus_alpha_bar)
        x_prev = jnp.sqrt(row_prev.alpha_bar) * prediction.x_0
        x_prev += deviation * jnp.exp(-noisy) * prediction.eps
        x_prev += deviation * jnp.sqrt(-jnp.expm1(-2 * noisy)) * normal(now.keys, x_t)
        share = jnp.sqrt(row_prev.alpha_bar) * -jnp.expm1(-h - noisy)
        slope = ratio(h, now.state.width) * (prediction.x_0 - now.state.x_0)
        return x_prev + share * slope / 2, now.state.with_new(prediction.x_0, h)


class Dpmpp3M(Sampler):
    """See ``dpmpp_3m``."""

    def init(self, x_T: Batch, rows: Schedule, schedule: Schedule) -> Memory:
        """The state before the first step."""
        return no_memory(x_T)

    def step(self, now: Step) -> tuple[Batch, Memory]:
        """DDIM + sqrt(ab_prev) (phi_2 h x_0' - phi_3 h^2 x_0''), the derivatives of x_0 in lambda.

        The derivatives are those of the parabola through the last three x_0. Both are 0 in the
        first step of a chain; x_0'' is 0 in the second step. x_0'' is twice the second divided
        difference: published code leaves out the factor 2, and its order is therefore 2.
        """
        x_t, row, row_prev = now.x_t, now.row, now.row_prev
        prediction = now.predict(x_t, row)
        h, h_1, h_2 = width(row), now.state.width, now.state.width_before
        newer = ratio(h, h_1) * (prediction.x_0 - now.state.x_0)
        older = ratio(h, h_2) * (now.state.x_0 - now.state.x_0_before)
        first = newer + ratio(h_1, h_1 + h_2) * (newer - older)
        second = 2 * ratio(h, h_1 + h_2) * (newer - older)
        phi_2, phi_3 = phi(h)
        x_prev = ddim_step(prediction, row_prev)
        x_prev += jnp.sqrt(row_prev.alpha_bar) * (phi_2 * first - phi_3 * second)
        return x_prev, now.state.with_new(prediction.x_0, h)


def dpmpp_2s() -> Sampler:
    """DPM-Solver++(2S), single-step: it predicts x_0 at the middle of a step (Lu et al. 2022)."""
    return Dpmpp2S()


def dpmpp_2m() -> Sampler:
    """DPM-Solver++(2M), multistep: it extrapolates the last two x_0 by a line (Lu et al. 2022)."""
    return Dpmpp2M(0.0)


def dpmpp_2m_sde(eta: Number = 1.0) -> Sampler:
    """SDE-DPM-Solver++(2M): as dpmpp_2m, with the noise of the reverse SDE (Lu et al. 2022).

    ``eta`` >= 0 scales the noise: 0 is dpmpp_2m, 1 is the reverse SDE.

    Raises:
        ConfigError: a negative eta.
    """
    require(not is_known(eta) or 0 <= eta < np.inf, "eta", eta, "a finite number >= 0")
    return Dpmpp2M(eta)


def dpmpp_3m() -> Sampler:
    """DPM-Solver++(3M), multistep: it extrapolates the last three x_0 by a parabola in log SNR."""
    return Dpmpp3M()
