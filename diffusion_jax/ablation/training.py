"""Train the jobs of an ablation, several at once with one compiled step."""

import contextlib
import functools
import logging
from collections.abc import Sequence

from jaxtyping import PyTree

from diffusion_jax.ablation.jobs import Job, Site, fail, folder_of, group_jobs, title_of
from diffusion_jax.ablation.slots import Slots, create_slots
from diffusion_jax.ablation.turns import Turn, take_turns
from diffusion_jax.config.config import to_record
from diffusion_jax.diffusion import schedules
from diffusion_jax.diffusion.streams import Stream, stream_key
from diffusion_jax.errors import ConfigError, RunError
from diffusion_jax.runtime.checkpoint import saved_steps
from diffusion_jax.runtime.stop import Stop
from diffusion_jax.training.journal import Journal
from diffusion_jax.training.run import Run
from diffusion_jax.training.step import Constants, TrainState, init_state, pace

LOG = logging.getLogger("diffusion_jax")


def train_jobs(jobs: Sequence[Job], site: Site, failed: dict[str, str]) -> int | None:
    """Train every job to its end, from its newest checkpoint if there is one.

    Jobs with equal static choices share a compiled step and train together; one such group runs
    after another. A job that fails is put into ``failed`` and does not stop the others.

    Returns the signal that asked the training to stop, or None. After a signal, every run under
    way is saved.
    """
    with contextlib.closing(Stop()) as stop:
        for group in group_jobs(jobs):
            slots = create_slots(site.parallel, group, site.devices)
            training = _Training(group, slots, site, failed)
            with contextlib.closing(training):
                stopping = False
                while not stopping and training.fill():
                    stopping = training.advance(stop)
            if stop.signal is not None:
                break
        return stop.signal


class _Training:
    """Trains jobs that share one compiled step; a free slot takes the next turn.

    The caller alternates ``fill``, which opens runs in free slots, and ``advance``, which takes
    steps, until ``fill`` returns False.
    """

    def __init__(
        self, jobs: Sequence[Job], slots: Slots, site: Site, failed: dict[str, str]
    ) -> None:
        self._jobs, self._slots, self._site, self._failed = jobs, slots, site, failed
        plans = [job.experiment.training for job in jobs]
        saved = [saved_steps(folder_of(job, site.path).checkpoints) for job in jobs]
        self._waiting = take_turns(
            done=[max(steps, default=0) for steps in saved],
            lengths=[plan.num_steps for plan in plans],
            num_slots=slots.num,
            multiple=plans[0].checkpoint_every_steps,
        )
        self._length = max(len(job.experiment.schedule) for job in jobs)
        self._steps_per_call, self._in_flight = pace(jobs[0].experiment.training, site.devices[0])
        self._runs: dict[int, tuple[Turn, Run]] = {}  # by slot
        self._ended: dict[int, Run] = {}  # by job; their last checkpoint may still be saving
        self._constants: list[Constants | None] = [None] * slots.num
        self._inputs: PyTree = None  # (state, constants) of all slots, on the devices

    def fill(self) -> bool:
        """Open the runs of waiting turns in the free slots; return whether any run is under way."""
        new = {}
        for slot in range(self._slots.num):
            while slot not in self._runs and (turn := self._next_turn()) is not None:
                job = self._jobs[turn.index]
                if turn.index in self._ended:
                    self._end(turn.index)
                try:
                    run = self._open(job, slot)
                except (RunError, ConfigError) as error:  # no intact checkpoint, or folder in use
                    fail(job, error, self._failed)
                    continue
                if run.is_done:
                    run.close()
                    continue
                schedule = schedules.pad(job.experiment.schedule, self._length)
                self._constants[slot] = Constants(schedule, stream_key(job.seed, Stream.TRAINING))
                self._runs[slot], new[slot] = (turn, run), run.state
        if new:
            self._put(new)
        return bool(self._runs)

    def _put(self, new: dict[int, TrainState]) -> None:
        """Put the states of the new runs onto the devices, with the states of the other runs.

        A free slot trains a copy of another slot's run; nobody reads the result.
        """
        donor = next(iter(new))
        inputs = []
        for slot in range(self._slots.num):
            if slot in self._runs and slot not in new:
                state = self._slots.get(slot, self._inputs[0])
            else:
                state = new.get(slot, new[donor])
            inputs.append((state, self._constants[slot if slot in self._runs else donor]))
        self._inputs = self._slots.put(inputs)

    def _next_turn(self) -> Turn | None:
        """Remove and return the first waiting turn whose job has no run under way."""
        names = [title_of(job) for job in self._jobs]
        self._waiting = [t for t in self._waiting if names[t.index] not in self._failed]
        running = {turn.index for turn, _ in self._runs.values()}
        first = next((turn for turn in self._waiting if turn.index not in running), None)
        if first is not None:
            self._waiting.remove(first)
        return first

    def _open(self, job: Job, slot: int) -> Run:
        """Lock the folder of a job until its run is closed, and restore its newest checkpoint."""
        plan, folder = job.experiment.training, folder_of(job, self._site.path)
        # The init function of the first job does the same and is compiled already.
        first, length = self._jobs[0].experiment, len(job.experiment.schedule)
        fresh = init_state(first, seed=job.seed, num_timesteps=length)
        read = functools.partial(self._slots.get, slot)
        title = title_of(job)
        journal = functools.partial(Journal, max_in_flight=self._in_flight, read=read, name=title)
        waiting = len({turn.index for turn in self._waiting})
        LOG.info("training %s; %d more are waiting", title, waiting)
        with contextlib.ExitStack() as stack:
            stack.enter_context(folder.lock())
            folder.record(to_record(job.config))
            return Run(
                plan,
                fresh,
                journal,
                seed=job.seed,
                dataset=self._site.dataset,
                workdir=folder,
                held=stack.pop_all(),
            )

    def advance(self, stop: Stop) -> bool:
        """Take the same number of steps in every slot, then save and end the runs that are due.

        A run ends at the end of its turn. Returns whether a signal asked to stop; then every run
        has been saved.
        """
        num_steps = min(run.steps_to(self._steps_per_call) for _, run in self._runs.values())
        batches = {slot: run.batches(num_steps) for slot, (_, run) in self._runs.items()}
        donor = next(iter(batches))
        of_slots = [batches.get(slot, batches[donor]) for slot in range(self._slots.num)]
        on_devices = self._slots.put_batches(of_slots)
        state, constants = self._inputs
        state, metrics = self._slots.steps(state, constants, self._slots.indices, on_devices)
        self._inputs = state, constants
        self._close_ended()  # waits for saves while the devices compute
        stopping = stop.asked(0)
        for slot, (turn, run) in tuple(self._runs.items()):
            try:
                run.took(num_steps, metrics)
                if stopping or run.is_checkpoint_due:
                    run.save(self._slots.get(slot, state))
                ended = run.step >= turn.until  # a checkpoint was due at the end of the turn
            except RunError as error:  # the loss is not finite, or a save failed
                fail(self._jobs[turn.index], error, self._failed)
                ended = True
            if ended:
                self._ended[turn.index] = self._runs.pop(slot)[1]
        return stopping

    def _close_ended(self) -> None:
        for index in list(self._ended):
            self._end(index)

    def _end(self, index: int) -> None:
        """Close a run that has ended; its job has failed if its last checkpoint was not saved."""
        try:
            self._ended.pop(index).close()
        except RunError as error:
            fail(self._jobs[index], error, self._failed)

    def close(self) -> None:
        """Close all runs that are under way or have ended, even if one of them fails to close."""
        self._ended |= {turn.index: run for turn, run in self._runs.values()}
        with contextlib.ExitStack() as stack:
            for index in self._ended:
                stack.callback(self._end, index)
