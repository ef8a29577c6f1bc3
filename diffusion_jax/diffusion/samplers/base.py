"""The base class of samplers, and the arithmetic that several samplers share.

Solvers of the probability flow are written as a DDIM step plus a correction. A DDIM step solves
the flow exactly where x_0 and eps are constant, so that no nearly equal numbers are subtracted.
Their coordinates are y = x_t / sqrt(alpha_bar), in which dy = eps d sigma.
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

STATIC = {"static": True}  # metadata of a field for whose value functions are compiled


class Step(NamedTuple):
    """One step of a chain: from the timestep of ``row`` down to that of ``row_prev``.

    ``keys`` has a key for each image; ``state`` is the one that the step before returned.
    """

    keys: Keys
    predict: Predict
    state: Any
    x_t: Batch
    row: Schedule
    row_prev: Schedule

    @property
    def is_last(self) -> Bool[Array, ""]:
        """Whether the step ends at x_0, which has no noise."""
        return self.row_prev.one_minus_alpha_bar == 0

    @property
    def drop_of_sigma(self) -> Scalar:
        """sqrt(alpha_bar_prev) (sigma_prev - sigma), the factor of an added eps."""
        return jnp.sqrt(self.row_prev.alpha_bar) * (self.row_prev.sigma - self.row.sigma)

    def middle(self, schedule: Schedule) -> Schedule:
        """The row of ``schedule`` half-way in log SNR."""
        log_snr = (self.row.log_snr + self.row_prev.log_snr) / 2
        return at_log_snr(schedule, log_snr[None])[0]


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
class Sampler(abc.ABC):
    """A sampler of the reverse chain: ``init`` makes its state, ``step`` takes one step.

    A subclass declares annotated fields and ``step``. It becomes a frozen dataclass and a pytree
    by itself; its fields are leaves unless their metadata are ``STATIC``, so that another number
    (eta) does not compile the chain again. A line in SAMPLERS gives it a name in configs.

    ``needs_signal``: it computes with sigma, which is infinite where alpha_bar = 0.
    ``goes_off_grid``: it evaluates the network between the rows of the chain too.
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
        # To jax the structures of two registered dataclasses are equal if their static fields are,
        # whatever the classes: a compiled function could run one sampler in place of another, or
        # in place of its new definition in a notebook. So each class is its own static field.
        cls.__annotations__ = own | {"kind": type}
        cls.kind = dataclasses.field(default=cls, repr=False, kw_only=True, metadata=STATIC)
        jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))

    def init(self, x_T: Batch, rows: Schedule, schedule: Schedule) -> Any:
        """The state before the first step of a chain over ``rows``.

        ``schedule`` is the one that the network was trained with; ``rows`` may be a few of its
        rows. A sampler that goes off the grid interpolates in it.
        """
        return ()

    @abc.abstractmethod
    def step(self, now: Step) -> tuple[Batch, Any]:
        """The x_t at the timestep of ``now.row_prev``, and the state for the next step."""

    def path(self, num_steps: int) -> Int[np.ndarray, " states"]:
        """The states that the chain visits in this order; num_steps is x_T, 0 is x_0."""
        return np.arange(num_steps, -1, -1)

    def num_evaluations(self, num_steps: int) -> int:
        """The number of calls of ``predict`` for each image in a chain of ``num_steps``."""
        return num_steps


def normal(keys: Keys, like: Batch) -> Batch:
    """Standard normal noise in the shape of ``like``, each image by its own key."""
    return jax.vmap(lambda key: jax.random.normal(key, like.shape[1:], like.dtype))(keys)


def fold(keys: Keys, number: int | Int[Array, ""]) -> Keys:
    """The keys of draw ``number`` of several, one for each image."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, number)


def ddim_step(prediction: Prediction, row_prev: Schedule) -> Batch:
    """The DDIM step without noise: x_0 and eps, combined at the next noise level."""
    return process.q_sample(row_prev, prediction.x_0, prediction.eps)


LARGE = 0.9  # loss of SNR in a step; steps below it are rounded as in earlier versions


def width(row: Schedule) -> Scalar:
    """The width h > 0 of a step in lambda = log(alpha / sigma) = (log SNR) / 2.

    exp(-2 h) = 1 - beta / (1 - alpha_bar) = alpha (1 - alpha_bar_prev) / (1 - alpha_bar), so that
    no two log SNRs are subtracted. Infinite in the step to x_0, and from zero SNR.
    """
    is_first = row.one_minus_alpha_bar_prev == 0
    loss = jnp.where(is_first, 1.0, row.beta / row.one_minus_alpha_bar)
    kept = row.alpha * (row.one_minus_alpha_bar_prev / row.one_minus_alpha_bar)
    return -log_one_minus(loss, kept, LARGE) / 2


def ratio(a: Scalar, b: Scalar) -> Scalar:
    """Of two widths, a / b; 0 where one is infinite: no such step, so its term is dropped."""
    return jnp.where(jnp.isfinite(a) & jnp.isfinite(b), a / b, 0)


PHI_TERMS = 14  # of the series below: exact to float64 for h < 1


def phi(h: Scalar) -> tuple[Scalar, Scalar]:
    """phi_2 = (e^-h - 1) / h + 1 and phi_3 = phi_2 / h - 1/2 (DPM-Solver++, appendix A).

    For small h from their series, because the closed forms subtract nearly equal numbers.
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


class TwoStage(Sampler):
    """A solver with two evaluations a step; the last step is Euler's and has one."""

    needs_signal: ClassVar[bool] = True

    def num_evaluations(self, num_steps: int) -> int:
        """Two a step, one in the last."""
        return 2 * num_steps - 1


class Memory(NamedTuple):
    """The predicted x_0 of the last two steps, and the widths of these steps.

    An infinite width means that there was no such step.
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
    """A DDIM step along another eps."""
    ddim = ddim_step(prediction, now.row_prev)
    return ddim + now.drop_of_sigma * (eps - prediction.eps)
