"""Checkpoints: saved in the background by orbax, and verified when they are saved and restored.

After a save, its metadata and its list of arrays are read back before older steps are removed.
Orbax restores flipped bits without an error, so a SHA-256 digest of the state is saved with it and
compared at restore. If a step is damaged, the newest intact step is restored. Restoring never
changes the folder, because a live run may be writing to it.

Orbax numbers its saves and loads, and processes wait for each other in each of them. So all
processes must save and load the same steps in the same order, from their main threads.
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

UNFINISHED = "*.orbax-checkpoint-tmp*"  # folders of steps that orbax is writing
REMOVED = ".removed"  # suffix of a step's folder while it is removed
DAMAGED = ".damaged"  # suffix of a damaged step, once a run has continued from an older one


class SaveError(RunError):
    """A checkpoint could not be written or read back."""


class NoIntactCheckpointError(RunError):
    """There are checkpoints, but every one is damaged."""


class OtherModelError(RunError):
    """An intact checkpoint has other arrays than the model."""


class Restored(NamedTuple):
    """A pytree of numpy arrays, and the step at which it was saved."""

    step: int
    state: Any


def flatten(state: Any) -> Arrays:
    """A pytree as a dict from paths ("params/stem/kernel") to arrays."""
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
        total.update(array.reshape(-1).view(np.uint8).data)  # a view, not a copy
    return total.hexdigest()


def saved_steps(directory: pathlib.Path) -> list[int]:
    """The steps that have a checkpoint, intact or not, oldest first."""
    return sorted(int(path.name) for path in directory.glob("*") if path.name.isdigit())


class Checkpoints:
    """The checkpoints of a run, which must hold the lock of its folder.

    The ``keep_last`` newest steps stay, the ``keep_best`` with the lowest losses and ``keep_step``.
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
        self._remove_remains()  # left by a killed run
        self._losses: dict[int, float] = {}
        for step in self.steps:
            with contextlib.suppress(Exception):  # restore reports damaged steps
                self._losses[step] = ocp.metadata(self._path(step)).custom_metadata["loss"]

    @property
    def steps(self) -> list[int]:
        """The steps that have a checkpoint, oldest first."""
        return saved_steps(self._directory)

    def _path(self, step: int) -> pathlib.Path:
        return self._directory / str(step)

    def restore(self, template: Any, step: int | None = None) -> Restored | None:
        """As the function ``restore``; the next save renames the damaged steps."""
        restored, self._damaged = _restore(self._directory, template, step)
        return restored

    def save(self, step: int, state: Any, loss: float) -> None:
        """Save host arrays in the background; ``loss`` ranks the checkpoint.

        Raises:
            SaveError: the save before this one failed, or this one could not start.
        """
        self.wait()
        self._set_damaged_aside()
        arrays = flatten(state)
        sum_ = digest(arrays)
        options = ocp.Context()
        # compression slows the training down, and saves only 8 % of the disk space
        options.array.saving.use_compression = False
        with _as_save_error(step), options:
            # In the main thread, so that all processes start their saves in the same order.
            response = ocp.save_async(
                self._path(step),
                arrays,
                custom_metadata={"digest": sum_, "loss": loss},
                overwrite=True,  # the path is free: a damaged step has been renamed
            )
        self._losses[step] = loss
        self._saving = self._thread.submit(self._finish, response.result, step, arrays, sum_)

    def _finish(self, wait: Callable[[], None], step: int, arrays: Arrays, sum_: str) -> None:
        """Wait for the save and read it back; only then remove older steps."""
        with _as_save_error(step):
            try:
                wait()
            except Exception:
                self._remove_remains()  # now, because they may fill the disk
                raise
            if jax.process_index() != 0:
                return
            saved = ocp.metadata(self._path(step))
            if saved.custom_metadata["digest"] != sum_:
                raise ValueError("the saved metadata are not those that were written")
            _require_same_arrays(saved.metadata or {}, arrays)
        for other in self._superfluous():
            _remove(self._path(other))

    def _remove_remains(self) -> None:
        """Remove the folders of steps that are partly written or partly removed."""
        for pattern in (UNFINISHED, f"*{REMOVED}") if jax.process_index() == 0 else ():
            for path in self._directory.glob(pattern):
                _remove(path)

    def _superfluous(self) -> list[int]:
        steps = self.steps
        lowest = sorted(steps, key=lambda step: self._losses.get(step, math.inf))
        lasting = {*steps[-self._keep_last :], *lowest[: self._keep_best], self._keep_step}
        return [step for step in steps if step not in lasting]

    def _set_damaged_aside(self) -> None:
        """Rename damaged steps, so that they no longer count but the user can inspect them."""
        damaged, self._damaged = self._damaged, []
        for step in damaged if jax.process_index() == 0 else ():
            aside = self._path(step).with_name(f"{step}{DAMAGED}")
            _remove(aside)
            self._path(step).rename(aside)

    def wait(self) -> None:
        """Wait for the save in progress, if there is one.

        Raises:
            SaveError: it could not be written or read back; older steps stay.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def close(self) -> None:
        """Wait for the save in progress, then end the background thread.

        Raises:
            SaveError: see ``wait``.
        """
        try:
            self.wait()
        finally:
            self._thread.shutdown()


def _remove(path: pathlib.Path) -> None:
    """Remove the folder of a step, if it exists; a failure is only logged.

    It is renamed first, because a partly removed step would look damaged.
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
    """Turn any exception of orbax or tensorstore, which raise many types, into a SaveError."""
    try:
        yield
    except Exception as error:
        raise SaveError(
            f"checkpoint {step} could not be saved, earlier checkpoints stay: {_reason(error)}"
        ) from error


def _reason(error: Exception) -> str:
    """The first line of an error, shortened, because tensorstore appends its whole spec."""
    text = f"{type(error).__name__}: {error}".splitlines()[0].partition(" [tensorstore_spec=")[0]
    return text if len(text) < 300 else f"{text[:100]} ... {text[-150:]}"


@functools.cache  # so that the filters are added only once
def _silence_orbax() -> None:
    """Silence orbax and asyncio, which log many tracebacks of a failure that they also raise.

    When one array fails, orbax closes its event loop, and the tasks of the other arrays fail too.
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
    """Restore the newest intact state, or that of ``step``; None if there is no checkpoint.

    The result has the structure of ``template``. The folder does not change, so that a live run may
    write to it meanwhile.

    Raises:
        NoIntactCheckpointError: every checkpoint (with ``step``, that one) is damaged.
        OtherModelError: an intact checkpoint has other arrays than ``template``.
    """
    return _restore(directory, template, step)[0]


def _restore(
    directory: pathlib.Path, template: Any, step: int | None
) -> tuple[Restored | None, list[int]]:
    """The restored state, and the newer steps, which are damaged."""
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
        except Exception as error:  # orbax and tensorstore raise many types for damage
            reason = _reason(error)
        if not any_is(bool(reason)):
            return Restored(newest, _unflatten(arrays, template)), damaged
        # A live run may have removed the step meanwhile, because it has a newer one.
        if any_is(newest in saved_steps(directory)):
            reason = reason or "in another process"
            LOG.warning("checkpoint %d is damaged (%s), trying an older one", newest, reason)
            damaged.append(newest)
    if steps:
        raise NoIntactCheckpointError(f"none of the checkpoints {steps} is intact")
    return None, damaged


def load(directory: pathlib.Path, step: int) -> Arrays:
    """Load the arrays of one step, as a dict from paths to arrays.

    Raises:
        Exception: the step is damaged; the type depends on where the damage is.
    """
    path = directory.absolute() / str(step)
    saved = ocp.metadata(path)
    abstract = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), saved.metadata)
    arrays = ocp.load(path, abstract)
    if digest(arrays) != saved.custom_metadata["digest"]:
        raise ValueError("its arrays do not match the saved digest")
    return arrays


def _unflatten(arrays: Arrays, template: Any) -> Any:
    expected = _by_path(template)
    fields = {name.partition("/")[0] for name in expected}  # template may omit whole fields
    _require_same_arrays(
        {name: array for name, array in arrays.items() if name.partition("/")[0] in fields},
        expected,
    )
    return jax.tree.unflatten(jax.tree.structure(template), [arrays[name] for name in expected])


def _require_same_arrays(saved: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Compare the names, dtypes and shapes of arrays.

    Raises:
        OtherModelError: they differ.
    """
    for name in sorted(expected.keys() | saved.keys()):
        saved_type, expected_type = (
            f"{tree[name].dtype}{list(tree[name].shape)}" if name in tree else "nothing"
            for tree in (saved, expected)
        )
        if saved_type != expected_type:
            raise OtherModelError(
                f"checkpoint has {saved_type} for {name}, the model has {expected_type}"
            )


def restore_average(
    template: PyTree, path: pathlib.Path, step: int | None, *, field: str = "step"
) -> tuple[PyTree, int]:
    """Restore the averaged (EMA) parameters of the run in ``path``; returns them and their step.

    ``step`` None is the newest intact step. ``template`` has the structure and shapes of the
    parameters. Error messages call the step by the name ``field``.

    Raises:
        WorkdirError: the run has no checkpoint.
        ConfigError: the run has no checkpoint of this step.
        NoIntactCheckpointError: every checkpoint (with ``step``, that one) is damaged.
        OtherModelError: the checkpoint is of another model.
    """
    directory = path / "checkpoints"
    restored = restore(directory, {"ema": template}, step)
    if restored is None:
        if step is None:
            raise WorkdirError(path, "has no checkpoint yet")
        steps = saved_steps(directory)
        raise ConfigError(f"{field} = {step}: must be a checkpoint of {path}, which has {steps}")
    return restored.state["ema"], restored.step
