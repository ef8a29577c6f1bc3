"""The training objective: the loss of one example at one timestep, vmapped over the batch.

The network runs on the whole batch between two vmapped functions: the noising before it and
the loss after it. The noise, timestep and dropout of an example depend on the key of the step and
on the example's index in the *global* batch, never on how the devices share the batch.
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
    is_vlb: bool  # train L_vlb itself: with L_0 and the KL of the variances, not only its weight
    variance: Variance
    vlb_scale: float  # of L_vlb in L_hybrid, the loss of a learned variance
    timesteps: TimestepSampler
    levels: int | None  # of the data; None: continuous
    num_classes: int | None  # of the data; None: without labels
    label_dropout: float  # probability that a label is replaced by "no class"


class NoisedExample(NamedTuple):
    """An example at its timestep, with the network's input x_t and its target."""

    x_0: Example
    x_t: Example
    target: Example


def noise_example(
    parametrisation: Parametrisation, key: Key[Array, ""], row: Schedule, x_0: Example
) -> NoisedExample:
    """Draw x_t from q(x_t | x_0), and compute its target (DDPM algorithm 1, lines 4 and 5)."""
    eps = jax.random.normal(key, x_0.shape)
    x_t = process.q_sample(row, x_0, eps)
    return NoisedExample(x_0, x_t, parametrisation.encode(row, Prediction(x_0, eps), x_t))


def split_output(variance: Variance, output: Example) -> tuple[Example, Example | None]:
    """Split the network's output into its parts for the mean and for the variance, if learned."""
    if not variance.is_learned:
        return output, None
    of_mean, of_variance = jnp.split(output, 2, axis=-1)
    return of_mean, of_variance


def decode_output(objective: Objective, row: Schedule, x_t: Example, output: Example) -> Prediction:
    """Convert the network's output into x_0, eps and log sigma^2 of p(x_{t-1} | x_t)."""
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

    w(t) |target - output|^2 / D; with w = 1 and the target eps it is L_simple (DDPM eq. 14). A
    learned variance adds vlb_scale L_vlb, through which the mean gets no gradient: L_hybrid (iDDPM
    eq. 16). With ``is_vlb`` the loss is L_vlb alone: T times the term of the bound, in bits.
    """
    prediction = decode_output(objective, row, noised.x_t, output)
    log_variance = prediction.log_variance
    assert log_variance is not None  # decode_output always sets it

    def vlb(predicted_x_0: Example) -> Float[Array, ""]:
        x_0, levels = noised.x_0, objective.levels
        term = likelihood.variational_term(row, x_0, predicted_x_0, log_variance, levels)
        return num_timesteps * likelihood.bits(jnp.mean(term))

    if objective.is_vlb:
        return vlb(prediction.x_0)
    gain = objective.parametrisation.gain(row)
    fixed = lax.stop_gradient(log_variance)  # the weight must not train the variance
    weight = objective.weighting(row, gain, fixed) / gain**2
    of_mean, _ = split_output(objective.variance, output)
    loss = jnp.mean(weight * jnp.square(noised.target - of_mean))
    if objective.variance.is_learned:
        loss += objective.vlb_scale * vlb(lax.stop_gradient(prediction.x_0))
    return loss


class BatchLosses(NamedTuple):
    """The losses of this device's examples, with their rows of the schedule and their weights."""

    losses: Float[Array, " batch"]
    rows: Int[Array, " batch"]
    weights: Float[Array, " batch"]


class LossInputs(NamedTuple):
    """The inputs of a step's losses other than the parameters."""

    schedule: Schedule
    timestep_state: Any
    key: Key[Array, ""]
    examples: Examples


Apply = Callable[..., Float[Array, "batch ..."]]  # Model.apply
# The objective as a training step calls it: the step minimises mean(weights * losses).
LossesOf = Callable[[PyTree, LossInputs], BatchLosses]


def drop_labels(
    objective: Objective, keys: Key[Array, " batch"], label: Int[Array, " batch"] | None
) -> Int[Array, " batch"] | None:
    """Replace each label by "no class" with probability label_dropout (Ho & Salimans 2022, alg. 1).

    The label num_classes means "no class". One network learns both p(x_0) and p(x_0 | label).
    """
    if objective.label_dropout == 0:
        return label
    assert label is not None
    assert objective.num_classes is not None  # labels are dropped only if there are classes
    dropped = jax.vmap(lambda key: jax.random.bernoulli(key, objective.label_dropout))(keys)
    return jnp.where(dropped, objective.num_classes, label)


def discrete_time(objective: Objective, apply: Apply) -> LossesOf:
    """The objective of DDPM and iDDPM: the loss at random timesteps of the schedule."""
    return functools.partial(_discrete_losses, objective, apply)


def _discrete_losses(
    objective: Objective, apply: Apply, params: PyTree, inputs: LossInputs
) -> BatchLosses:
    """Losses whose weighted mean estimates the mean loss over all timesteps.

    In a padded schedule only the rows up to T are drawn.
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
