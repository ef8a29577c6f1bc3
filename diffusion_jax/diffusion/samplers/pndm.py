"""Pseudo linear multistep methods (Liu et al. 2022, PNDM)."""

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from diffusion_jax.diffusion.process import Prediction
from diffusion_jax.diffusion.samplers.base import Batch, Sampler, Step, ddim_step, step_along
from diffusion_jax.diffusion.schedules.schedule import Schedule

# Adams-Bashforth weights: row i has order i + 1, column j weights the eps of j steps before.
ADAMS_BASHFORTH = (
    np.array([[24, 0, 0, 0], [36, -12, 0, 0], [46, -32, 10, 0], [55, -59, 37, -9]]) / 24
)


class PndmState(NamedTuple):
    """The eps of the last three steps, newest first; the number of steps so far; the schedule."""

    eps: Float[Array, "3 batch ..."]
    num_steps: Int[Array, ""]
    schedule: Schedule


class Plms(Sampler):
    """See ``plms``."""

    needs_signal: ClassVar[bool] = True
    num_starting: ClassVar[int] = 1  # steps before the multistep method begins

    def init(self, x_T: Batch, rows: Schedule, schedule: Schedule) -> PndmState:
        """The state before the first step."""
        eps = jnp.zeros((len(ADAMS_BASHFORTH) - 1, *x_T.shape), x_T.dtype)
        return PndmState(eps, jnp.zeros((), jnp.int32), schedule)

    def step(self, now: Step) -> tuple[Batch, PndmState]:
        """A DDIM step along a weighted sum of the last eps, at most four (PNDM eqs. 9 to 12)."""
        prediction = now.predict(now.x_t, now.row)
        history = jnp.concatenate([prediction.eps[None], now.state.eps])
        order = jnp.minimum(now.state.num_steps, len(ADAMS_BASHFORTH) - 1)
        weights = jnp.asarray(ADAMS_BASHFORTH, now.x_t.dtype)[order]
        eps = jax.lax.cond(
            (now.state.num_steps < self.num_starting) & ~now.is_last,
            lambda: self._start(now, prediction),
            lambda: jnp.tensordot(weights, history, 1, precision="highest"),
        )
        x_prev = step_along(now, prediction, eps)
        return x_prev, PndmState(history[:-1], now.state.num_steps + 1, now.state.schedule)

    def _start(self, now: Step, prediction: Prediction) -> Batch:
        """The mean of eps at the two ends of the step: the improved Euler method."""
        euler = ddim_step(prediction, now.row_prev)
        return (prediction.eps + now.predict(euler, now.row_prev).eps) / 2

    def num_evaluations(self, num_steps: int) -> int:
        """One per step, and one more in the first step unless it is also the last."""
        return num_steps + min(self.num_starting, num_steps - 1)


class Pndm(Plms):
    """See ``pndm``."""

    goes_off_grid: ClassVar[bool] = True

    num_starting: ClassVar[int] = 3

    def _start(self, now: Step, prediction: Prediction) -> Batch:
        """(e_1 + 2 e_2 + 2 e_3 + e_4) / 6, pseudo Runge-Kutta (PNDM eq. 13)."""
        middle = now.middle(now.state.schedule)
        half = now._replace(row_prev=middle)
        second = now.predict(ddim_step(prediction, middle), middle).eps
        third = now.predict(step_along(half, prediction, second), middle).eps
        fourth = now.predict(step_along(now, prediction, third), now.row_prev).eps
        return (prediction.eps + 2 * second + 2 * third + fourth) / 6

    def num_evaluations(self, num_steps: int) -> int:
        """One per step, and three more in each of the first three steps that is not the last."""
        return num_steps + 3 * min(self.num_starting, num_steps - 1)


def plms() -> Sampler:
    """The pseudo linear multistep method with four eps, after one improved Euler step.

    Liu et al. 2022 (PNDM); latent diffusion starts in the same way. The weights assume equal steps
    in sigma. They amplify errors if a chain has few steps with fast-growing sigmas, such as the
    timesteps of the cosine schedule; the spacings "karras" and "log_snr" avoid this.
    """
    return Plms()


def pndm() -> Sampler:
    """PNDM: the linear multistep method of ``plms`` after three pseudo Runge-Kutta steps.

    Liu et al. 2022 (PNDM). With few steps it amplifies errors even more than ``plms``.
    """
    return Pndm()
