"""Editing of images with a trained model: inpainting, SDEdit, interpolation, variations.

No further training is needed. The functions return samplers, and starting points x_T, for
``samplers.sample``.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from diffusion_jax.diffusion import process, samplers
from diffusion_jax.diffusion.process import Prediction
from diffusion_jax.diffusion.samplers.base import Batch, Keys, Number, Sampler, Step
from diffusion_jax.diffusion.schedules.schedule import Schedule
from diffusion_jax.diffusion.tracing import is_known
from diffusion_jax.errors import bounds, require

STRAIGHT_SINE = 1e-6  # slerp uses a straight line if the angle of two latents has a smaller sine


class Inpaint(Sampler):
    """See ``inpaint``."""

    sampler: Sampler
    x_0: Batch
    mask: Bool[Array, "batch ..."]
    num_resamples: int = dataclasses.field(metadata=samplers.STATIC)
    jump_length: int = dataclasses.field(metadata=samplers.STATIC)

    @property
    def needs_signal(self) -> bool:  # type: ignore[override]  # nobody assigns the flag
        """Whether the inner sampler needs alpha_bar > 0."""
        return self.sampler.needs_signal

    def step(self, now: Step) -> tuple[Batch, Any]:
        """Down: x_prev = mask (sampler's step) + (1 - mask) q_sample(x_0); up: q(x_t | x_{t-1}).

        In a step up, ``row_prev`` is the row with more noise, and the network is not called.
        """
        keys, x_t, row_prev = now.keys, now.x_t, now.row_prev

        def noise(number: int) -> Batch:
            return samplers.normal(samplers.fold(keys, number), x_t)

        def down() -> Batch:
            unknown, _ = self.sampler.step(now._replace(keys=samplers.fold(keys, 0)))
            # in the row t = 0, q_sample returns x_0 itself
            return jnp.where(self.mask, unknown, process.q_sample(row_prev, self.x_0, noise(1)))

        def up() -> Batch:
            return jnp.sqrt(row_prev.alpha) * x_t + jnp.sqrt(row_prev.beta) * noise(2)

        if self.num_resamples == 1:
            return down(), now.state
        return jax.lax.cond(row_prev.timestep > now.row.timestep, up, down), now.state

    def path(self, num_steps: int) -> Int[np.ndarray, " states"]:
        """The states of RePaint's chain, which goes down and, in jumps of j = jump_length, back up.

        The chain jumps num_resamples - 1 times from each of the states 1, 1 + j, 1 + 2 j, ... The
        steps above the topmost jump, and the step to x_0, are taken once. (The schedule published
        with Lugmayr et al. 2022 counts these states from 0.)

        Raises:
            ConfigError: the chain is too short for a jump.
        """
        fits = self.num_resamples == 1 or self.jump_length < num_steps
        allowed = f"below the {num_steps} steps of the chain (or num_resamples 1)"
        require(fits, "jump_length", self.jump_length, allowed)
        jumps = range(1, num_steps - self.jump_length + 1, self.jump_length)
        remaining = dict.fromkeys(jumps, self.num_resamples - 1)
        states = [num_steps]
        while states[-1] > 0:
            state = states[-1]
            if remaining.get(state, 0) > 0:
                remaining[state] -= 1
                states.extend(range(state + 1, state + self.jump_length + 1))
            else:
                states.append(state - 1)
        return np.array(states)

    def num_evaluations(self, num_steps: int) -> int:
        """The network evaluations of the inner sampler in the steps down; steps up have none."""
        return self.sampler.num_evaluations(int(np.sum(np.diff(self.path(num_steps)) < 0)))


def inpaint(
    sampler: Sampler,
    x_0: Batch,
    mask: Shaped[Array, "..."] | Shaped[np.ndarray, "..."],
    num_resamples: int,
    jump_length: int,
) -> Sampler:
    """RePaint: generate the pixels where ``mask`` is 1, and keep those of ``x_0`` where it is 0.

    At every step the known part is drawn from q(x_t | x_0), and the unknown part is a step of
    ``sampler`` (Lugmayr et al. 2022, arXiv 2201.09865, algorithm 1). The forward transition is
    x_t = sqrt(alpha_t) x_{t-1} + sqrt(beta_t) z; line 10 of the algorithm has the index t - 1
    instead. After every ``jump_length`` >= 1 states the chain goes back up by as many states. Each
    stretch is thus denoised ``num_resamples`` >= 1 times, which makes the two parts fit together.
    With num_resamples = 1 this is plain replacement, whose images are not samples of
    p(unknown | known). At the end the known part is exactly ``x_0``. A mask that is 1 around the
    image gives outpainting.

    ``mask`` is broadcast to the shape of ``x_0`` [batch, ...]. Another image or mask does not
    compile the chain again.

    Raises:
        ConfigError: a sampler with a state or its own path, a mask that does not fit x_0 or has
            values other than 0 and 1, or a number out of its range.
    """
    allowed = "one without memory, such as ancestral, ddim or heun"
    require(can_wrap(sampler), "sampler", type(sampler).__name__, allowed)
    check_jumps(num_resamples, jump_length)
    require(not is_known(mask) or np.isin(mask, (0, 1)).all(), "mask", mask, "of 0 and 1 only")
    try:
        mask = jnp.broadcast_to(mask, x_0.shape)
    except ValueError:
        require(False, "mask", mask, f"broadcastable to x_0's shape {x_0.shape}")
    # explicit dtypes: a weakly typed array would compile the chain again
    leaves = jnp.asarray(x_0, x_0.dtype), jnp.asarray(mask, bool)
    return Inpaint(sampler, *leaves, num_resamples, jump_length)


def can_wrap(sampler: Sampler) -> bool:
    """Whether ``inpaint`` can wrap a sampler, which must have neither a state nor its own path."""
    return type(sampler).init is Sampler.init and type(sampler).path is Sampler.path


def check_jumps(num_resamples: int, jump_length: int) -> None:
    """Check ``num_resamples`` and ``jump_length`` of ``inpaint``.

    Raises:
        ConfigError: one of them is below 1 (traced values are not checked).
    """
    require(
        not is_known(num_resamples) or num_resamples >= 1,
        "num_resamples",
        num_resamples,
        "at least 1",
    )
    require(not is_known(jump_length) or jump_length >= 1, "jump_length", jump_length, "at least 1")


def until(schedule: Schedule, timestep: int | float) -> Schedule:
    """The rows of a chain up to ``timestep``, the noise level at which SDEdit starts.

    ``schedule`` may be respaced. It must not be traced, because its rows are counted on the host.

    Raises:
        ConfigError: a timestep below that of the first row or above that of the last.
    """
    timesteps = np.asarray(schedule.timestep)
    allowed = f"in {bounds(timesteps[0], timesteps[-1])}, the timesteps of the chain"
    require(
        not is_known(timestep) or timesteps[0] <= timestep <= timesteps[-1],
        "timestep",
        timestep,
        allowed,
    )
    return schedule[: int(np.searchsorted(timesteps, timestep, side="right"))]


def diffuse(keys: Keys, row: Schedule, x_0: Batch) -> Batch:
    """Draw x_t ~ q(x_t | x_0) at ``row`` for each image, with its own key.

    SDEdit (Meng et al. 2022, arXiv 2108.01073) turns a drawing x_0 into the image
    ``sample(key, predict, rows, sampler, x_0.shape, x_T=diffuse(keys, rows[-1], x_0))`` with
    rows = until(schedule, timestep). With a higher timestep the image is closer to the data
    and less close to the drawing.
    """
    return process.q_sample(row, x_0, samplers.normal(keys, x_0))


def slerp(
    first: Batch, second: Batch, fractions: Float[Array, " fractions"]
) -> Float[Array, "fractions batch ..."]:
    """Spherical interpolation between the latents x_T in ``first`` and ``second``, pair by pair.

    sin((1 - f) theta) / sin(theta) x + sin(f theta) / sin(theta) y, where theta is the angle
    between x and y (Shoemake 1985; DDIM, appendix D.5) and f is one of the ``fractions`` in
    [0, 1]. f = 0 is exactly x and f = 1 exactly y. In between, the norm stays that of noise,
    unlike on a straight line. Latents that are parallel or opposite (where the arc is not unique)
    are interpolated on the straight line.

    DDIM with eta = 0 turns such latents into images; ``samplers.invert`` is its inverse.

    Raises:
        ConfigError: a fraction outside [0, 1] (traced ones are not checked).
    """

    def within(fractions: Any) -> bool:
        return bool(np.all((np.asarray(fractions) >= 0) & (np.asarray(fractions) <= 1)))

    require(not is_known(fractions) or within(fractions), "fractions", fractions, "in [0, 1]")

    def of_image(x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, "fractions ..."]:
        # Kahan's formula: it keeps all digits at small angles, where arccos loses half of them
        a, b = jnp.linalg.norm(y.ravel()) * x, jnp.linalg.norm(x.ravel()) * y
        theta = 2 * jnp.arctan2(jnp.linalg.norm((a - b).ravel()), jnp.linalg.norm((a + b).ravel()))
        straight = jnp.sin(theta) < STRAIGHT_SINE
        sine = jnp.where(straight, 1.0, jnp.sin(theta))

        def weight(fraction: Float[Array, ""]) -> Float[Array, ""]:
            end = (fraction == 0) | (fraction == 1)  # exactly x or y, without rounding by the sine
            return jnp.where(straight | end, fraction, jnp.sin(fraction * theta) / sine)

        return jax.vmap(lambda f: weight(1 - f) * x + weight(f) * y)(fractions)

    return jax.vmap(of_image, out_axes=1)(first, second)


def vary(keys: Keys, row: Schedule, x_t: Batch, prediction: Prediction, strength: Number) -> Batch:
    """Latents near ``x_t``, for variations of its image: rotate its noise towards new noise.

    x_t' = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) (cos(a) eps + sin(a) z), a = strength pi / 2,
    where x_0 and eps are those of ``prediction = predict(x_t, row)``. ``strength`` in [0, 1]: 0 is
    exactly x_t, 1 is ``diffuse(keys, row, prediction.x_0)``. Decode with DDIM, eta = 0.

    At alpha_bar = 0 this is the rotation cos(a) x_T + sin(a) z, which preserves N(0, I). At smaller
    timesteps that rotation would turn the image itself into noise. There this function takes a
    Langevin step, since eps = -sqrt(1 - alpha_bar) score: the step preserves the distribution of
    x_t to first order in 1 - cos(a). The second moment is too small by
    (1 - cos(a))^2 alpha_bar E[Var(x_0 | x_t)], which is almost 0 at both ends of the chain.

    Raises:
        ConfigError: strength outside [0, 1] (a traced one is not checked).
    """
    require(not is_known(strength) or 0 <= strength <= 1, "strength", strength, "in [0, 1]")
    angle = strength * math.pi / 2
    # cos(a) - 1 = -2 sin^2(a/2), so that x_t is exactly unchanged for a = 0
    change = jnp.sin(angle) * samplers.normal(keys, x_t)
    change -= 2 * jnp.square(jnp.sin(angle / 2)) * prediction.eps
    return x_t + jnp.sqrt(row.one_minus_alpha_bar) * change
