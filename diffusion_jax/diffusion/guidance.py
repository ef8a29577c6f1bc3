"""Guidance: functions that turn one ``predict`` into another, for any sampler.

The returned ``predict`` is a pytree whose numbers are leaves. A compiled function that takes it as
an argument is therefore not compiled again for another number. Its x_0 and eps always satisfy
x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps. The variance is left unchanged.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import Partial
from jaxtyping import Array, Float

from diffusion_jax.diffusion import process
from diffusion_jax.diffusion.parametrisations import PREDICTIONS
from diffusion_jax.diffusion.process import Example, Predict, Prediction
from diffusion_jax.diffusion.schedules.schedule import Scalar, Schedule
from diffusion_jax.diffusion.tracing import is_known
from diffusion_jax.errors import require

Batch = Float[Array, "batch ..."]
LogLikelihood = Callable[[Batch, Schedule], Float[Array, " batch"]]


def guide(
    predict: Predict,
    weak: Predict,
    weight: Scalar,
    interval: tuple[Scalar, Scalar] = (1, math.inf),
    rescale: Scalar = 0,
) -> Predict:
    """Classifier-free guidance and autoguidance: extrapolate from a weaker prediction.

    eps = eps_weak + weight (eps - eps_weak), and the same for x_0. This is the score of
    p_weak (p / p_weak)^weight. ``weak`` is the network without the label (Ho & Salimans 2022,
    eq. 6, whose w is weight - 1), or a smaller or less trained network (Karras et al. 2024,
    arXiv 2406.02507). ``weight`` is finite and >= 0; 1 is no guidance.

    Only timesteps in the closed interval [lo, hi] are guided; elsewhere ``weak`` is not evaluated
    (Kynkäänniemi et al. 2024, arXiv 2404.07724, who give the interval in sigma).

    ``rescale`` in [0, 1] is the phi of Lin et al. 2023 (arXiv 2305.08891, section 3.4): the guided
    v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0 of each example is multiplied by
    phi std(v of predict) / std(v) + 1 - phi. The networks of the paper predict v; here v is
    computed from x_0 and eps, so that the network may predict any quantity.

    Raises:
        ConfigError: a number out of its range (traced ones are not checked).
    """
    require(
        not is_known(weight) or 0 <= weight < math.inf, "weight", weight, "a finite number >= 0"
    )
    require(
        not is_known(interval) or interval[0] <= interval[1],
        "interval",
        interval,
        "(lo, hi) with lo <= hi",
    )
    require(not is_known(rescale) or 0 <= rescale <= 1, "rescale", rescale, "in [0, 1]")
    lo, hi = interval
    # all floats, so that 2 and 2.0 share a compiled function
    numbers = 1.0 * weight, 1.0 * lo, 1.0 * hi, 1.0 * rescale
    return Partial(_guided, _pytree(predict), _pytree(weak), *numbers)


def _guided(
    predict: Predict,
    weak: Predict,
    weight: Scalar,
    lo: Scalar,
    hi: Scalar,
    rescale: Scalar,
    x_t: Batch,
    row: Schedule,
) -> Prediction:
    prediction = predict(x_t, row)

    def apply() -> Prediction:
        other = weak(x_t, row)
        # prediction + (weight - 1) difference: with weight 1 no rounding changes the prediction
        guided = prediction._replace(
            x_0=prediction.x_0 + (weight - 1) * (prediction.x_0 - other.x_0),
            eps=prediction.eps + (weight - 1) * (prediction.eps - other.eps),
        )
        v, guided_v = (_velocity(row, either, x_t) for either in (prediction, guided))
        change = jax.vmap(_rescaling, (None, 0, 0))(rescale, v, guided_v)
        return guided._replace(
            x_0=guided.x_0 - jnp.sqrt(row.one_minus_alpha_bar) * change,
            eps=guided.eps + jnp.sqrt(row.alpha_bar) * change,
        )

    is_inside = (row.timestep >= lo) & (row.timestep <= hi)
    guided: Prediction = lax.cond(is_inside, apply, lambda: prediction)
    return guided


def _velocity(row: Schedule, prediction: Prediction, x_t: Batch) -> Batch:
    return PREDICTIONS["v"].encode(row, prediction, x_t)


def _rescaling(rescale: Scalar, v: Example, guided_v: Example) -> Example:
    """The change of one example's guided v: phi (std(v) / std(guided v) - 1) guided v."""
    variance, guided_variance = jnp.var(v), jnp.var(guided_v)
    varies = guided_variance > 0  # if not, no factor changes its std, and sqrt(0) has no gradient
    ratio = jnp.sqrt(jnp.where(varies, variance, 1) / jnp.where(varies, guided_variance, 1))
    return rescale * (ratio - 1) * guided_v


def static_threshold(predict: Predict) -> Predict:
    """Static thresholding: clip x_0 to [-1, 1], the range of images (Saharia et al. 2022)."""
    return Partial(_static_threshold, _pytree(predict))


def _static_threshold(predict: Predict, x_t: Batch, row: Schedule) -> Prediction:
    return process.clip_x_0(row, x_t, predict(x_t, row))


def dynamic_threshold(predict: Predict, percentile: Scalar) -> Predict:
    """Dynamic thresholding of Imagen: clip x_0 to [-s, s] and divide it by s (section 2.3).

    s = max(1, p), where p is the ``percentile`` in (0, 1] of |x_0| in each example. This
    brings a strongly guided x_0 back into [-1, 1] and keeps most pixels from saturating (Saharia
    et al. 2022, arXiv 2205.11487).

    Raises:
        ConfigError: a percentile outside (0, 1] (a traced one is not checked).
    """
    require(not is_known(percentile) or 0 < percentile <= 1, "percentile", percentile, "in (0, 1]")
    return Partial(_dynamic_threshold, _pytree(predict), 1.0 * percentile)


def _dynamic_threshold(
    predict: Predict, percentile: Scalar, x_t: Batch, row: Schedule
) -> Prediction:
    prediction = predict(x_t, row)

    def of_example(x_0: Example) -> Example:
        s = jnp.maximum(1, jnp.quantile(jnp.abs(x_0), percentile))
        return jnp.clip(x_0, -s, s) / s

    x_0 = jax.vmap(of_example)(prediction.x_0)
    return prediction._replace(x_0=x_0, eps=process.eps_of_x_0(row, x_t, x_0))


def gradient(predict: Predict, log_likelihood: LogLikelihood, scale: Scalar = 1) -> Predict:
    """Classifier guidance: the score of p(x_t) p(y | x_t)^scale (Dhariwal & Nichol 2021, alg. 2).

    eps' = eps - sqrt(1 - alpha_bar) scale grad log p(y | x_t), and hence
    x_0' = x_0 + (1 - alpha_bar) / sqrt(alpha_bar) scale grad log p(y | x_t), for alpha_bar > 0.

    ``log_likelihood(x_t, row)`` is log p(y | x_t) of each example, up to a constant, in nats. It
    may call ``predict`` to get x_0; the gradient then passes through the network (reconstruction
    guidance, Ho et al. 2022, arXiv 2204.03458). ``scale`` is finite and >= 0; 1 is Bayes' rule.

    Raises:
        ConfigError: a scale out of its range (a traced one is not checked). The returned function
            raises it when log_likelihood does not return one number per example.
    """
    require(not is_known(scale) or 0 <= scale < math.inf, "scale", scale, "a finite number >= 0")
    return Partial(_shifted, _pytree(predict), _pytree(log_likelihood), 1.0 * scale)


def _shifted(
    predict: Predict, log_likelihood: LogLikelihood, scale: Scalar, x_t: Batch, row: Schedule
) -> Prediction:
    def total(x_t: Batch) -> Float[Array, ""]:
        log_p = log_likelihood(x_t, row)
        shape, allowed = jnp.shape(log_p), x_t.shape[:1]
        # a mean over the batch would be accepted otherwise, and its gradient is too small
        require(shape == allowed, "shape of log_likelihood", shape, f"{allowed}")
        return jnp.sum(log_p)

    prediction = predict(x_t, row)
    shift = scale * jax.grad(total)(x_t)
    noise = row.one_minus_alpha_bar
    return prediction._replace(
        x_0=prediction.x_0 + noise / jnp.sqrt(row.alpha_bar) * shift,
        eps=prediction.eps - jnp.sqrt(noise) * shift,
    )


def _pytree(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function as a pytree, so that it can be an argument of a compiled function."""
    return Partial(function) if jax.tree_util.all_leaves([function]) else function
