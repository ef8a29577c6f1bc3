"""A run's folder: one run at a time in it, and its record of what it was started with."""

import contextlib
import fcntl
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from diffusion_jax.errors import WorkdirError
from diffusion_jax.runtime import files, numerics

OPTIONS = "jax"  # the part of config.json that is no part of the config
PATTERNS = "*?[\\"  # orbax takes the path of a checkpoint for a pattern if it has one of these


class Workdir:
    """The folder of one run, held by a lock that dies with the process.

    Raises:
        WorkdirError: a path whose checkpoints could not be read back.
    """

    def __init__(self, path: str | pathlib.Path) -> None:
        self.path = pathlib.Path(path)
        unfit = [character for character in PATTERNS if character in str(self.path.absolute())]
        if unfit:
            reason = f"must have no {' '.join(unfit)} in its path, {self.path.absolute()}"
            raise WorkdirError(path, f"{reason}: its checkpoints could not be read back")
        self.checkpoints = self.path / "checkpoints"
        self.samples = self.path / "samples"
        self.arms = self.path / "arms"  # of an ablation
        self._record = self.path / "config.json"

    def read_record(self) -> dict[str, Any] | None:
        """The config of the run that is there; None if there is none.

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
            record = json.loads(self._record.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise WorkdirError(self.path, f"config.json is damaged: {error}") from error
        if not isinstance(record, dict):
            raise WorkdirError(self.path, "config.json is damaged: it holds no sections")
        options = record.get(OPTIONS, numerics.FIXED)  # an older record has none
        if options != numerics.FIXED:
            reason = f"is of a run under other options of jax, {options}, not {numerics.FIXED}"
            raise WorkdirError(self.path, reason)
        return {name: value for name, value in record.items() if name != OPTIONS}

    @contextlib.contextmanager
    def lock(self, shard: str | None = None) -> Iterator[None]:
        """Create the folder and hold it to the end of the block, or of the process by kill -9.

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
        with contextlib.ExitStack() as held:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                for path, kind in kinds.items():
                    fcntl.flock(held.enter_context(path.open("w")), kind | fcntl.LOCK_NB)
            except BlockingIOError:
                raise WorkdirError(self.path, "in use by another run") from None
            except OSError as error:
                raise WorkdirError(self.path, str(error.strerror)) from error
            yield

    def require_record(self, record: Mapping[str, Any] | None) -> None:
        """Refuse a folder whose record is no longer the one that a run was checked against.

        Raises:
            WorkdirError: another run has written it between the check and the lock.
        """
        if self.read_record() != record:
            raise WorkdirError(self.path, "another run has just been here; start again")

    def keep_traceback(self, text: str) -> str:
        """Write error.log, if the folder is there; returns the end of a message that says so."""
        path = self.path / "error.log"
        try:
            files.replace_text(path, text)
        except OSError:  # no folder yet, or the disk itself is what failed
            return ""
        return f" (see {path})"

    def record(self, config: Mapping[str, Any]) -> None:
        """Write config.json: the config, and the options of jax that results depend on."""
        record = {**config, OPTIONS: numerics.FIXED}
        files.replace_text(self._record, json.dumps(record, indent=2, allow_nan=False) + "\n")
