"""The base class of samplers, and the arithmetic that several samplers share.

Solvers of the probability flow are written as a DDIM step plus a correction. A DDIM step solves
the flow exactly if x_0 and eps are constant, and it subtracts no nearly equal numbers. The
coordinates are y = x_t / sqrt(alpha_bar), in which the flow is dy = eps d sigma.
"""

import abc
import dataclasses
import inspect
from typing import Any, ClassVar, NamedTuple, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from diffusion_jax.diffusion import process
from diffusion_jax.diffusion.process import Predict, Prediction
from diffusion_jax.diffusion.schedules.columns import log_one_minus
from diffusion_jax.diffusion.schedules.schedule import Schedule
from diffusion_jax.diffusion.schedules.transforms import at_log_snr

Batch = Float[Array, "batch ..."]
Keys = Key[Array, " batch"]
Number = float | Float[Array, ""]
Scalar = Float[Array, ""]

STATIC = {"static": True}  # metadata of a field: functions are compiled once for each of its values


class Step(NamedTuple):
    """One step of a chain, from the timestep of ``row`` down to that of ``row_prev``.

    ``keys`` has one key per image. ``state`` is the state that the previous step returned.
    """

    keys: Keys
    predict: Predict
    state: Any
    x_t: Batch
    row: Schedule
    row_prev: Schedule

    @property
    def is_last(self) -> Bool[Array, ""]:
        """Whether the step ends at x_0, where alpha_bar = 1."""
        return self.row_prev.one_minus_alpha_bar == 0

    @property
    def drop_of_sigma(self) -> Scalar:
        """sqrt(alpha_bar_prev) (sigma_prev - sigma), the factor of eps in a step (negative)."""
        return jnp.sqrt(self.row_prev.alpha_bar) * (self.row_prev.sigma - self.row.sigma)

    def middle(self, schedule: Schedule) -> Schedule:
        """The row of ``schedule`` at the mean log SNR of ``row`` and ``row_prev``."""
        log_snr = (self.row.log_snr + self.row_prev.log_snr) / 2
        return at_log_snr(schedule, log_snr[None])[0]


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
class Sampler(abc.ABC):
    """A sampler of the reverse chain: ``init`` makes its state, ``step`` takes one step.

    A subclass declares annotated fields and ``step``. It automatically becomes a frozen dataclass
    and a pytree. Its fields are leaves, so that another number (eta) does not compile the chain
    again, unless their metadata are ``STATIC``. A line in SAMPLERS gives it a name in configs.

    ``needs_signal``: the sampler computes with sigma, which is infinite at alpha_bar = 0.
    ``goes_off_grid``: the sampler also evaluates the network between the rows of the chain.
    """

    needs_signal: ClassVar[bool] = False
    goes_off_grid: ClassVar[bool] = False
    kind: type

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        own = inspect.get_annotations(cls)
        for name in ("__init__", "kind"):
            if name in vars(cls) or name in own:
                raise TypeError(
                    f"{cls.__name__}.{name}: a sampler must not define it; its arguments are its "
                    "annotated fields"
                )
        # jax compares the structures of registered dataclasses by their static fields, not by
        # their classes. A compiled function could then run another sampler's step, or the old
        # step of a class that a notebook has redefined. So each class is its own static field.
        cls.__annotations__ = own | {"kind": type}
        cls.kind = dataclasses.field(default=cls, repr=False, kw_only=True, metadata=STATIC)
        jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))

    def init(self, x_T: Batch, rows: Schedule, schedule: Schedule) -> Any:
        """The state before the first step of a chain over ``rows``.

        ``schedule`` is the schedule of the network's training; ``rows`` may be a few of its rows. A
        sampler that evaluates between the rows interpolates in ``schedule``.
        """
        return ()

    @abc.abstractmethod
    def step(self, now: Step) -> tuple[Batch, Any]:
        """Return x_t at the timestep of ``now.row_prev``, and the state for the next step."""

    def path(self, num_steps: int) -> Int[np.ndarray, " states"]:
        """The states in the order in which the chain visits them; num_steps is x_T, 0 is x_0."""
        return np.arange(num_steps, -1, -1)

    def num_evaluations(self, num_steps: int) -> int:
        """The number of network evaluations per image in a chain of ``num_steps``."""
        return num_steps


def normal(keys: Keys, like: Batch) -> Batch:
    """Standard normal noise of the shape of ``like``, with one key per image."""
    return jax.vmap(lambda key: jax.random.normal(key, like.shape[1:], like.dtype))(keys)


def fold(keys: Keys, number: int | Int[Array, ""]) -> Keys:
    """The keys of the draw with this ``number``, one per image."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, number)


def ddim_step(prediction: Prediction, row_prev: Schedule) -> Batch:
    """The DDIM step with eta = 0: sqrt(ab_prev) x_0 + sqrt(1 - ab_prev) eps."""
    return process.q_sample(row_prev, prediction.x_0, prediction.eps)


LARGE = 0.9  # ``large`` of log_one_minus, for the share of the SNR that a step loses


def width(row: Schedule) -> Scalar:
    """The width h > 0 of a step in the lambda of DPM-Solver, which is (log SNR) / 2.

    exp(-2 h) = 1 - beta / (1 - alpha_bar) = alpha (1 - alpha_bar_prev) / (1 - alpha_bar), which
    subtracts no two log SNRs. h is infinite in the step to x_0 and in a step from zero SNR.
    """
    is_first = row.one_minus_alpha_bar_prev == 0
    loss = jnp.where(is_first, 1.0, row.beta / row.one_minus_alpha_bar)
    rest = row.alpha * (row.one_minus_alpha_bar_prev / row.one_minus_alpha_bar)
    return -log_one_minus(loss, rest, LARGE) / 2


def ratio(a: Scalar, b: Scalar) -> Scalar:
    """The ratio a / b of two widths; 0 if one is infinite, to drop the term of a missing step."""
    return jnp.where(jnp.isfinite(a) & jnp.isfinite(b), a / b, 0)


PHI_TERMS = 14  # of the series below: relative errors below 2e-13 for h < 1


def phi(h: Scalar) -> tuple[Scalar, Scalar]:
    """phi_2 = (e^-h - 1) / h + 1 and phi_3 = phi_2 / h - 1/2 (DPM-Solver++, appendix A).

    For h < 1 they are computed from their series: the closed forms subtract nearly equal numbers.
    """
    two, three = jnp.zeros_like(h), jnp.zeros_like(h)
    near = jnp.minimum(h, 1)
    # Horner's scheme for sum over k >= 1 of (-1)^(k+1) h^k / (k+1)! and of (-1)^k h^k / (k+2)!
    for k in range(PHI_TERMS, 0, -1):
        two = near / (k + 1) * (1 - two)
        three = near / (k + 2) * (1 - three)
    three = -three / 2
    far = jnp.maximum(h, 1)
    two_far = jnp.expm1(-far) / far + 1
    return jnp.where(h < 1, two, two_far), jnp.where(h < 1, three, two_far / far - 0.5)


class TwoStage(Sampler):
    """A solver with two evaluations per step; the last step is an Euler step with one."""

    needs_signal: ClassVar[bool] = True

    def num_evaluations(self, num_steps: int) -> int:
        """Two per step, and one in the last step."""
        return 2 * num_steps - 1


class Memory(NamedTuple):
    """The predicted x_0 of the last two steps, and the widths of these steps.

    An infinite width means that the step does not exist.
    """

    x_0: Batch
    x_0_before: Batch
    width: Scalar
    width_before: Scalar

    def with_new(self, x_0: Batch, width: Scalar) -> "Memory":
        """Add the newest step, and forget the oldest."""
        return Memory(x_0, self.x_0, width, self.width)


def no_memory(x_T: Batch) -> Memory:
    """The memory before the first step."""
    infinite = jnp.full((), jnp.inf, x_T.dtype)
    return Memory(jnp.zeros_like(x_T), jnp.zeros_like(x_T), infinite, infinite)


def step_along(now: Step, prediction: Prediction, eps: Batch) -> Batch:
    """A DDIM step in y = x_t / sqrt(alpha_bar) with ``eps`` in place of the predicted eps."""
    ddim = ddim_step(prediction, now.row_prev)
    return ddim + now.drop_of_sigma * (eps - prediction.eps)
