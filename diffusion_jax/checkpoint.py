"""Checkpoints that are asynchronous, verified and never trusted blindly.

Orbax writes and prunes them. It restores flipped bits without a word, so a digest of the state
is saved beside it and compared at restore; a damaged step falls back to the newest intact one.
"""

import hashlib
import logging
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

LOG = logging.getLogger("diffusion_jax")

Arrays = dict[str, np.ndarray]


class NoIntactCheckpointError(RuntimeError):
    """There are checkpoints and every one of them is damaged."""


class Restored(NamedTuple):
    """A pytree of numpy arrays and the step at which it was saved."""

    step: int
    state: Any


def flatten(state: Any) -> Arrays:
    """A pytree as a dict from path ("params/stem/kernel") to array."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in leaves
    }


def digest(arrays: Arrays) -> str:
    """SHA-256 of every array's name, type, shape and bytes."""
    total = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        total.update(f"{name} {array.dtype} {array.shape}\n".encode())
        total.update(array.tobytes())
    return total.hexdigest()


class Checkpoints:
    """The checkpoints of one run: the ``keep_last`` newest and the ``keep_best`` lowest losses."""

    def __init__(self, directory: pathlib.Path, keep_last: int, keep_best: int) -> None:
        policies = ocp.training.preservation_policies
        keep = [policies.LatestN(keep_last)]
        if keep_best:
            lowest = policies.BestN(
                get_metric_fn=lambda metrics: metrics["loss"], reverse=True, n=keep_best
            )
            keep.append(lowest)
        self._checkpointer = ocp.training.Checkpointer(
            directory.absolute(),
            preservation_policy=policies.AnyPreservationPolicy(keep),
            cleanup_tmp_directories=True,
        )

    @property
    def steps(self) -> list[int]:
        """Every step that is there, oldest first."""
        return sorted(checkpoint.step for checkpoint in self._checkpointer.checkpoints)

    def save(self, step: int, state: Any, loss: float) -> None:
        """Save host arrays in the background; ``loss`` ranks the checkpoint."""
        arrays = flatten(state)
        self._checkpointer.save_async(
            step,
            arrays,
            metrics={"loss": loss},
            custom_metadata={"digest": digest(arrays)},
            force=True,
            overwrite=step in self.steps,  # a damaged step that the run fell behind of
        )

    def restore(self, template: Any) -> Restored | None:
        """The newest intact state in the structure of ``template``; None if nothing was saved.

        Raises:
            NoIntactCheckpointError: every checkpoint is damaged.
            ValueError: an intact checkpoint of another structure (another model).
        """
        steps = self.steps
        for step in reversed(steps):
            try:
                arrays = self._load(step)
            except Exception as error:  # damage shows as any exception of orbax or tensorstore
                reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                LOG.warning("checkpoint %d is damaged (%s), trying an older one", step, reason)
                continue
            return Restored(step, _unflatten(arrays, template))
        if steps:
            raise NoIntactCheckpointError(f"none of the checkpoints {steps} is intact")
        return None

    def _load(self, step: int) -> Arrays:
        saved = self._checkpointer.metadata(step)
        abstract = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), saved.metadata)
        arrays = self._checkpointer.load(step, abstract)
        if digest(arrays) != saved.custom_metadata["digest"]:
            raise ValueError("its contents do not have the digest they were saved with")
        return arrays

    def close(self) -> None:
        """Wait for what is being saved, then let go."""
        self._checkpointer.close()


def _unflatten(arrays: Arrays, template: Any) -> Any:
    expected = flatten(template)
    for name, array in expected.items():
        if name not in arrays or arrays[name].shape != array.shape:
            found = arrays[name].shape if name in arrays else "nothing"
            raise ValueError(f"checkpoint has {found} for {name}, the model has {array.shape}")
    return jax.tree.unflatten(jax.tree.structure(template), [arrays[name] for name in expected])
