"""A run's folder: one run at a time in it, and its record of what it was started with."""

import fcntl
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from diffusion_jax.errors import WorkdirError
from diffusion_jax.runtime import files


class Workdir:
    """The folder of one run, held by a lock that dies with the process."""

    def __init__(self, path: str | pathlib.Path) -> None:
        self.path = pathlib.Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.samples = self.path / "samples"
        self.arms = self.path / "arms"  # of an ablation
        self._record = self.path / "config.json"
        self._locks = []

    def read_record(self) -> dict[str, Any] | None:
        """The config of the run that is there; None if none is.

        Raises:
            WorkdirError: the path is a file, or holds an ablation, or its record is damaged.
        """
        if self.path.exists() and not self.path.is_dir():
            raise WorkdirError(self.path, "is a file")
        if self.arms.exists():
            raise WorkdirError(
                self.path, f"holds an ablation; its runs are the folders in {self.arms}"
            )
        if not self._record.exists():
            return None
        try:
            return json.loads(self._record.read_text())
        except ValueError as error:
            raise WorkdirError(self.path, f"config.json is damaged: {error}") from error

    def lock(self, shard: str | None = None) -> None:
        """Create the folder and hold it until this process ends, kill -9 included.

        Different shards of an ablation ("1/3") may work in the folder at once; the same shard
        twice is refused.

        Raises:
            WorkdirError: another run holds it, or it cannot be written.
        """
        whole = self.path / ".lock"
        kinds = {whole: fcntl.LOCK_EX}
        if shard is not None:
            kinds = {
                whole: fcntl.LOCK_SH,
                whole.with_suffix("." + shard.replace("/", "_")): fcntl.LOCK_EX,
            }
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._locks = [open(path, "w") for path in kinds]  # noqa: SIM115 (held while it lives)
        except OSError as error:
            raise WorkdirError(self.path, str(error.strerror)) from error
        try:
            for file, kind in zip(self._locks, kinds.values()):
                fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            raise WorkdirError(self.path, "in use by another run") from None

    def record(self, config: Mapping[str, Any]) -> None:
        """Write config.json."""
        files.replace_text(self._record, json.dumps(config, indent=2, allow_nan=False) + "\n")
