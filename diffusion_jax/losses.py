"""The training objective: a loss of one example at one timestep, vmapped over both.

The network runs on the whole batch between two vmapped functions: the noising before it and
the loss after it. Example i's noise, timestep and dropout depend on the step's key and on its
index in the *global* batch alone, never on how the batch is spread over devices.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from diffusion_jax import process
from diffusion_jax.process import Example, Parametrisation, Prediction
from diffusion_jax.schedules import Schedule


class Objective(NamedTuple):
    """The static choices of a training objective: what is predicted, weighted and drawn."""

    parametrisation: Parametrisation
    weighting: Callable[[Schedule], Float[Array, ""]]
    sample_timesteps: Callable[..., Int[Array, " batch"]]


class NoisedExample(NamedTuple):
    """An example at its timestep: what the network sees and what it should say."""

    x_t: Example
    target: Example


def noise_example(
    parametrisation: Parametrisation, key: Key[Array, ""], row: Schedule, x_0: Example
) -> NoisedExample:
    """Draw x_t from q(x_t | x_0) and the target that belongs to it (DDPM algorithm 1, line 4)."""
    eps = jax.random.normal(key, x_0.shape)
    x_t = process.q_sample(row, x_0, eps)
    return NoisedExample(x_t, parametrisation.encode(row, Prediction(x_0, eps), x_t))


def example_loss(
    weighting: Callable[[Schedule], Float[Array, ""]],
    row: Schedule,
    target: Example,
    output: Example,
) -> Float[Array, ""]:
    """Weighted squared error of one example at one timestep, a mean over its dimensions.

    w(t) |target - output|^2 / D; with w = 1 and the target eps it is L_simple (DDPM eq. 14).
    """
    return weighting(row) * jnp.mean(jnp.square(target - output))


def batch_losses(
    objective: Objective,
    apply: Callable[..., Float[Array, "batch ..."]],
    params: dict,
    schedule: Schedule,
    key: Key[Array, ""],
    x_0: Float[Array, "batch ..."],
    label: Int[Array, " batch"] | None,
    indices: Int[Array, " batch"],
    batch_size: int,
) -> tuple[Float[Array, " batch"], Int[Array, " batch"]]:
    """The losses of this device's examples, and the row of the schedule at which each was taken.

    ``indices`` are the examples' places in the global batch of ``batch_size``.
    """
    common_key, example_key = jax.random.split(key)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(example_key, indices)
    timestep_keys, noise_keys, dropout_keys = jax.vmap(lambda k: jax.random.split(k, 3))(keys).T
    position = objective.sample_timesteps(
        common_key, timestep_keys, indices, batch_size, len(schedule)
    )
    rows = schedule[position]
    noised = jax.vmap(lambda *example: noise_example(objective.parametrisation, *example))(
        noise_keys, rows, x_0
    )
    output = apply(params, noised.x_t, rows.timestep, label, dropout_keys)
    losses = jax.vmap(lambda *example: example_loss(objective.weighting, *example))(
        rows, noised.target, output
    )
    return losses, position


# A timestep sampler: (key common to the batch, a key per example, their places in the batch, its
# size, T) -> rows 0..T-1.


def uniform_timesteps(
    key: Key[Array, ""],
    keys: Key[Array, " batch"],
    indices: Int[Array, " batch"],
    batch_size: int,
    num_timesteps: int,
) -> Int[Array, " batch"]:
    """Independent uniform timesteps (DDPM algorithm 1, line 3), as rows 0..T-1."""
    return jax.vmap(lambda k: jax.random.randint(k, (), 0, num_timesteps))(keys)


def low_discrepancy_timesteps(
    key: Key[Array, ""],
    keys: Key[Array, " batch"],
    indices: Int[Array, " batch"],
    batch_size: int,
    num_timesteps: int,
) -> Int[Array, " batch"]:
    """Evenly spread timesteps with one common random offset, as rows 0..T-1.

    t_i = floor(T ((u + i / batch_size) mod 1)), u ~ U[0, 1): each t_i is uniform, the batch's
    mean loss has a smaller variance (Kingma et al. 2021, VDM, appendix I.1).
    """
    offset = jax.random.uniform(key)
    position = (offset + indices / batch_size) % 1.0
    # float32 may round T * 0.99999997 up to T
    return jnp.minimum((position * num_timesteps).astype(jnp.int32), num_timesteps - 1)


WEIGHTINGS: dict[str, Callable[[Schedule], Float[Array, ""]]] = {
    "simple": lambda row: jnp.ones_like(row.beta),
}

TIMESTEP_SAMPLERS: dict[str, Callable[..., Int[Array, " batch"]]] = {
    "uniform": uniform_timesteps,
    "low_discrepancy": low_discrepancy_timesteps,
}
