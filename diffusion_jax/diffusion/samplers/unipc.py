"""UniPC: predictor and corrector share an evaluation (Zhao et al. 2023, arXiv 2302.04867)."""

from typing import NamedTuple

import jax.numpy as jnp

from diffusion_jax.diffusion import process
from diffusion_jax.diffusion.samplers.base import (
    Batch,
    Memory,
    Sampler,
    Step,
    ddim_step,
    no_memory,
    phi,
    ratio,
    width,
)
from diffusion_jax.diffusion.schedules.schedule import Schedule


class UniPCState(NamedTuple):
    """The state of the corrector."""

    euler: Batch  # x_t as predicted by the DDIM step of the previous step
    memory: Memory


class UniPC(Sampler):
    """See ``unipc``."""

    def init(self, x_T: Batch, rows: Schedule, schedule: Schedule) -> UniPCState:
        """The state before the first step."""
        return UniPCState(x_T, no_memory(x_T))

    def step(self, now: Step) -> tuple[Batch, UniPCState]:
        """Correct x_t with the evaluation at x_t, then predict x_prev with the same evaluation.

        UniPC-2 (Zhao et al. 2023, algorithms 5 and 6) with the exact solution of its linear system,
        in which B(h) cancels. The corrector fits x_0 by a parabola in lambda, the predictor by a
        line.
        """
        x_t, row, row_prev = now.x_t, now.row, now.row_prev
        prediction = now.predict(x_t, row)
        memory = now.state.memory
        h, h_before = memory.width, memory.width_before  # of the last step, and the one before it
        phi_2, phi_3 = phi(h)
        bent = (phi_2 + 2 * phi_3) * ratio(h, h + h_before)
        corrected = now.state.euler + jnp.sqrt(row.alpha_bar) * (
            bent * ratio(h, h_before) * (memory.x_0 - memory.x_0_before)
            + (phi_2 - bent) * (prediction.x_0 - memory.x_0)
        )
        is_first = ~jnp.isfinite(h)
        x_t = jnp.where(is_first, x_t, corrected)
        prediction = prediction._replace(eps=process.eps_of_x_0(row, x_t, prediction.x_0))

        euler = ddim_step(prediction, row_prev)
        h_next = width(row)
        phi_2, _ = phi(h_next)
        slope = ratio(h_next, h) * (prediction.x_0 - memory.x_0)
        x_prev = euler + jnp.sqrt(row_prev.alpha_bar) * phi_2 * slope
        return x_prev, UniPCState(euler, memory.with_new(prediction.x_0, h_next))


def unipc() -> Sampler:
    """UniPC-2: a predictor and a corrector with one evaluation per step (Zhao et al. 2023)."""
    return UniPC()
