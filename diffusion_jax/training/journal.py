"""The records of a training run; metrics are read from the devices late, so that nothing waits."""

import pathlib
import time
from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import UInt8

from diffusion_jax.errors import NonFiniteLossError
from diffusion_jax.experiment.training import TrainingPlan
from diffusion_jax.runtime import devices
from diffusion_jax.training.metrics import MetricsWriter, Progress
from diffusion_jax.training.step import QUARTILES, StepMetrics

# A function that waits for a picture, which a device may still be sampling, and returns it.
Picture = Callable[[], UInt8[np.ndarray, "h w c"]]

# The sums of a Journal before the first step after a record.
NO_STEPS: dict[str, np.ndarray] = {
    "steps": np.zeros(()),
    "loss": np.zeros(()),
    "gradient_norm": np.zeros(()),
    "quartile_losses": np.zeros(QUARTILES),
    "quartile_weights": np.zeros(QUARTILES),
}


class Journal:
    """Reads the metrics of a call once ``max_in_flight`` later calls are under way, and logs them.

    Every process reads them, because a non-finite loss must stop all processes; the first process
    writes the records. ``since_log`` has the sums over the steps since the last record; checkpoints
    contain it. ``read`` copies the metrics of a call to the host. ``name`` distinguishes runs that
    train at the same time.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        plan: TrainingPlan,
        *,
        start: int,
        since_log: dict[str, np.ndarray],
        max_in_flight: int,
        read: Callable[[StepMetrics], StepMetrics] = devices.local_copy,
        name: str = "",
    ) -> None:
        self.since_log = since_log
        self._to_host = read
        self._plan = plan
        self._max_in_flight = max_in_flight
        self._in_flight: list[tuple[int, StepMetrics, Picture | None]] = []
        self._since_save: list[np.ndarray] = []
        self._clock: tuple[int, float] | None = None  # starts after the call that compiles
        is_writer = jax.process_index() == 0
        self._writer = MetricsWriter(folder, start) if is_writer else None
        self._progress = Progress(plan.num_steps, start, name) if is_writer else None

    def add(self, step: int, metrics: StepMetrics, picture: Picture | None) -> None:
        """Queue the metrics of the call that ends at ``step``, and read those of old calls.

        Raises:
            NonFiniteLossError: a loss or gradient norm that was read is not finite.
        """
        self._in_flight.append((step, metrics, picture))
        while len(self._in_flight) > self._max_in_flight:
            self._read()

    def drain(self) -> None:
        """Wait for every call that is under way, and read its metrics.

        Raises:
            NonFiniteLossError: a loss or gradient norm is not finite.
        """
        while self._in_flight:
            self._read()

    def loss_since_save(self) -> float:
        """The mean loss since the last checkpoint, which ranks the next one; starts a new mean."""
        losses, self._since_save = self._since_save, []
        return float(np.concatenate(losses).mean())

    def _read(self) -> None:
        step, on_device, picture = self._in_flight.pop(0)
        metrics = self._to_host(on_device)
        finite = np.isfinite(metrics.loss) & np.isfinite(metrics.gradient_norm)
        if not finite.all():
            bad = int(np.argmin(finite))
            raise NonFiniteLossError(
                f"step {step - len(finite) + 1 + bad}: loss {metrics.loss[bad]}, "
                f"gradient norm {metrics.gradient_norm[bad]}"
            )
        for of_step in zip(*metrics):  # one by one: the rounding must not depend on steps_per_call
            values = {"steps": 1, **StepMetrics(*of_step)._asdict()}
            self.since_log = {name: sum_ + values[name] for name, sum_ in self.since_log.items()}
        self._since_save.append(np.asarray(metrics.loss))
        if self._progress is not None:
            self._progress.advance(step)
        if step % self._plan.log_every_steps == 0 or step == self._plan.num_steps:
            self._log(step)
        if picture is not None and self._writer is not None:
            self._writer.write_image(step, "samples", picture())
        if self._clock is None:
            self._clock = step, time.perf_counter()

    def _log(self, step: int) -> None:
        sums, self.since_log = self.since_log, NO_STEPS
        record = {name: sums[name] / sums["steps"] for name in ("loss", "gradient_norm")}
        weights = sums["quartile_weights"]
        for quartile in np.flatnonzero(weights):  # few steps may leave a quartile without examples
            mean = sums["quartile_losses"][quartile] / weights[quartile]
            record[f"loss_quartile_{quartile + 1}"] = mean
        if self._writer is None or self._progress is None:
            return
        now = time.perf_counter()
        if self._clock is not None:
            speed = (step - self._clock[0]) * self._plan.batch_size / (now - self._clock[1])
            record["images_per_second"] = speed
        self._clock = step, now
        self._writer.write(step, **record)
        self._progress.report(step, record["loss"], record.get("images_per_second", 0.0))

    def close(self) -> None:
        """Close the records, without waiting for calls that are under way."""
        if self._writer is not None:
            self._writer.close()
        if self._progress is not None:
            self._progress.close()
