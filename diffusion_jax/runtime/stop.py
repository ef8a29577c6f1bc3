"""Being asked to stop: by Ctrl-C, by a batch queue, by the machine that goes away."""

import signal
from types import FrameType

import jax
from jax.experimental import multihost_utils


class Stop:
    """SIGTERM and SIGINT as a question that the loop asks between steps.

    Of several processes jax's preemption service hears the SIGTERM, if nobody else handles it.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        numbers = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
        self._before = {number: signal.signal(number, self._remember) for number in numbers}

    def close(self) -> None:
        """Let signals do again what they did before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal = number

    def asked(self, step: int) -> bool:
        """Whether to stop now; several processes agree on the step through jax."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.signal = signal.SIGTERM
        return self.signal is not None
