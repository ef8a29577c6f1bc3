"""What a sampler is, and the arithmetic that several samplers share.

Solvers of the probability flow are written as what they add to a DDIM step, which is the flow's
exact solution where x_0 and eps stand still: then no nearly equal numbers are subtracted. Their
coordinates are y = x_t / sqrt(alpha_bar), in which dy = eps d sigma.
"""

import abc
import dataclasses
import inspect
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from diffusion_jax.diffusion import process, schedules
from diffusion_jax.diffusion.process import Predict, Prediction
from diffusion_jax.diffusion.schedules.schedule import Schedule

Batch = Float[Array, "batch ..."]
Keys = Key[Array, " batch"]
Number = float | Float[Array, ""]
Scalar = Float[Array, ""]

STATIC = {"static": True}  # metadata of a field that compiled functions are compiled for


class Step(NamedTuple):
    """One step of a chain: from the timestep of ``row`` down to that of ``row_prev``.

    ``keys`` are one for each image, ``state`` is what the sampler returned from the step before.
    """

    keys: Keys
    predict: Predict
    state: Any
    x_t: Batch
    row: Schedule
    row_prev: Schedule

    @property
    def is_last(self) -> Bool[Array, ""]:
        """Whether the step ends at x_0, where there is no noise."""
        return self.row_prev.one_minus_alpha_bar == 0

    @property
    def drop_of_sigma(self) -> Scalar:
        """sqrt(alpha_bar_prev) (sigma_prev - sigma), what an added eps is multiplied by."""
        return jnp.sqrt(self.row_prev.alpha_bar) * (self.row_prev.sigma - self.row.sigma)

    def middle(self, schedule: Schedule) -> Schedule:
        """The row of ``schedule`` half-way in log SNR."""
        log_snr = (self.row.log_snr + self.row_prev.log_snr) / 2
        return schedules.at_log_snr(schedule, log_snr[None])[0]


class Sampler(abc.ABC):
    """A sampler of the reverse chain: ``init`` makes its state, ``step`` takes one step.

    A subclass is one class with annotated fields: it becomes a frozen dataclass and a pytree,
    whose fields are leaves unless their metadata are ``STATIC``. So other numbers (eta) do not
    compile the chain again. A line in SAMPLERS gives it a name in configs.

    ``needs_signal``: it works in units of sigma, which is infinite where alpha_bar = 0.
    ``goes_off_grid``: it asks the network between the rows of the chain too.
    """

    needs_signal: ClassVar[bool] = False
    goes_off_grid: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        own = inspect.get_annotations(cls)
        for name in ("__init__", "kind"):
            if name in vars(cls) or name in own:
                raise TypeError(
                    f"{cls.__name__}.{name}: a sampler must not define it; its arguments are its "
                    "annotated fields"
                )
        # jax takes the structures of two registered dataclasses for equal if their static fields
        # are, whatever the classes: a compiled function would now and then run one sampler for
        # another. So each class has a static field that names it.
        cls.__annotations__ = own | {"kind": str}
        name = f"{cls.__module__}.{cls.__qualname__}"
        cls.kind = dataclasses.field(default=name, repr=False, kw_only=True, metadata=STATIC)
        jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))

    def init(self, x_T: Batch, rows: Schedule, schedule: Schedule) -> Any:
        """State before the first step of a chain over ``rows``.

        Rows between those are found in ``schedule``, of which they may be few.
        """
        return ()

    @abc.abstractmethod
    def step(self, now: Step) -> tuple[Batch, Any]:
        """The x_t at the timestep of ``now.row_prev``, and the state for the next step."""

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


def ddim_step(prediction: Prediction, row_prev: Schedule) -> Batch:
    """The DDIM step without noise: x_0 and eps, put together at the next noise level."""
    return process.q_sample(row_prev, prediction.x_0, prediction.eps)


def width(row: Schedule) -> Scalar:
    """The width h > 0 of a step in lambda = log(alpha / sigma) = (log SNR) / 2.

    exp(-2 h) = 1 - beta / (1 - alpha_bar), so that no two log SNRs are subtracted. Infinite in the
    step to x_0, and from zero SNR.
    """
    is_first = row.one_minus_alpha_bar_prev == 0
    lost = jnp.where(is_first, 1.0, row.beta / row.one_minus_alpha_bar)
    return -jnp.log1p(-lost) / 2


def ratio(a: Scalar, b: Scalar) -> Scalar:
    """Of two widths, a / b; 0 where either is infinite: what lies beyond has no weight."""
    return jnp.where(jnp.isfinite(a) & jnp.isfinite(b), a / b, 0)


PHI_TERMS = 14  # of the series below: exact to float64 for h < 1


def phi(h: Scalar) -> tuple[Scalar, Scalar]:
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


class TwoStage(Sampler):
    """A solver that evaluates twice a step, and once in the last, which is Euler's."""

    needs_signal: ClassVar[bool] = True

    def num_evaluations(self, num_steps: int) -> int:
        """Two a step, one in the last."""
        return 2 * num_steps - 1


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


def no_memory(x_T: Batch) -> Memory:
    """The memory before the first step."""
    infinite = jnp.full((), jnp.inf, x_T.dtype)
    return Memory(jnp.zeros_like(x_T), jnp.zeros_like(x_T), infinite, infinite)


def step_along(now: Step, prediction: Prediction, eps: Batch) -> Batch:
    """A DDIM step that goes along another eps."""
    ddim = ddim_step(prediction, now.row_prev)
    return ddim + now.drop_of_sigma * (eps - prediction.eps)
