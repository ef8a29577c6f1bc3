"""Requests to stop: Ctrl-C, or the SIGTERM of a batch queue or a preempted machine."""

import signal
from types import FrameType

import jax
from jax.experimental import multihost_utils


class Stop:
    """Remembers SIGTERM and SIGINT, so that the training loop can stop after a step.

    In a run of several processes jax's preemption service handles SIGTERM, so this class does not.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        numbers = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
        self._before = {number: signal.signal(number, self._remember) for number in numbers}

    def close(self) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal = number

    def asked(self, step: int) -> bool:
        """Whether to stop after this step; jax makes several processes agree on the step."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.signal = signal.SIGTERM
        return self.signal is not None
