"""A training run under way: its checkpoints, its batches and its journal."""

import contextlib
import itertools
import logging
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from diffusion_jax.data.batches import read_batches
from diffusion_jax.data.dataset import Dataset
from diffusion_jax.experiment.training import TrainingPlan
from diffusion_jax.runtime.checkpoint import Checkpoints, Restored
from diffusion_jax.runtime.workdir import Workdir
from diffusion_jax.training.journal import NO_STEPS, Journal, Picture
from diffusion_jax.training.step import Batch, StepMetrics, TrainState

LOG = logging.getLogger("diffusion_jax")


class Processes(NamedTuple):
    """The index of this process, and the number of processes that share the batches of a run."""

    index: int = 0  # type: ignore[assignment]  # hides tuple.index, which is not needed here
    count: int = 1  # type: ignore[assignment]  # hides tuple.count, likewise


class Run:
    """The part of a training run on the host: its step, checkpoints, batches and records.

    It starts from the newest intact checkpoint, if there is one. ``step`` is the number of steps
    taken so far, and ``state`` the state of the start, on the host. ``journal`` opens the records
    with the step and the sums of the checkpoint. ``held`` is closed with the run: it holds the lock
    of the folder, for example.
    """

    def __init__(
        self,
        plan: TrainingPlan,
        fresh: TrainState,
        journal: Callable[..., Journal],
        *,
        seed: int,
        dataset: Dataset,
        workdir: Workdir,
        processes: Processes = Processes(),  # noqa: B008 (a constant)
        held: contextlib.ExitStack | None = None,
    ) -> None:
        self._plan = plan
        with held or contextlib.ExitStack() as resources:
            self._checkpoints = Checkpoints(
                workdir.checkpoints, plan.keep_last, plan.keep_best, keep_step=plan.keep_step
            )
            resources.callback(self._checkpoints.close)
            # with the sums of the next record, a resumed run writes the same records as a run that
            # was never stopped
            template = {**fresh._asdict(), "since_log": NO_STEPS}
            self.step, saved = self._checkpoints.restore(template) or Restored(0, template)
            self.state = TrainState(*(saved[name] for name in TrainState._fields))
            start = {"start": self.step, "since_log": saved["since_log"]}
            self._journal = journal(workdir.path, plan, **start)
            resources.callback(self._journal.close)
            self._batches = read_batches(
                dataset.train,
                plan.batch_size,
                seed,
                start_step=self.step,
                flip=plan.flip,
                process_index=processes.index,
                process_count=processes.count,
            )
            self._resources = resources.pop_all()
        if self.step:
            LOG.info("resuming at step %d", self.step)
        if self.step > plan.num_steps:
            LOG.warning(
                "the checkpoint is of step %d, past config.train.num_steps = %d: nothing is "
                "trained, and all results are of step %d",
                self.step,
                plan.num_steps,
                self.step,
            )

    @property
    def is_done(self) -> bool:
        """Whether the last step has been taken."""
        return self.step >= self._plan.num_steps

    def steps_to(self, multiple: int) -> int:
        """The number of steps until the next step that is divisible by ``multiple``, or the end."""
        return min(multiple - self.step % multiple, self._plan.num_steps - self.step)

    def batches(self, num_steps: int) -> Batch:
        """The batches of the next steps: [step, example, ...]."""
        batches = itertools.islice(self._batches, num_steps)
        return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)

    def took(self, num_steps: int, metrics: StepMetrics, picture: Picture | None = None) -> None:
        """Count the steps of a call, and queue its metrics and a picture of the state after it."""
        self.step += num_steps
        self._journal.add(self.step, metrics, picture)

    @property
    def is_checkpoint_due(self) -> bool:
        """Whether the plan saves the state of this step."""
        return self.is_done or self.step % self._plan.checkpoint_every_steps == 0

    def save(self, state: TrainState) -> None:
        """Save a state that is on the host, after checking that all losses so far are finite.

        Raises:
            NonFiniteLossError: a loss or gradient norm is not finite; the state is not saved.
        """
        self._journal.drain()
        loss = self._journal.loss_since_save()
        tree = {**state._asdict(), "since_log": self._journal.since_log}
        self._checkpoints.save(self.step, tree, loss)

    def close(self) -> None:
        """Wait for the save that is under way, and close the records."""
        self._resources.close()
