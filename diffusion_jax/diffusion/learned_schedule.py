"""The learned schedule of VDM: a monotone network for log SNR between learned end points.

It is trained together with the denoising network on the bound in continuous time u in [0, 1]
(Kingma et al. 2021, arXiv 2107.00630). ``discretise`` turns it into a ``Schedule``.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Key, PyTree

from diffusion_jax.diffusion import likelihood, losses, process, schedules, timesteps
from diffusion_jax.diffusion.examples import example_keys
from diffusion_jax.diffusion.losses import BatchLosses, LossesOf, LossInputs, Objective
from diffusion_jax.diffusion.network import Model
from diffusion_jax.diffusion.process import Example
from diffusion_jax.diffusion.schedules.schedule import Schedule
from diffusion_jax.diffusion.streams import seed_key

ENDS = ("start", "gap")  # the parameters of the end points; all others shape log SNR between them
HIDDEN = 1024  # units of the monotone network (VDM appendix H)


class LearnedSchedule(NamedTuple):
    """The number of timesteps, and log SNR at both ends before training."""

    num_timesteps: int
    log_snr_start: float
    log_snr_end: float


def init(recipe: LearnedSchedule, key: Key[Array, ""]) -> PyTree:
    """Initial parameters, with which log SNR falls almost linearly from its start to its end."""
    weight_key, bias_key = jax.random.split(key)
    return {
        "start": jnp.float32(recipe.log_snr_start),
        "gap": jnp.float32(_inverse_softplus(recipe.log_snr_start - recipe.log_snr_end)),
        "linear": jnp.float32(_inverse_softplus(1.0)),
        # the sigmoids have their midpoints all over [0, 1], and a total weight of only 0.1 at first
        "weight_in": _inverse_softplus(4.0) + jax.random.normal(weight_key, (HIDDEN,)),
        "bias": 4 * jax.random.uniform(bias_key, (HIDDEN,), minval=-1.0, maxval=0.0),
        "weight_out": jnp.full(HIDDEN, _inverse_softplus(0.1 / HIDDEN)),
    }


def joint(model: Model, recipe: LearnedSchedule) -> Model:
    """One model with the parameters of network and schedule, and the output of the network."""

    def init_both(key: Key[Array, ""]) -> PyTree:
        network_key, schedule_key = jax.random.split(key)
        return {"network": model.init(network_key), "schedule": init(recipe, schedule_key)}

    def apply(params: PyTree, *inputs: Any) -> Any:
        return model.apply(params["network"], *inputs)

    return Model(init_both, apply)


def _inverse_softplus(value: float) -> float:
    return math.log(math.expm1(value))


class Moment(NamedTuple):
    """The schedule at one continuous time u."""

    log_snr: Float[Array, "..."]
    rate: Float[Array, "..."]  # -d log SNR / du
    timestep: Float[Array, "..."]  # the network's input: 1 at u = 0 to T at u = 1


def moment_at(recipe: LearnedSchedule, params: PyTree, u: Float[Array, ""]) -> Moment:
    """The schedule at time u; log SNR decreases strictly, from its start at 0 to its end at 1.

    log SNR = start - gap r(u), r(u) = (m(u) - m(0)) / (m(1) - m(0)), where
    m(u) = a u + c . sigmoid(w u + b) increases, because a softplus makes a, c and w positive (VDM
    appendix H). The timestep is r(u) scaled to 1..T.
    """
    gap = jax.nn.softplus(params["gap"])
    first, last = (_monotone(params, jnp.float32(end)) for end in (0, 1))
    value, slope = jax.jvp(lambda u: _monotone(params, u), (u,), (jnp.ones_like(u),))
    rise = (value - first) / (last - first)
    timestep = 1 + (recipe.num_timesteps - 1) * rise
    return Moment(params["start"] - gap * rise, gap * slope / (last - first), timestep)


def _weights(params: PyTree) -> tuple[Array, Array, Array]:
    """The positive a, w and c of m(u)."""
    names = ("linear", "weight_in", "weight_out")
    linear, weight_in, weight_out = (jax.nn.softplus(params[name]) for name in names)
    return linear, weight_in, weight_out


def _monotone(params: PyTree, u: Float[Array, ""]) -> Float[Array, ""]:
    linear, weight_in, weight_out = _weights(params)
    return linear * u + _dot(weight_out, jax.nn.sigmoid(weight_in * u + params["bias"]))


def _dot(a: Float[Array, " hidden"], b: Float[Array, " hidden"]) -> Float[Array, ""]:
    """The dot product in full float32: the default of GPUs and TPUs keeps about three digits."""
    return jnp.dot(a, b, precision=lax.Precision.HIGHEST)


def _rise(params: PyTree, u: Float[Array, ""], step: float) -> Float[Array, ""]:
    """m(u + step) - m(u) in closed form: a float32 difference would keep three digits.

    sigmoid(x) - sigmoid(y) = sigmoid(x) sigmoid(-y) (1 - e^(y - x)).
    """
    linear, weight_in, weight_out = _weights(params)
    before, after = (weight_in * v + params["bias"] for v in (u, u + step))
    share = jax.nn.sigmoid(after) * jax.nn.sigmoid(-before) * -jnp.expm1(-weight_in * step)
    return linear * step + _dot(weight_out, share)


def discretise(recipe: LearnedSchedule, params: PyTree) -> Schedule:
    """The ``Schedule`` of T timesteps, at the times u = (t - 1) / (T - 1)."""
    params = jax.tree.map(jnp.asarray, params)
    u = jnp.linspace(0, 1, recipe.num_timesteps)
    moments = jax.vmap(lambda u: moment_at(recipe, params, u))(u)
    rises = jax.vmap(lambda u: _rise(params, u, 1 / (recipe.num_timesteps - 1)))(u[:-1])
    drops = jax.nn.softplus(params["gap"]) * rises / _rise(params, jnp.float32(0), 1.0)
    columns = moments.log_snr, moments.timestep, drops
    return schedules.from_log_snr(*(np.asarray(column, np.float64) for column in columns))


def initial(recipe: LearnedSchedule, seed: int) -> Schedule:
    """The ``Schedule`` before training."""
    return discretise(recipe, init(recipe, seed_key(seed)))


def row_at(moment: Moment) -> Schedule:
    """One time as the row of a ``Schedule``, differentiable in the schedule's parameters."""
    return schedules.from_log_snr(moment.log_snr[None], moment.timestep[None])[0]


def diffusion_term(rate: Float[Array, ""], eps: Example, predicted_eps: Example) -> Example:
    """The diffusion loss of VDM at one time, per dimension: rate (eps - predicted)^2 / 2 in nats.

    ``rate`` is -d log SNR / du. The mean over u in [0, 1] is the limit of L_1 + .. + L_{T-1} for
    T -> infinity.
    """
    return rate * jnp.square(eps - predicted_eps) / 2


def reconstruction_term(row: Schedule, x_0: Example, eps: Example, levels: int | None) -> Example:
    """L_0 = -log p(x_0|z_0) in nats, where p(x_0|z_0) is q(z_0|x_0) normalised over the levels.

    z_0 is x_0 with the noise of ``row``, which is the schedule at u = 0 (VDM). Continuous data
    (levels None) have the density N(x_0; z_0 / sqrt(alpha_bar), sigma^2).
    """
    if levels is None:
        return (jnp.square(eps) + math.log(2 * math.pi) - row.log_snr) / 2
    values = jnp.linspace(-1, 1, levels)
    distance = (x_0 + row.sigma * eps)[..., None] - values.reshape((1,) * x_0.ndim + (levels,))
    log_q = -jnp.square(distance) * row.snr / 2
    return jnp.square(eps) / 2 + jax.nn.logsumexp(log_q, axis=-1)


def continuous_time(
    objective: Objective,
    apply: Callable[..., Float[Array, "batch ..."]],
    recipe: LearnedSchedule,
) -> LossesOf:
    """The objective of VDM: the bound in continuous time, which also trains the schedule."""
    return functools.partial(_continuous_losses, objective, apply, recipe)


def _continuous_losses(
    objective: Objective,
    apply: Callable[..., Float[Array, "batch ..."]],
    recipe: LearnedSchedule,
    params: PyTree,
    inputs: LossInputs,
) -> BatchLosses:
    """The bound of this device's examples in continuous time, in bits per dimension.

    Times are spread evenly with a common offset. The schedule and the timestep state of ``inputs``
    belong to discrete time and have no effect. Each loss is reported at the discrete timestep
    that contains its u.

    The expected bound depends only on the ends of log SNR. The parameters between the ends change
    only the variance of its estimate, so they get the gradient of the squared loss, to minimise
    this variance (VDM appendix I.2).
    """
    examples = inputs.examples
    keys = example_keys(inputs.key, examples.indices)
    u = timesteps.spread(keys.common, examples.indices, examples.batch_size)
    label = losses.drop_labels(objective, keys.label, examples.label)
    of_schedule = params["schedule"]
    ends = {name: of_schedule[name] for name in ENDS}
    fixed_ends = {name: lax.stop_gradient(leaf) for name, leaf in ends.items()}
    moments = jax.vmap(functools.partial(moment_at, recipe), (None, 0))
    by_ends = moments(lax.stop_gradient(of_schedule) | ends, u)
    by_inner = moments(of_schedule | fixed_ends, u)

    def diffusion(params: PyTree, moments: Moment) -> Float[Array, " batch"]:
        rows = jax.vmap(row_at)(moments)
        eps = jax.vmap(lambda key, x_0: jax.random.normal(key, x_0.shape))(keys.first, examples.x_0)
        x_t = jax.vmap(process.q_sample)(rows, examples.x_0, eps)
        output = apply(params, x_t, rows.timestep, label, keys.dropout)

        def of_example(
            row: Schedule, rate: Array, eps: Example, x_t: Example, output: Example
        ) -> Float[Array, ""]:
            predicted = losses.decode_output(objective, row, x_t, output).eps
            return likelihood.bits(jnp.mean(diffusion_term(rate, eps, predicted)))

        return jax.vmap(of_example)(rows, moments.rate, eps, x_t, output)

    def of_ends(key: Key[Array, ""], x_0: Example) -> Float[Array, ""]:
        start, end = (row_at(moment_at(recipe, of_schedule, jnp.float32(u))) for u in (0, 1))
        eps = jax.random.normal(key, x_0.shape)
        first = reconstruction_term(start, x_0, eps, objective.levels)
        return likelihood.bits(jnp.mean(first + likelihood.prior_term(end, x_0)))

    total = jax.vmap(of_ends)(keys.second, examples.x_0)
    total += _with_gradient_of_square(diffusion)(params, by_ends, by_inner)
    position = jnp.minimum((u * recipe.num_timesteps).astype(jnp.int32), recipe.num_timesteps - 1)
    return BatchLosses(total, position, jnp.ones(len(total)))


def _with_gradient_of_square(
    losses_of: Callable[[PyTree, Moment], Float[Array, " batch"]],
) -> Callable[[PyTree, Moment, Moment], Float[Array, " batch"]]:
    """f(params, a, b) = losses_of(params, a), with the gradient of losses_of(params, b)^2 for b.

    ``a`` and ``b`` must have equal values, so that one backward pass gives both gradients.
    """

    @jax.custom_vjp
    def function(params: PyTree, a: Moment, b: Moment) -> Float[Array, " batch"]:
        return losses_of(params, a)

    def forward(params: PyTree, a: Moment, b: Moment) -> tuple[Array, tuple[Any, ...]]:
        values, pull_back = jax.vjp(losses_of, params, a)
        return values, (values, pull_back)

    def backward(
        residuals: tuple[Any, ...], cotangent: Float[Array, " batch"]
    ) -> tuple[PyTree, Moment, Moment]:
        values, pull_back = residuals
        of_params, of_a = pull_back(cotangent)
        return of_params, of_a, jax.tree.map(lambda g: 2 * values * g, of_a)

    function.defvjp(forward, backward)
    return function
