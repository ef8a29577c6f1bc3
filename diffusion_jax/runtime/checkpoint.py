"""Checkpoints that are asynchronous, verified and never trusted blindly.

Orbax writes and prunes them. It restores flipped bits without a word, so a digest of the state
is saved beside it and compared at restore; a damaged step falls back to the newest intact one.
"""

import contextlib
import hashlib
import logging
import math
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from diffusion_jax.errors import ConfigError, RunError, WorkdirError

LOG = logging.getLogger("diffusion_jax")

Arrays = dict[str, np.ndarray]


class NoIntactCheckpointError(RunError):
    """There are checkpoints and every one of them is damaged."""


class OtherModelError(RunError):
    """An intact checkpoint has not the arrays that the model has."""


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
    total = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        total.update(f"{name} {array.dtype} {array.shape}\n".encode())
        total.update(array.reshape(-1).view(np.uint8))  # which copies nothing
    return total.hexdigest()


class _LowestN:
    """Keeps the ``n`` steps of the lowest losses.

    Orbax's own BestN reads a file of metrics at each start, and fails if one is damaged.
    """

    def __init__(self, n: int, losses: dict[int, float]) -> None:
        self._n, self._losses = n, losses

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """For each checkpoint whether it stays (orbax's PreservationPolicy)."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        lowest = sorted(steps, key=lambda step: self._losses.get(step, math.inf))[: self._n]
        return [step in lowest for step in steps]


def saved_steps(directory: pathlib.Path) -> list[int]:
    """Every step of which a checkpoint is there, oldest first, intact or not."""
    return sorted(int(path.name) for path in directory.glob("*") if path.name.isdigit())


class Checkpoints:
    """The checkpoints of one run: the ``keep_last`` newest and the ``keep_best`` lowest losses."""

    def __init__(self, directory: pathlib.Path, keep_last: int, keep_best: int) -> None:
        self._directory = directory.absolute()
        self._losses: dict[int, float] = {}
        self._damaged: list[int] = []
        policies = ocp.training.preservation_policies
        keep = [policies.LatestN(keep_last), _LowestN(keep_best, self._losses)]
        self._checkpointer = ocp.training.Checkpointer(
            self._directory,
            preservation_policy=policies.AnyPreservationPolicy(keep),
            cleanup_tmp_directories=True,
            lightweight_initialize=True,  # reads no step's files, which fails if one is damaged
        )
        for step in self.steps:
            with contextlib.suppress(Exception):  # damage is for restore to tell of
                self._losses[step] = ocp.metadata(self._path(step)).custom_metadata["loss"]

    @property
    def steps(self) -> list[int]:
        """Every step that is there, oldest first."""
        return saved_steps(self._directory)

    def _path(self, step: int) -> pathlib.Path:
        return self._directory / str(step)

    def save(self, step: int, state: Any, loss: float) -> None:
        """Save host arrays in the background; ``loss`` ranks the checkpoint."""
        while self._damaged:  # else they would be kept, as the newest, in the place of intact ones
            ocp.delete(self._path(self._damaged.pop()), missing_ok=True)
            self._checkpointer.reload()
        arrays = flatten(state)
        self._losses[step] = loss
        options = ocp.Context()
        # it takes time from the training, and weights get only 8 % smaller
        options.array.saving.use_compression = False
        with options:
            self._checkpointer.save_async(
                step,
                arrays,
                custom_metadata={"digest": digest(arrays), "loss": loss},
                force=True,
                overwrite=True,  # nothing is there; without it orbax reads every step's files
            )

    def restore(self, template: Any, step: int | None = None) -> Restored | None:
        """The newest intact state in the structure of ``template``; None if nothing was saved.

        With ``step`` it is that of this step or none.

        Raises:
            NoIntactCheckpointError: every checkpoint is damaged.
            OtherModelError: an intact checkpoint of another structure.
        """
        steps, self._damaged = [s for s in self.steps if step in (None, s)], []
        for step in reversed(steps):
            try:
                arrays = self.load(step)
            except Exception as error:  # damage shows as any exception of orbax or tensorstore
                reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                LOG.warning("checkpoint %d is damaged (%s), trying an older one", step, reason)
                self._damaged.append(step)
                continue
            return Restored(step, _unflatten(arrays, template))
        if steps:
            raise NoIntactCheckpointError(f"none of the checkpoints {steps} is intact")
        return None

    def load(self, step: int) -> Arrays:
        """The arrays of one step, by their paths.

        Raises:
            Exception: the step is damaged; which one depends on where.
        """
        saved = ocp.metadata(self._path(step))
        abstract = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), saved.metadata)
        arrays = ocp.load(self._path(step), abstract)
        if digest(arrays) != saved.custom_metadata["digest"]:
            raise ValueError("its contents do not have the digest they were saved with")
        return arrays

    def close(self) -> None:
        """Wait for what is being saved, then let go."""
        self._checkpointer.close()


def _unflatten(arrays: Arrays, template: Any) -> Any:
    expected = _by_path(template)
    fields = {name.partition("/")[0] for name in expected}  # others may be left out as a whole
    for name in sorted(expected.keys() | {n for n in arrays if n.partition("/")[0] in fields}):
        saved, wanted = (
            f"{tree[name].dtype}{list(tree[name].shape)}" if name in tree else "nothing"
            for tree in (arrays, expected)
        )
        if saved != wanted:
            raise OtherModelError(f"checkpoint has {saved} for {name}, the model has {wanted}")
    return jax.tree.unflatten(jax.tree.structure(template), [arrays[name] for name in expected])


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
    with contextlib.closing(Checkpoints(path / "checkpoints", 1, 0)) as checkpoints:
        restored = checkpoints.restore({"ema": template}, step)
        steps = checkpoints.steps
    if restored is None:
        if step is None:
            raise WorkdirError(path, "has no checkpoint yet")
        raise ConfigError(f"{field} = {step}: must be a checkpoint of {path}, which has {steps}")
    return restored.state["ema"], restored.step
