"""The reverse chain: one ``jax.lax.scan`` over the reversed rows of a schedule, any sampler.

A sampler sees per-image keys, ``predict`` and the two rows of its interval, nothing else. It is
a pytree whose numbers (eta) are leaves, so that changing them compiles nothing anew.

Solvers of the probability flow are written as what they add to a DDIM step, which is the flow's
exact solution where x_0 and eps stand still: then no nearly equal numbers are subtracted. Theirs
are the coordinates y = x_t / sqrt(alpha_bar), in which dy = eps d sigma.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from diffusion_jax import process, schedules
from diffusion_jax.checks import require
from diffusion_jax.process import Predict, Prediction
from diffusion_jax.schedules import Schedule
from diffusion_jax.variances import VARIANCES

Batch = Float[Array, "batch ..."]
Keys = Key[Array, " batch"]
Number = float | Float[Array, ""]
Scalar = Float[Array, ""]


def _kind(name: str) -> Any:
    """A static field that tells samplers apart.

    jax takes the structures of two registered dataclasses for equal if their static fields are,
    whatever the classes: a compiled function would now and then run one sampler for another.
    """
    return dataclasses.field(default=name, metadata={"static": True})


class Sampler:
    """An init/step pair; ``state`` is what a multistep method remembers.

    ``needs_signal``: it works in units of sigma, which is infinite where alpha_bar = 0.
    ``goes_off_grid``: it asks the network between the rows of the chain too.
    """

    needs_signal: ClassVar[bool] = False
    goes_off_grid: ClassVar[bool] = False

    def init(self, x_T: Batch, rows: Schedule, schedule: Schedule) -> Any:
        """State before the first step of a chain over ``rows``.

        Rows between those are found in ``schedule``, of which they may be few.
        """
        return ()

    def step(
        self,
        keys: Keys,
        predict: Predict,
        state: Any,
        x_t: Batch,
        row: Schedule,
        row_prev: Schedule,
    ) -> tuple[Batch, Any]:
        """One step from the timestep of ``row`` down to that of ``row_prev``."""
        raise NotImplementedError

    def path(self, num_steps: int) -> Int[np.ndarray, " states"]:
        """The states that the chain visits: num_steps is x_T, 0 is x_0."""
        return np.arange(num_steps, -1, -1)

    def num_evaluations(self, num_steps: int) -> int:
        """How often a chain of ``num_steps`` calls ``predict`` for each image."""
        return num_steps


def normal(keys: Keys, like: Batch) -> Batch:
    """Standard normal noise in the shape of ``like``, each image from a key of its own."""
    return jax.vmap(lambda key: jax.random.normal(key, like.shape[1:], like.dtype))(keys)


def fold(keys: Keys, number: int | Int[Array, ""]) -> Keys:
    """The keys of one of several draws for each image."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, number)


def _ddim(prediction: Prediction, row_prev: Schedule) -> Batch:
    """The DDIM step without noise: x_0 and eps, put together at the next noise level."""
    return process.q_sample(row_prev, prediction.x_0, prediction.eps)


def _is_last(row_prev: Schedule) -> Bool[Array, ""]:
    return row_prev.one_minus_alpha_bar == 0


def _is_first(row: Schedule) -> Bool[Array, ""]:
    return row.one_minus_alpha_bar_prev == 0


def _drop_of_sigma(row: Schedule, row_prev: Schedule) -> Scalar:
    """sqrt(alpha_bar_prev) (sigma_prev - sigma), what an added eps is multiplied by."""
    return jnp.sqrt(row_prev.alpha_bar) * (row_prev.sigma - row.sigma)


def _width(row: Schedule) -> Scalar:
    """The width h > 0 of a step in lambda = log(alpha / sigma) = (log SNR) / 2.

    exp(-2 h) = 1 - beta / (1 - alpha_bar), so that no two log SNRs are subtracted. Infinite in the
    step to x_0, and from zero SNR.
    """
    lost = jnp.where(_is_first(row), 1.0, row.beta / row.one_minus_alpha_bar)
    return -jnp.log1p(-lost) / 2


def _ratio(a: Scalar, b: Scalar) -> Scalar:
    """Of two widths, a / b; 0 where either is infinite: what lies beyond has no weight."""
    return jnp.where(jnp.isfinite(a) & jnp.isfinite(b), a / b, 0)


PHI_TERMS = 14  # of the series below: exact to float64 for h < 1


def _phi(h: Scalar) -> tuple[Scalar, Scalar]:
    """phi_2 = (e^-h - 1) / h + 1 and phi_3 = phi_2 / h - 1/2 (DPM-Solver++, appendix A).

    By their series for small h, where the closed forms subtract nearly equal numbers.
    """
    two, three = jnp.zeros_like(h), jnp.zeros_like(h)
    near = jnp.minimum(h, 1)
    # sum over k >= 1 of (-1)^(k+1) h^k / (k+1)! and of (-1)^k h^k / (k+2)!, inside out
    for k in range(PHI_TERMS, 0, -1):
        two = near / (k + 1) * (1 - two)
        three = near / (k + 2) * (1 - three)
    three = -three / 2
    far = jnp.maximum(h, 1)
    two_far = jnp.expm1(-far) / far + 1
    return jnp.where(h < 1, two, two_far), jnp.where(h < 1, three, two_far / far - 0.5)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ancestral(Sampler):
    """See ``ancestral``."""

    variance: str = dataclasses.field(metadata={"static": True})
    kind: str = _kind("ancestral")

    def step(
        self,
        keys: Keys,
        predict: Predict,
        state: tuple,
        x_t: Batch,
        row: Schedule,
        row_prev: Schedule,
    ) -> tuple[Batch, tuple]:
        """x_{t-1} = mu(x_t, x_0) + sigma_t z, z = 0 in the last step (DDPM algorithm 2)."""
        prediction = predict(x_t, row)
        mean = process.posterior_mean(row, prediction.x_0, x_t)
        variance = VARIANCES[self.variance]
        if not variance.is_learned:
            log_variance = variance.log_variance(row, None)
        elif prediction.log_variance is None:
            raise ValueError(f"variance = {self.variance!r}: the network predicts no variance")
        else:
            log_variance = prediction.log_variance
        deviation = jnp.where(_is_last(row_prev), 0.0, jnp.exp(log_variance / 2))
        return mean + deviation * normal(keys, x_t), state


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PredictorCorrector(Sampler):
    """See ``predictor_corrector``."""

    snr: Number
    num_corrections: int = dataclasses.field(metadata={"static": True})
    predictor: Ancestral
    kind: str = _kind("predictor_corrector")

    def step(
        self,
        keys: Keys,
        predict: Predict,
        state: tuple,
        x_t: Batch,
        row: Schedule,
        row_prev: Schedule,
    ) -> tuple[Batch, tuple]:
        """x_t += e score + sqrt(2 e) z, e = 2 alpha (snr sqrt(1 - ab))^2, then the predictor."""
        size = 2 * row.alpha * jnp.square(self.snr) * row.one_minus_alpha_bar
        for number in range(self.num_corrections):
            score = -predict(x_t, row).eps / jnp.sqrt(row.one_minus_alpha_bar)
            z = normal(fold(keys, number + 1), x_t)
            x_t = x_t + size * score + jnp.sqrt(2 * size) * z
        return self.predictor.step(fold(keys, 0), predict, state, x_t, row, row_prev)

    def num_evaluations(self, num_steps: int) -> int:
        """One for the predictor and one for each correction."""
        return num_steps * (1 + self.num_corrections)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ddim(Sampler):
    """See ``ddim``."""

    eta: Number
    kind: str = _kind("ddim")

    def step(
        self,
        keys: Keys,
        predict: Predict,
        state: tuple,
        x_t: Batch,
        row: Schedule,
        row_prev: Schedule,
    ) -> tuple[Batch, tuple]:
        """x_{t-1} = sqrt(ab_prev) x_0 + sqrt(1 - ab_prev - sigma^2) eps + sigma z (DDIM eq. 12).

        sigma^2 = eta^2 beta~, and 1 - ab_prev - eta^2 beta~ =
        (1 - ab_prev) (1 - eta^2 + eta^2 alpha (1 - ab_prev) / (1 - ab)), which subtracts nothing
        that is nearly equal.
        """
        prediction = predict(x_t, row)
        eta2 = self.eta**2
        kept = 1 - eta2 + eta2 * row.alpha * row.one_minus_alpha_bar_prev / row.one_minus_alpha_bar
        direction = jnp.sqrt(row.one_minus_alpha_bar_prev * kept)
        x_prev = jnp.sqrt(row.alpha_bar_prev) * prediction.x_0 + direction * prediction.eps
        return x_prev + self.eta * jnp.sqrt(row.posterior_variance) * normal(keys, x_t), state


def _heun(predict: Predict, x_t: Batch, row: Schedule, row_prev: Schedule) -> Batch:
    """y_prev = y + (sigma_prev - sigma) (eps + eps') / 2, eps' at the end of an Euler step.

    The last step is Euler's: at sigma = 0 there is no eps.
    """
    prediction = predict(x_t, row)
    euler = _ddim(prediction, row_prev)

    def correct() -> Batch:
        slope = predict(euler, row_prev).eps - prediction.eps
        return euler + _drop_of_sigma(row, row_prev) * slope / 2

    return jax.lax.cond(_is_last(row_prev), lambda: euler, correct)


class TwoStage(Sampler):
    """A solver that evaluates twice a step, and once in the last, which is Euler's."""

    needs_signal: ClassVar[bool] = True

    def num_evaluations(self, num_steps: int) -> int:
        """Two a step, one in the last."""
        return 2 * num_steps - 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Heun(TwoStage):
    """See ``heun``."""

    kind: str = _kind("heun")

    def step(
        self,
        keys: Keys,
        predict: Predict,
        state: tuple,
        x_t: Batch,
        row: Schedule,
        row_prev: Schedule,
    ) -> tuple[Batch, tuple]:
        """Karras et al. 2022 (EDM), algorithm 1."""
        return _heun(predict, x_t, row, row_prev), state


class EdmState(NamedTuple):
    """The schedule, for the rows of the raised noise levels, and the steps of the chain."""

    schedule: Schedule
    num_steps: Int[Array, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Edm(TwoStage):
    """See ``edm``."""

    goes_off_grid: ClassVar[bool] = True

    churn: Number
    churn_min: Number
    churn_max: Number
    noise: Number
    kind: str = _kind("edm")

    def init(self, x_T: Batch, rows: Schedule, schedule: Schedule) -> EdmState:
        """The rows between which those of raised noise are found."""
        return EdmState(schedule, jnp.asarray(len(rows)))

    def step(
        self,
        keys: Keys,
        predict: Predict,
        state: EdmState,
        x_t: Batch,
        row: Schedule,
        row_prev: Schedule,
    ) -> tuple[Batch, EdmState]:
        """Raise sigma by the factor 1 + gamma with fresh noise, then a step of Heun's from there.

        gamma = min(churn / num_steps, sqrt(2) - 1) for sigma in [churn_min, churn_max], else 0
        (EDM algorithm 2); never beyond the schedule's own largest sigma.
        """
        inside = (row.sigma >= self.churn_min) & (row.sigma <= self.churn_max)
        gamma = jnp.where(inside, jnp.minimum(self.churn / state.num_steps, np.sqrt(2) - 1), 0)
        rise = jnp.minimum(
            2 * jnp.log1p(gamma), row.log_snr - state.schedule.log_snr[-1]
        )  # of -log SNR
        raised = schedules.at_log_snr(state.schedule, (row.log_snr - rise)[None])[0]
        # y + sqrt(sigma_hat^2 - sigma^2) z, times sqrt(alpha_bar) at the raised level
        shrunk = jnp.sqrt(raised.alpha_bar / row.alpha_bar) * x_t
        added = jnp.sqrt(raised.one_minus_alpha_bar * -jnp.expm1(-rise))
        x_hat = shrunk + self.noise * added * normal(keys, x_t)
        return _heun(predict, x_hat, raised, row_prev), state


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dpmpp2S(TwoStage):
    """See ``dpmpp_2s``; its state is the schedule, for the rows half-way."""

    goes_off_grid: ClassVar[bool] = True
    kind: str = _kind("dpmpp_2s")

    def init(self, x_T: Batch, rows: Schedule, schedule: Schedule) -> Schedule:
        """The rows between which those half-way are found."""
        return schedule

    def step(
        self,
        keys: Keys,
        predict: Predict,
        state: Schedule,
        x_t: Batch,
        row: Schedule,
        row_prev: Schedule,
    ) -> tuple[Batch, Schedule]:
        """Lu et al. 2022 (DPM-Solver++), algorithm 1 with r_1 = 1/2: x_0 taken at the middle."""
        prediction = predict(x_t, row)
        euler = _ddim(prediction, row_prev)

        def correct() -> Batch:
            middle = _middle(state, row, row_prev)
            x_0 = predict(_ddim(prediction, middle), middle).x_0
            share = -jnp.expm1(-_width(row)) * jnp.sqrt(row_prev.alpha_bar)
            return euler + share * (x_0 - prediction.x_0)

        return jax.lax.cond(_is_last(row_prev), lambda: euler, correct), state


def _middle(schedule: Schedule, row: Schedule, row_prev: Schedule) -> Schedule:
    """The row half-way in log SNR."""
    return schedules.at_log_snr(schedule, (row.log_snr + row_prev.log_snr)[None] / 2)[0]


class Memory(NamedTuple):
    """The x_0 of the last two evaluations, and the widths of the steps that they were made in.

    An infinite width: there was none yet.
    """

    x_0: Batch
    x_0_before: Batch
    width: Scalar
    width_before: Scalar

    def with_new(self, x_0: Batch, width: Scalar) -> "Memory":
        """The newest in front, the oldest forgotten."""
        return Memory(x_0, self.x_0, width, self.width)


def _no_memory(x_T: Batch) -> Memory:
    infinite = jnp.full((), jnp.inf, x_T.dtype)
    return Memory(jnp.zeros_like(x_T), jnp.zeros_like(x_T), infinite, infinite)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dpmpp2M(Sampler):
    """See ``dpmpp_2m`` and ``dpmpp_2m_sde``."""

    eta: Number
    kind: str = _kind("dpmpp_2m")

    def init(self, x_T: Batch, rows: Schedule, schedule: Schedule) -> Memory:
        """No step yet."""
        return _no_memory(x_T)

    def step(
        self,
        keys: Keys,
        predict: Predict,
        state: Memory,
        x_t: Batch,
        row: Schedule,
        row_prev: Schedule,
    ) -> tuple[Batch, Memory]:
        """x_0 extrapolated to the middle of the step by the one before it, r = h_before / h.

        x_prev = sigma_prev / sigma e^(-eta h) x_t + sqrt(ab_prev) (1 - e^(-(1 + eta) h)) D
        + sigma_prev sqrt(1 - e^(-2 eta h)) z, D = x_0 + (x_0 - x_0_before) / (2 r)
        (DPM-Solver++, algorithm 2 and its SDE form; sigma here is sqrt(1 - ab)).
        """
        prediction = predict(x_t, row)
        h = _width(row)
        noisy = jnp.where(self.eta > 0, self.eta * h, 0)  # 0 times an infinite h
        deviation = jnp.sqrt(row_prev.one_minus_alpha_bar)
        x_prev = jnp.sqrt(row_prev.alpha_bar) * prediction.x_0
        x_prev += deviation * jnp.exp(-noisy) * prediction.eps
        x_prev += deviation * jnp.sqrt(-jnp.expm1(-2 * noisy)) * normal(keys, x_t)
        share = jnp.sqrt(row_prev.alpha_bar) * -jnp.expm1(-h - noisy)
        slope = _ratio(h, state.width) * (prediction.x_0 - state.x_0)
        return x_prev + share * slope / 2, state.with_new(prediction.x_0, h)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dpmpp3M(Sampler):
    """See ``dpmpp_3m``."""

    kind: str = _kind("dpmpp_3m")

    def init(self, x_T: Batch, rows: Schedule, schedule: Schedule) -> Memory:
        """No step yet."""
        return _no_memory(x_T)

    def step(
        self,
        keys: Keys,
        predict: Predict,
        state: Memory,
        x_t: Batch,
        row: Schedule,
        row_prev: Schedule,
    ) -> tuple[Batch, Memory]:
        """DDIM + sqrt(ab_prev) (phi_2 h x_0' - phi_3 h^2 x_0''), the derivatives of x_0 in lambda.

        They are those of the parabola through the last three x_0; the first step of a chain knows
        x_0 alone, the second its slope. The second derivative is twice the second divided
        difference: published code leaves out the 2 and is of second order.
        """
        prediction = predict(x_t, row)
        h, h_1, h_2 = _width(row), state.width, state.width_before
        newer = _ratio(h, h_1) * (prediction.x_0 - state.x_0)
        older = _ratio(h, h_2) * (state.x_0 - state.x_0_before)
        first = newer + _ratio(h_1, h_1 + h_2) * (newer - older)
        second = 2 * _ratio(h, h_1 + h_2) * (newer - older)
        phi_2, phi_3 = _phi(h)
        x_prev = _ddim(prediction, row_prev)
        x_prev += jnp.sqrt(row_prev.alpha_bar) * (phi_2 * first - phi_3 * second)
        return x_prev, state.with_new(prediction.x_0, h)


class UniPCState(NamedTuple):
    """What a corrector needs of the step before it."""

    euler: Batch  # the DDIM step that led to where the chain stands
    memory: Memory


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class UniPC(Sampler):
    """See ``unipc``."""

    kind: str = _kind("unipc")

    def init(self, x_T: Batch, rows: Schedule, schedule: Schedule) -> UniPCState:
        """No step yet."""
        return UniPCState(x_T, _no_memory(x_T))

    def step(
        self,
        keys: Keys,
        predict: Predict,
        state: UniPCState,
        x_t: Batch,
        row: Schedule,
        row_prev: Schedule,
    ) -> tuple[Batch, UniPCState]:
        """Correct the last step by what it led to, then predict; one evaluation serves both.

        UniPC-2 (Zhao et al. 2023, algorithms 5 and 6) with its linear system solved exactly, in
        which B(h) cancels: both fit x_0 by a parabola or a line in lambda.
        """
        prediction = predict(x_t, row)
        memory = state.memory
        h, h_before = memory.width, memory.width_before  # of the step that led here, and before
        phi_2, phi_3 = _phi(h)
        bent = (phi_2 + 2 * phi_3) * _ratio(h, h + h_before)
        corrected = state.euler + jnp.sqrt(row.alpha_bar) * (
            bent * _ratio(h, h_before) * (memory.x_0 - memory.x_0_before)
            + (phi_2 - bent) * (prediction.x_0 - memory.x_0)
        )
        is_first = ~jnp.isfinite(h)
        x_t = jnp.where(is_first, x_t, corrected)
        prediction = prediction._replace(eps=process.eps_of_x_0(row, x_t, prediction.x_0))

        euler = _ddim(prediction, row_prev)
        h_next = _width(row)
        phi_2, _ = _phi(h_next)
        slope = _ratio(h_next, h) * (prediction.x_0 - memory.x_0)
        x_prev = euler + jnp.sqrt(row_prev.alpha_bar) * phi_2 * slope
        return x_prev, UniPCState(euler, memory.with_new(prediction.x_0, h_next))


# Adams and Bashforth's weights of the newest eps, the one before it, and so on, by order.
ADAMS_BASHFORTH = (
    np.array([[24, 0, 0, 0], [36, -12, 0, 0], [46, -32, 10, 0], [55, -59, 37, -9]]) / 24
)


class PndmState(NamedTuple):
    """The eps of the last evaluations, newest first, how many steps there were, and the rows."""

    eps: Float[Array, "3 batch ..."]
    num_steps: Int[Array, ""]
    schedule: Schedule


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plms(Sampler):
    """See ``plms``."""

    needs_signal: ClassVar[bool] = True
    num_starting: ClassVar[int] = 1  # steps before the multistep method
    kind: str = _kind("plms")

    def init(self, x_T: Batch, rows: Schedule, schedule: Schedule) -> PndmState:
        """No step yet."""
        eps = jnp.zeros((len(ADAMS_BASHFORTH) - 1, *x_T.shape), x_T.dtype)
        return PndmState(eps, jnp.zeros((), jnp.int32), schedule)

    def step(
        self,
        keys: Keys,
        predict: Predict,
        state: PndmState,
        x_t: Batch,
        row: Schedule,
        row_prev: Schedule,
    ) -> tuple[Batch, PndmState]:
        """A DDIM step along a combination of this eps and those before it (PNDM eqs. 9 to 12)."""
        prediction = predict(x_t, row)
        history = jnp.concatenate([prediction.eps[None], state.eps])
        order = jnp.minimum(state.num_steps, len(ADAMS_BASHFORTH) - 1)
        weights = jnp.asarray(ADAMS_BASHFORTH, x_t.dtype)[order]
        eps = jax.lax.cond(
            (state.num_steps < self.num_starting) & ~_is_last(row_prev),
            lambda: self._start(predict, state.schedule, x_t, prediction, row, row_prev),
            lambda: jnp.tensordot(weights, history, 1),
        )
        x_prev = _along(prediction, eps, row, row_prev)
        return x_prev, PndmState(history[:-1], state.num_steps + 1, state.schedule)

    def _start(
        self,
        predict: Predict,
        schedule: Schedule,
        x_t: Batch,
        prediction: Prediction,
        row: Schedule,
        row_prev: Schedule,
    ) -> Batch:
        """The mean eps of the step's two ends: the improved Euler method."""
        return (prediction.eps + predict(_ddim(prediction, row_prev), row_prev).eps) / 2

    def num_evaluations(self, num_steps: int) -> int:
        """One a step, and one more in the first unless it is the last."""
        return num_steps + min(self.num_starting, num_steps - 1)


def _along(prediction: Prediction, eps: Batch, row: Schedule, row_prev: Schedule) -> Batch:
    """A DDIM step that goes along another eps."""
    return _ddim(prediction, row_prev) + _drop_of_sigma(row, row_prev) * (eps - prediction.eps)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pndm(Plms):
    """See ``pndm``."""

    goes_off_grid: ClassVar[bool] = True

    num_starting: ClassVar[int] = 3
    kind: str = _kind("pndm")

    def _start(
        self,
        predict: Predict,
        schedule: Schedule,
        x_t: Batch,
        prediction: Prediction,
        row: Schedule,
        row_prev: Schedule,
    ) -> Batch:
        """(e_1 + 2 e_2 + 2 e_3 + e_4) / 6, pseudo Runge-Kutta (PNDM eq. 13)."""
        middle = _middle(schedule, row, row_prev)
        second = predict(_ddim(prediction, middle), middle).eps
        third = predict(_along(prediction, second, row, middle), middle).eps
        fourth = predict(_along(prediction, third, row, row_prev), row_prev).eps
        return (prediction.eps + 2 * second + 2 * third + fourth) / 6

    def num_evaluations(self, num_steps: int) -> int:
        """One a step, and three more in each of the first three that is not the last."""
        return num_steps + 3 * min(self.num_starting, num_steps - 1)


def ancestral(variance: str = "posterior") -> Sampler:
    """Ancestral sampling from p(x_{t-1} | x_t), a Gaussian around the posterior mean (DDPM).

    ``variance`` is "beta" or "posterior" (beta~), the two fixed choices of DDPM section 3.2, or
    one that the network has learned (then both names mean what it predicts).

    Raises:
        ValueError: an unknown variance.
    """
    if variance not in VARIANCES:
        raise ValueError(f"variance = {variance!r}: must be one of {', '.join(VARIANCES)}")
    return Ancestral(variance)


def predictor_corrector(
    variance: str = "posterior", snr: Number = 0.16, num_corrections: int = 1
) -> Sampler:
    """Langevin steps at each noise level before the ancestral one (Song et al. 2021, algorithm 5).

    ``snr`` > 0 scales the step of their annealed Langevin dynamics, whose size is fixed by the
    noise level; ``num_corrections`` >= 1 is the number of steps.

    Raises:
        ValueError: an unknown variance, or a number out of its range.
    """
    require("snr", snr, lambda value: 0 < value < np.inf, "a finite number > 0")
    require("num_corrections", num_corrections, lambda value: value >= 1, "at least 1")
    return PredictorCorrector(snr, num_corrections, ancestral(variance))


def ddim(eta: Number = 0.0) -> Sampler:
    """Denoising diffusion implicit models (Song et al. 2021).

    ``eta`` in [0, 1]: 0 is deterministic, 1 has the ancestral mean and variance.

    Raises:
        ValueError: eta outside [0, 1] (a traced eta is not checked).
    """
    require("eta", eta, lambda value: 0 <= value <= 1, "in [0, 1]")
    return Ddim(eta)


def euler() -> Sampler:
    """Euler's method for dy = eps d sigma, k-diffusion's "euler": the same map as DDIM's, eta 0."""
    return ddim(0.0)


def euler_ancestral(eta: Number = 1.0) -> Sampler:
    """Euler down to sigma_down, then noise up to sigma: k-diffusion's "euler_ancestral".

    sigma_up^2 = eta^2 sigma_prev^2 (sigma^2 - sigma_prev^2) / sigma^2 is eta^2 beta~ in these
    units: the same map as DDIM's with this eta in [0, 1].

    Raises:
        ValueError: eta outside [0, 1] (a traced eta is not checked).
    """
    return ddim(eta)


def heun() -> Sampler:
    """Heun's second-order method on the sigmas of the chain (Karras et al. 2022, algorithm 1)."""
    return Heun()


def edm(
    churn: Number = 40.0, churn_min: Number = 0.05, churn_max: Number = 50.0, noise: Number = 1.003
) -> Sampler:
    """EDM's stochastic sampler: fresh noise before each step of Heun's (algorithm 2).

    ``churn`` >= 0 is S_churn, ``churn_min`` and ``churn_max`` are S_tmin and S_tmax in units of
    sigma, ``noise`` > 0 is S_noise; the defaults are EDM's for ImageNet-64 (table 5).

    Raises:
        ValueError: a number out of its range.
    """
    require("churn", churn, lambda value: 0 <= value < np.inf, "a finite number >= 0")
    require("churn_min", churn_min, lambda value: value >= 0, "at least 0")
    require("churn_max", churn_max, lambda value: value >= 0, "at least 0")
    require("noise", noise, lambda value: 0 < value < np.inf, "a finite number > 0")
    return Edm(churn, churn_min, churn_max, noise)


def dpmpp_1s() -> Sampler:
    """DPM-Solver++(1), the first-order exponential integrator of x_0: the same map as DDIM's."""
    return ddim(0.0)


def dpmpp_2s() -> Sampler:
    """DPM-Solver++(2S), single-step: x_0 evaluated at the step's middle (Lu et al. 2022)."""
    return Dpmpp2S()


def dpmpp_2m() -> Sampler:
    """DPM-Solver++(2M), multistep: x_0 extrapolated from the last two (Lu et al. 2022)."""
    return Dpmpp2M(0.0)


def dpmpp_2m_sde(eta: Number = 1.0) -> Sampler:
    """SDE-DPM-Solver++(2M): as dpmpp_2m, with the noise of the reverse SDE (Lu et al. 2022).

    ``eta`` >= 0 scales the noise: 0 is dpmpp_2m, 1 the SDE of the forward process.

    Raises:
        ValueError: a negative eta.
    """
    require("eta", eta, lambda value: 0 <= value < np.inf, "a finite number >= 0")
    return Dpmpp2M(eta)


def dpmpp_3m() -> Sampler:
    """DPM-Solver++(3M), multistep: x_0 a parabola in log SNR through the last three."""
    return Dpmpp3M()


def unipc() -> Sampler:
    """UniPC-2: a predictor, and a corrector that costs no further evaluation (Zhao et al. 2023)."""
    return UniPC()


def plms() -> Sampler:
    """Pseudo linear multistep, four eps combined, an improved Euler step first (S-PNDM's start).

    Liu et al. 2022 (PNDM), as latent diffusion uses it. The weights are those of even steps in
    sigma: on a chain of few steps that grow fast, such as the cosine schedule's timesteps, they
    amplify errors; "karras" and "log_snr" suit them.
    """
    return Plms()


def pndm() -> Sampler:
    """Pseudo linear multistep, started by three pseudo Runge-Kutta steps (Liu et al. 2022).

    What ``plms`` says of few steps holds here more so.
    """
    return Pndm()


def sample(
    key: Key[Array, ""],
    predict: Predict,
    schedule: Schedule,
    sampler: Sampler,
    shape: tuple[int, ...],
    x_T: Batch | None = None,
    indices: Int[Array, " batch"] | None = None,
    native: Schedule | None = None,
) -> Batch:
    """Draw images from the model: the reverse chain from x_T ~ N(0, I) to x_0.

    ``shape`` is (batch, ...). ``indices`` are the images' global numbers (default 0..batch-1):
    image i depends on ``key`` and i alone, whatever the batch. Samplers that evaluate between the
    rows of ``schedule`` look up what the network is told there in ``native``, the schedule that it
    was trained with (default: ``schedule`` itself).
    """
    return trajectory(key, predict, schedule, sampler, shape, 0, x_T, indices, native).x_0


class Trajectory(NamedTuple):
    """The end of a chain, and frames of its way there: x_t, and the x_0 that was predicted."""

    x_0: Batch
    x_t: Float[Array, "frames batch ..."]
    predicted_x_0: Float[Array, "frames batch ..."]


def trajectory(
    key: Key[Array, ""],
    predict: Predict,
    schedule: Schedule,
    sampler: Sampler,
    shape: tuple[int, ...],
    num_frames: int,
    x_T: Batch | None = None,
    indices: Int[Array, " batch"] | None = None,
    native: Schedule | None = None,
) -> Trajectory:
    """As ``sample``, and ``num_frames`` evenly spaced states of the chain, from x_T to x_0.

    Only the frames that are kept are stored: memory grows with them, not with the steps.

    Raises:
        ValueError: more frames than the chain has states (one more than its steps), or frames
            of a chain that goes back up.
    """
    path = sampler.path(len(schedule))
    if not (num_frames == 0 or 2 <= num_frames <= len(path)):
        raise ValueError(f"num_frames = {num_frames}: must be 0 or in 2..{len(path)}")
    if num_frames and len(path) > len(schedule) + 1:
        raise ValueError(f"num_frames = {num_frames}: must be 0 for a chain that also goes back")
    if indices is None:
        indices = jnp.arange(shape[0])
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, indices)
    if x_T is None:
        x_T = normal(fold(keys, 0), jnp.empty(shape))

    # state n of the chain (0 is x_T) goes to frame slot_of[n]; slots past the end are dropped
    slot_of = np.full(len(path), num_frames, np.int32)
    slot_of[np.linspace(0, len(path) - 1, num_frames).round().astype(int)] = np.arange(num_frames)
    frames = jnp.broadcast_to(x_T, (num_frames, *shape))

    def step(carry: tuple, interval: tuple) -> tuple[tuple, None]:
        x_t, state, frames, predicted = carry
        number, slot, row, row_prev = interval
        seen = []

        def watched(x_t: Batch, row: Schedule) -> Prediction:
            prediction = predict(x_t, row)
            seen.append(prediction.x_0)
            return prediction

        x_prev, state = sampler.step(
            fold(keys, number), watched if num_frames else predict, state, x_t, row, row_prev
        )
        if num_frames:
            frames = frames.at[slot].set(x_t, mode="drop")
            predicted = predicted.at[slot].set(seen[0], mode="drop")
        return (x_prev, state, frames, predicted), None

    rows = schedules.with_terminal_row(schedule)
    number = jnp.arange(len(path) - 1, 0, -1)
    intervals = (number, slot_of[:-1], rows[path[:-1]], rows[path[1:]])
    carry = (
        x_T,
        sampler.init(x_T, schedule, schedule if native is None else native),
        frames,
        frames,
    )
    (x_0, _, frames, predicted), _ = jax.lax.scan(step, carry, intervals)
    if num_frames:
        frames, predicted = frames.at[-1].set(x_0), predicted.at[-1].set(x_0)
    return Trajectory(x_0, frames, predicted)


INVERSION_ROUNDS = 5


def invert(
    predict: Predict, schedule: Schedule, x_0: Batch, num_iterations: int = INVERSION_ROUNDS
) -> Batch:
    """DDIM backwards, from an image to the x_T that DDIM (eta 0) would make it of: one scan.

    Each step solves x_{t-1} = DDIM(x_t) for x_t by ``num_iterations`` >= 1 rounds of
    x_t = sqrt(alpha) x_{t-1} + beta / (sqrt(1 - ab) + sqrt(alpha (1 - ab_prev))) eps(x_t, t).
    One round, eps taken at x_{t-1}, is the published inversion (Dhariwal & Nichol 2021, section
    3.2). The rounds converge where steps are small and the data are not between two modes: of a
    mixture on the cosine schedule DDIM brings x_0 back to 0.2 with 20 steps, 0.03 with 200 and
    0.006 with 1,000; on the linear one to 1e-4 from 200 steps on.

    Raises:
        ValueError: num_iterations < 1.
    """
    require("num_iterations", num_iterations, lambda value: value >= 1, "at least 1")

    def step(x_prev: Batch, row: Schedule) -> tuple[Batch, None]:
        kept = jnp.sqrt(row.alpha)
        root = jnp.sqrt(row.one_minus_alpha_bar_prev)
        share = row.beta / (jnp.sqrt(row.one_minus_alpha_bar) + kept * root)

        def improve(_: Int[Array, ""], x_t: Batch) -> Batch:
            return kept * x_prev + share * predict(x_t, row).eps

        return jax.lax.fori_loop(0, num_iterations, improve, x_prev), None

    return jax.lax.scan(step, x_0, schedule)[0]


def config_fields() -> dict[str, type]:
    """Every argument of the samplers, with its type in a config."""
    return {
        name: float if parameter.annotation == Number else parameter.annotation
        for sampler in SAMPLERS.values()
        for name, parameter in inspect.signature(sampler).parameters.items()
    }


SAMPLERS: dict[str, Callable[..., Sampler]] = {
    "ancestral": ancestral,
    "ddim": ddim,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "heun": heun,
    "edm": edm,
    "dpmpp_1s": dpmpp_1s,
    "dpmpp_2s": dpmpp_2s,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_3m": dpmpp_3m,
    "unipc": unipc,
    "plms": plms,
    "pndm": pndm,
    "predictor_corrector": predictor_corrector,
}
