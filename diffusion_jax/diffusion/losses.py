"""The training objective: a loss of one example at one timestep, vmapped over both.

The network runs on the whole batch between two vmapped functions: the noising before it and
the loss after it. Example i's noise, timestep and dropout depend on the step's key and on its
index in the *global* batch alone, never on how the batch is spread over devices.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, no_type_check

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key, PyTree

from diffusion_jax.diffusion import likelihood, process, schedules
from diffusion_jax.diffusion.parametrisations import Parametrisation
from diffusion_jax.diffusion.process import Example, Prediction
from diffusion_jax.diffusion.schedules.schedule import Schedule
from diffusion_jax.diffusion.timesteps import TimestepDraw, TimestepSampler
from diffusion_jax.diffusion.variances import Variance
from diffusion_jax.diffusion.weightings import Weighting


class Objective(NamedTuple):
    """The static choices of a training objective: what is predicted, weighted and drawn."""

    parametrisation: Parametrisation
    weighting: Weighting
    is_vlb: bool  # the whole of L_vlb, with L_0 and the variance's part, not its weight alone
    variance: Variance
    vlb_scale: float  # of L_vlb beside the weighted error, which trains a learned variance
    timesteps: TimestepSampler
    levels: int | None  # of the data; None: continuous
    num_classes: int | None  # of the data; None: without labels
    label_dropout: float  # the share of labels that the network is not told


class NoisedExample(NamedTuple):
    """An example at its timestep: what the network sees and what it should say."""

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
    """What a network says of the mean and, if it learns that, of the variance."""
    if not variance.is_learned:
        return output, None
    of_mean, of_variance = jnp.split(output, 2, axis=-1)
    return of_mean, of_variance


def decode_output(objective: Objective, row: Schedule, x_t: Example, output: Example) -> Prediction:
    """What a network's output says about x_t, with the log variance of p(x_{t-1} | x_t)."""
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

    def vlb(predicted_x_0: Example) -> Float[Array, ""]:
        term = likelihood.variational_term(
            row, noised.x_0, predicted_x_0, prediction.log_variance, objective.levels
        )
        return num_timesteps * likelihood.bits(jnp.mean(term))

    if objective.is_vlb:
        return vlb(prediction.x_0)
    gain = objective.parametrisation.gain(row)
    fixed = lax.stop_gradient(prediction.log_variance)  # a weight is nothing to be learned
    weight = objective.weighting(row, gain, fixed) / gain**2
    of_mean, _ = split_output(objective.variance, output)
    loss = jnp.mean(weight * jnp.square(noised.target - of_mean))
    if objective.variance.is_learned:
        loss += objective.vlb_scale * vlb(lax.stop_gradient(prediction.x_0))
    return loss


class BatchLosses(NamedTuple):
    """The losses of this device's examples, and the rows and weights they were taken at."""

    losses: Float[Array, " batch"]
    rows: Int[Array, " batch"]
    weights: Float[Array, " batch"]


@no_type_check  # jax also builds it with shapes and placeholders as leaves
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Examples:
    """Examples of one device. ``indices`` are their places in the global batch of batch_size."""

    x_0: Float[Array, "batch ..."]
    label: Int[Array, " batch"] | None
    indices: Int[Array, " batch"]
    batch_size: int = dataclasses.field(metadata={"static": True})


class LossInputs(NamedTuple):
    """What the losses of a step depend on beside the parameters."""

    schedule: Schedule
    timestep_state: Any
    key: Key[Array, ""]
    examples: Examples


# An objective as a training step calls it: mean(weights losses) is what the step minimises.
LossesOf = Callable[[PyTree, LossInputs], BatchLosses]


class ExampleKeys(NamedTuple):
    """The keys of a step: one ``common`` to the batch, the others one for each example."""

    common: Key[Array, ""]
    first: Key[Array, " batch"]  # of what the objective draws
    second: Key[Array, " batch"]
    dropout: Key[Array, " batch"]
    label: Key[Array, " batch"]


def example_keys(key: Key[Array, ""], indices: Int[Array, " batch"]) -> ExampleKeys:
    """The keys of a step, which depend on its key and on the indices alone."""
    common, of_examples = jax.random.split(key)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(of_examples, indices)
    first, second, dropout = jax.vmap(lambda k: jax.random.split(k, 3))(keys).T
    # a fourth child: the others are those of a run that keeps its labels
    label = jax.vmap(jax.random.fold_in, (0, None))(keys, 3)
    return ExampleKeys(common, first, second, dropout, label)


def drop_labels(
    objective: Objective, keys: Key[Array, " batch"], label: Int[Array, " batch"] | None
) -> Int[Array, " batch"] | None:
    """Discard each label with probability ``label_dropout`` (Ho & Salimans 2022, algorithm 1).

    One network so learns p(x_0) beside p(x_0 | label): number num_classes stands for no class.
    """
    if objective.label_dropout == 0:
        return label
    dropped = jax.vmap(lambda key: jax.random.bernoulli(key, objective.label_dropout))(keys)
    return jnp.where(dropped, objective.num_classes, label)


def discrete_time(
    objective: Objective, apply: Callable[..., Float[Array, "batch ..."]]
) -> LossesOf:
    """The objective of DDPM and iDDPM: losses at random timesteps of the schedule."""
    return functools.partial(_discrete_losses, objective, apply)


def _discrete_losses(
    objective: Objective,
    apply: Callable[..., Float[Array, "batch ..."]],
    params: PyTree,
    inputs: LossInputs,
) -> BatchLosses:
    """Losses whose weighted mean estimates the mean loss over all timesteps.

    Of a padded schedule only the rows up to its T are drawn.
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
