"""The variational bound of examples, estimated at one random timestep per stratum."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from diffusion_jax.diffusion import likelihood, losses, process
from diffusion_jax.diffusion.examples import Examples
from diffusion_jax.diffusion.losses import Objective
from diffusion_jax.diffusion.network import Network
from diffusion_jax.diffusion.process import Example
from diffusion_jax.diffusion.schedules.schedule import Schedule, clip_posterior_variance

Values = Float[Array, "..."] | Float[np.ndarray, "..."]  # on a device, or read from it


class Terms(NamedTuple):
    """The evaluated numbers of one example at one timestep, each a mean over its dimensions."""

    bits: Values  # L_{t-1}, or L_0 at t = 1
    mse_x_0: Values
    mse_eps: Values


class Strata(NamedTuple):
    """Groups of consecutive rows; each image is evaluated at one uniformly drawn row per group."""

    number: Int[np.ndarray, " strata"]
    first: Int[np.ndarray, " strata"]
    size: Int[np.ndarray, " strata"]


def stratify(num_timesteps: int, budget: int) -> Strata:
    """Divide the rows 0..T-1 into ``budget`` strata: t = 1 alone, then groups of about equal size.

    t = 1 is alone because L_0 differs from the other terms. A budget of 1 is one stratum of all
    rows.
    """
    ends = np.round(np.linspace(1, num_timesteps, budget)).astype(int)
    first = np.concatenate([[0], ends[:-1]]) if budget > 1 else np.zeros(1, int)
    return Strata(np.arange(budget), first, np.concatenate([first[1:], [num_timesteps]]) - first)


def example_terms(
    objective: Objective,
    row: Schedule,
    x_0: Example,
    eps: Example,
    output: Example,
    *,
    clip_x_0: bool,
) -> Terms:
    """The bound's term of one example at one timestep, and the squared errors of x_0 and eps."""
    x_t = process.q_sample(row, x_0, eps)
    prediction = losses.decode_output(objective, row, x_t, output)
    if clip_x_0:
        prediction = process.clip_x_0(row, x_t, prediction)
    log_variance = prediction.log_variance
    assert log_variance is not None  # decode_output always sets it
    term = likelihood.variational_term(row, x_0, prediction.x_0, log_variance, objective.levels)
    return Terms(
        likelihood.bits(jnp.mean(term)),
        jnp.mean(jnp.square(x_0 - prediction.x_0)),
        jnp.mean(jnp.square(eps - prediction.eps)),
    )


def bound_terms(
    network: Network,
    params: PyTree,
    schedule: Schedule,
    key: Key[Array, ""],
    examples: Examples,
    *,
    strata: Strata,
    clip_x_0: bool,
) -> tuple[Int[Array, "strata batch"], Terms]:
    """Draw one row per stratum for each image, and compute the terms of the bound at these rows.

    The network runs on the whole batch, between two functions that are vmapped over the images. The
    three together are vmapped over the strata.
    """
    row_key, noise_key = jax.random.split(key)
    schedule, x_0 = clip_posterior_variance(schedule), examples.x_0

    def of_stratum(
        number: Int[Array, ""], first: Int[Array, ""], size: Int[Array, ""]
    ) -> tuple[Int[Array, " batch"], Terms]:
        def draw(index: Int[Array, ""]) -> tuple[Int[Array, ""], Float[Array, "..."]]:
            u = jax.random.uniform(jax.random.fold_in(jax.random.fold_in(row_key, index), number))
            position = first + jnp.minimum((u * size).astype(jnp.int32), jnp.maximum(size - 1, 0))
            eps_key = jax.random.fold_in(jax.random.fold_in(noise_key, index), position)
            return position, jax.random.normal(eps_key, x_0.shape[1:])

        positions, eps = jax.vmap(draw)(examples.indices)
        rows = schedule[positions]
        x_t = jax.vmap(process.q_sample)(rows, x_0, eps)
        output = network.model.apply(params, x_t, rows.timestep, examples.label, None)
        of_example = functools.partial(example_terms, network.objective, clip_x_0=clip_x_0)
        return positions, jax.vmap(of_example)(rows, x_0, eps, output)

    return jax.vmap(of_stratum)(*jax.tree.map(jnp.asarray, strata))
