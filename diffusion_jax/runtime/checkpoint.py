"""Checkpoints that are asynchronous, confirmed, verified and never trusted blindly.

Orbax writes them. The record and the list of arrays of a save are read back before older steps are
removed. Orbax restores flipped bits without a word, so a digest of the state is saved beside it and
compared at restore; a damaged step falls back to the newest intact one. Whoever reads changes
nothing: the run that the folder belongs to may be writing there.

Orbax counts its saves and loads, and those of several processes wait for each other. So all
processes save and load the same steps, from their main threads.
"""

import contextlib
import functools
import logging
import math
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import sha256
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from diffusion_jax.errors import ConfigError, RunError, WorkdirError
from diffusion_jax.runtime.processes import any_is, value_of_first

LOG = logging.getLogger("diffusion_jax")

Arrays = dict[str, np.ndarray]

UNFINISHED = "*.orbax-checkpoint-tmp*"  # the folder of a step while orbax writes it
REMOVED = ".removed"  # the end of its name while a step is removed
DAMAGED = ".damaged"  # the end of its name when a run has gone on from an older step


class SaveError(RunError):
    """A checkpoint could not be written, or not be read back."""


class NoIntactCheckpointError(RunError):
    """There are checkpoints and every one of them is damaged."""


class OtherModelError(RunError):
    """An intact checkpoint does not have the arrays of the model."""


class Restored(NamedTuple):
    """A pytree of numpy arrays and the step at which it was saved."""

    step: int
    state: Any


def flatten(state: Any) -> Arrays:
    """A pytree as a dict from path ("params/stem/kernel") to array."""
    return {name: np.asarray(leaf) for name, leaf in _by_path(state).items()}


def _by_path(state: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def digest(arrays: Arrays) -> str:
    """SHA-256 of every array's name, type, shape and bytes."""
    total = sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        total.update(f"{name} {array.dtype} {array.shape}\n".encode())
        total.update(array.reshape(-1).view(np.uint8).data)  # which copies nothing
    return total.hexdigest()


def saved_steps(directory: pathlib.Path) -> list[int]:
    """Every step of which a checkpoint is there, oldest first, intact or not."""
    return sorted(int(path.name) for path in directory.glob("*") if path.name.isdigit())


class Checkpoints:
    """The checkpoints that a run writes; it must hold the lock of its folder.

    The ``keep_last`` newest and the ``keep_best`` lowest losses stay, and the step ``keep_step``.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        keep_last: int,
        keep_best: int,
        *,
        keep_step: int | None = None,
    ) -> None:
        _silence_orbax()
        self._directory = directory.absolute()
        self._keep_last, self._keep_best, self._keep_step = keep_last, keep_best, keep_step
        self._damaged: list[int] = []
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._saving: Future | None = None
        self._directory.mkdir(parents=True, exist_ok=True)
        self._remove_remains()  # of a run that was killed
        self._losses: dict[int, float] = {}
        for step in self.steps:
            with contextlib.suppress(Exception):  # damage is for restore to tell of
                self._losses[step] = ocp.metadata(self._path(step)).custom_metadata["loss"]

    @property
    def steps(self) -> list[int]:
        """Every step that is there, oldest first."""
        return saved_steps(self._directory)

    def _path(self, step: int) -> pathlib.Path:
        return self._directory / str(step)

    def restore(self, template: Any, step: int | None = None) -> Restored | None:
        """As the function ``restore``; the next save takes damaged steps out of the way."""
        restored, self._damaged = _restore(self._directory, template, step)
        return restored

    def save(self, step: int, state: Any, loss: float) -> None:
        """Save host arrays in the background; ``loss`` ranks the checkpoint.

        Raises:
            SaveError: the save before this one failed.
        """
        self.wait()
        self._set_damaged_aside()
        arrays = flatten(state)
        sum_ = digest(arrays)
        options = ocp.Context()
        # it takes time from the training, and weights get only 8 % smaller
        options.array.saving.use_compression = False
        with _as_save_error(step), options:
            # begun here, as several processes must begin in the same order as their other work
            response = ocp.save_async(
                self._path(step),
                arrays,
                custom_metadata={"digest": sum_, "loss": loss},
                overwrite=True,  # nothing is there
            )
        self._losses[step] = loss
        self._saving = self._thread.submit(self._finish, response.result, step, arrays, sum_)

    def _finish(self, wait: Callable[[], None], step: int, arrays: Arrays, sum_: str) -> None:
        """Wait for the save, confirm it, and only then remove what it makes superfluous."""
        with _as_save_error(step):
            try:
                wait()
            except Exception:
                self._remove_remains()  # at once: they may be what fills the disk
                raise
            if jax.process_index() != 0:
                return
            saved = ocp.metadata(self._path(step))
            if saved.custom_metadata["digest"] != sum_:
                raise ValueError("its record is not the one that was written")
            _require_same_arrays(saved.metadata or {}, arrays)
        for other in self._superfluous():
            _remove(self._path(other))

    def _remove_remains(self) -> None:
        """Remove what is no checkpoint: steps half written, or half removed."""
        for pattern in (UNFINISHED, f"*{REMOVED}") if jax.process_index() == 0 else ():
            for path in self._directory.glob(pattern):
                _remove(path)

    def _superfluous(self) -> list[int]:
        steps = self.steps
        lowest = sorted(steps, key=lambda step: self._losses.get(step, math.inf))
        kept = {*steps[-self._keep_last :], *lowest[: self._keep_best], self._keep_step}
        return [step for step in steps if step not in kept]

    def _set_damaged_aside(self) -> None:
        """Rename what could not be read: it counts no more, and is there for whoever wants it."""
        damaged, self._damaged = self._damaged, []
        for step in damaged if jax.process_index() == 0 else ():
            aside = self._path(step).with_name(f"{step}{DAMAGED}")
            _remove(aside)
            self._path(step).rename(aside)

    def wait(self) -> None:
        """Wait for what is being saved.

        Raises:
            SaveError: it could not be written or not be read back; older steps stay.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def close(self) -> None:
        """Wait for what is being saved, then let go.

        Raises:
            SaveError: see ``wait``.
        """
        try:
            self.wait()
        finally:
            self._thread.shutdown()


def _remove(path: pathlib.Path) -> None:
    """Remove the folder of a step, if it is there; one that cannot be removed is in nobody's way.

    It has another name at once, for half a step would look damaged.
    """
    removed = path.with_name(f"{path.name.removesuffix(REMOVED)}{REMOVED}")
    try:
        if path.exists():
            path.rename(removed)
            shutil.rmtree(removed)
    except OSError as error:
        LOG.warning("%s could not be removed: %s", path, error)


@contextlib.contextmanager
def _as_save_error(step: int) -> Iterator[None]:
    """Orbax and tensorstore fail in many ways: as one line of ours, whatever it was."""
    try:
        yield
    except Exception as error:
        raise SaveError(
            f"checkpoint {step} could not be saved, those before it stay: {_reason(error)}"
        ) from error


def _reason(error: Exception) -> str:
    """The first line of an error, shortened: tensorstore tells all that it was doing."""
    text = f"{type(error).__name__}: {error}".splitlines()[0].partition(" [tensorstore_spec=")[0]
    return text if len(text) < 300 else f"{text[:100]} ... {text[-150:]}"


@functools.cache  # once
def _silence_orbax() -> None:
    """Drop what orbax and tensorstore print: of a failure many tracebacks, beside raising it.

    When the first array fails orbax ends its event loop, and the tasks of the other arrays in it.
    """
    absl, asyncio = logging.getLogger("absl"), logging.getLogger("asyncio")
    absl.addFilter(lambda record: "/orbax/checkpoint/" not in record.pathname)
    asyncio.addFilter(lambda record: "exception was never retrieved" not in record.getMessage())
    show = sys.unraisablehook

    def show_others(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            show(unraisable)

    sys.unraisablehook = show_others


def restore(directory: pathlib.Path, template: Any, step: int | None = None) -> Restored | None:
    """The newest intact state in the structure of ``template``; None if nothing was saved.

    With ``step`` it is that of this step or none. Nothing in the folder changes, and a run may be
    writing there.

    Raises:
        NoIntactCheckpointError: every checkpoint is damaged.
        OtherModelError: an intact checkpoint of another structure.
    """
    return _restore(directory, template, step)[0]


def _restore(
    directory: pathlib.Path, template: Any, step: int | None
) -> tuple[Restored | None, list[int]]:
    """The state, and the newer steps that are damaged."""
    _silence_orbax()
    damaged: list[int] = []
    while True:
        steps = [s for s in saved_steps(directory) if step in (None, s)]
        newest = value_of_first(max((s for s in steps if s not in damaged), default=-1))
        if newest < 0:
            break
        reason = ""
        try:
            arrays = load(directory, newest)
        except Exception as error:  # damage shows as any exception of orbax or tensorstore
            reason = _reason(error)
        if not any_is(bool(reason)):
            return Restored(newest, _unflatten(arrays, template)), damaged
        # a live run removes a step when it has a newer one
        if any_is(newest in saved_steps(directory)):
            reason = reason or "in another process"
            LOG.warning("checkpoint %d is damaged (%s), trying an older one", newest, reason)
            damaged.append(newest)
    if steps:
        raise NoIntactCheckpointError(f"none of the checkpoints {steps} is intact")
    return None, damaged


def load(directory: pathlib.Path, step: int) -> Arrays:
    """The arrays of one step, by their paths.

    Raises:
        Exception: the step is damaged; which one depends on where.
    """
    path = directory.absolute() / str(step)
    saved = ocp.metadata(path)
    abstract = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), saved.metadata)
    arrays = ocp.load(path, abstract)
    if digest(arrays) != saved.custom_metadata["digest"]:
        raise ValueError("its contents do not have the digest they were saved with")
    return arrays


def _unflatten(arrays: Arrays, template: Any) -> Any:
    expected = _by_path(template)
    fields = {name.partition("/")[0] for name in expected}  # others may be left out as a whole
    _require_same_arrays(
        {name: array for name, array in arrays.items() if name.partition("/")[0] in fields},
        expected,
    )
    return jax.tree.unflatten(jax.tree.structure(template), [arrays[name] for name in expected])


def _require_same_arrays(saved: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Compare names, types and shapes."""
    for name in sorted(expected.keys() | saved.keys()):
        there, wanted = (
            f"{tree[name].dtype}{list(tree[name].shape)}" if name in tree else "nothing"
            for tree in (saved, expected)
        )
        if there != wanted:
            raise OtherModelError(f"checkpoint has {there} for {name}, the model has {wanted}")


def restore_average(
    template: PyTree, path: pathlib.Path, step: int | None, *, field: str = "step"
) -> tuple[PyTree, int]:
    """The averaged parameters of the run in ``path`` and their step; None: the newest.

    ``template`` has their structure and shapes, ``field`` is what messages call the step.

    Raises:
        WorkdirError: there is no checkpoint.
        ConfigError: there is none of this step.
        NoIntactCheckpointError: every checkpoint is damaged.
        OtherModelError: it is of another model.
    """
    directory = path / "checkpoints"
    restored = restore(directory, {"ema": template}, step)
    if restored is None:
        if step is None:
            raise WorkdirError(path, "has no checkpoint yet")
        steps = saved_steps(directory)
        raise ConfigError(f"{field} = {step}: must be a checkpoint of {path}, which has {steps}")
    return restored.state["ema"], restored.step
