"""The training objective: the loss of one example at one timestep, vmapped over both.

The network runs on the whole batch between two vmapped functions: the noising before it and
the loss after it. Noise, timestep and dropout of an example depend on the key of the step and on
the example's index in the *global* batch alone, never on how devices share the batch.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key, PyTree

from diffusion_jax.diffusion import likelihood, process, schedules
from diffusion_jax.diffusion.examples import Examples, example_keys
from diffusion_jax.diffusion.parametrisations import Parametrisation
from diffusion_jax.diffusion.process import Example, Prediction
from diffusion_jax.diffusion.schedules.schedule import Schedule
from diffusion_jax.diffusion.timesteps import TimestepDraw, TimestepSampler
from diffusion_jax.diffusion.variances import Variance
from diffusion_jax.diffusion.weightings import Weighting


class Objective(NamedTuple):
    """The static choices of a training objective."""

    parametrisation: Parametrisation
    weighting: Weighting
    is_vlb: bool  # the whole L_vlb with L_0 and the KL of the variances, not its weight alone
    variance: Variance
    vlb_scale: float  # factor of L_vlb, which is added where the variance is learned
    timesteps: TimestepSampler
    levels: int | None  # of the data; None: continuous
    num_classes: int | None  # of the data; None: without labels
    label_dropout: float  # share of labels that are replaced by "no class"


class NoisedExample(NamedTuple):
    """An example at its timestep, with the network's input x_t and its target."""

    x_0: Example
    x_t: Example
    target: Example


def noise_example(
    parametrisation: Parametrisation, key: Key[Array, ""], row: Schedule, x_0: Example
) -> NoisedExample:
    """Draw x_t from q(x_t | x_0) and the target that belongs to it (DDPM algorithm 1, line 4)."""
    eps = jax.random.normal(key, x_0.shape)
    x_t = process.q_sample(row, x_0, eps)
    return NoisedExample(x_0, x_t, parametrisation.encode(row, Prediction(x_0, eps), x_t))


def split_output(variance: Variance, output: Example) -> tuple[Example, Example | None]:
    """The parts of an output for the mean and, if it is learned, for the variance."""
    if not variance.is_learned:
        return output, None
    of_mean, of_variance = jnp.split(output, 2, axis=-1)
    return of_mean, of_variance


def decode_output(objective: Objective, row: Schedule, x_t: Example, output: Example) -> Prediction:
    """The prediction that an output means, with the log variance of p(x_{t-1} | x_t)."""
    of_mean, of_variance = split_output(objective.variance, output)
    prediction = objective.parametrisation.decode(row, x_t, of_mean)
    log_variance = objective.variance.log_variance(row, of_variance)
    return prediction._replace(log_variance=log_variance)


def example_loss(
    objective: Objective,
    num_timesteps: int | Int[Array, ""],
    row: Schedule,
    noised: NoisedExample,
    output: Example,
) -> Float[Array, ""]:
    """The loss of one example at one timestep, a mean over its dimensions.

    w(t) |target - output|^2 / D; with w = 1 and the target eps it is L_simple (DDPM eq. 14). With
    a learned variance ``vlb_scale`` L_vlb is added, in which the mean is held fixed: L_hybrid
    (iDDPM eq. 16). L_vlb is T times a term of the bound, in bits.
    """
    prediction = decode_output(objective, row, noised.x_t, output)
    log_variance = prediction.log_variance
    assert log_variance is not None  # decode_output gives it

    def vlb(predicted_x_0: Example) -> Float[Array, ""]:
        x_0, levels = noised.x_0, objective.levels
        term = likelihood.variational_term(row, x_0, predicted_x_0, log_variance, levels)
        return num_timesteps * likelihood.bits(jnp.mean(term))

    if objective.is_vlb:
        return vlb(prediction.x_0)
    gain = objective.parametrisation.gain(row)
    fixed = lax.stop_gradient(log_variance)  # nothing is learned through a weight
    weight = objective.weighting(row, gain, fixed) / gain**2
    of_mean, _ = split_output(objective.variance, output)
    loss = jnp.mean(weight * jnp.square(noised.target - of_mean))
    if objective.variance.is_learned:
        loss += objective.vlb_scale * vlb(lax.stop_gradient(prediction.x_0))
    return loss


class BatchLosses(NamedTuple):
    """The losses of this device's examples, with their rows and weights."""

    losses: Float[Array, " batch"]
    rows: Int[Array, " batch"]
    weights: Float[Array, " batch"]


class LossInputs(NamedTuple):
    """The inputs of the losses of a step, besides the parameters."""

    schedule: Schedule
    timestep_state: Any
    key: Key[Array, ""]
    examples: Examples


Apply = Callable[..., Float[Array, "batch ..."]]  # of a Model
# An objective as a training step calls it: the step minimises mean(weights losses).
LossesOf = Callable[[PyTree, LossInputs], BatchLosses]


def drop_labels(
    objective: Objective, keys: Key[Array, " batch"], label: Int[Array, " batch"] | None
) -> Int[Array, " batch"] | None:
    """Replace each label with probability ``label_dropout`` (Ho & Salimans 2022, algorithm 1).

    Label num_classes means "no class": so one network learns p(x_0) as well as p(x_0 | label).
    """
    if objective.label_dropout == 0:
        return label
    assert label is not None
    assert objective.num_classes is not None  # where labels are dropped
    dropped = jax.vmap(lambda key: jax.random.bernoulli(key, objective.label_dropout))(keys)
    return jnp.where(dropped, objective.num_classes, label)


def discrete_time(objective: Objective, apply: Apply) -> LossesOf:
    """The objective of DDPM and iDDPM: losses at random timesteps of the schedule."""
    return functools.partial(_discrete_losses, objective, apply)


def _discrete_losses(
    objective: Objective, apply: Apply, params: PyTree, inputs: LossInputs
) -> BatchLosses:
    """Losses whose weighted mean estimates the mean loss over all timesteps.

    Only rows up to T are drawn, where the schedule is padded.
    """
    schedule, examples = inputs.schedule, inputs.examples
    num_timesteps = schedules.num_timesteps(schedule)
    keys = example_keys(inputs.key, examples.indices)
    draw = TimestepDraw(keys.common, keys.first, examples.indices, examples.batch_size)
    position, weights = objective.timesteps.draw(inputs.timestep_state, draw, num_timesteps)
    rows = schedules.clip_posterior_variance(schedule)[position]
    noised = jax.vmap(lambda *example: noise_example(objective.parametrisation, *example))(
        keys.second, rows, examples.x_0
    )
    label = drop_labels(objective, keys.label, examples.label)
    output = apply(params, noised.x_t, rows.timestep, label, keys.dropout)
    losses = jax.vmap(lambda *example: example_loss(objective, num_timesteps, *example))(
        rows, noised, output
    )
    return BatchLosses(losses, position, weights)
