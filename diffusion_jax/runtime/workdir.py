"""The folder of a run: its lock, and its record of the config (config.json)."""

import contextlib
import fcntl
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from diffusion_jax.errors import WorkdirError
from diffusion_jax.runtime import files, numerics

OPTIONS = "jax"  # the section of config.json with the options of jax, beside the config
PATTERNS = "*?[\\"  # orbax reads a path with one of these characters as a glob pattern


class Workdir:
    """The folder of one run or ablation.

    Raises:
        WorkdirError: the path has a character of PATTERNS, so orbax could not read checkpoints.
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
        """Read the config of the run in the folder; None if there is no run.

        Raises:
            WorkdirError: the path is a file or holds an ablation, or its record is damaged or has
                other options of jax.
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
        options = record.get(OPTIONS, numerics.FIXED)  # older records have no such section
        if options != numerics.FIXED:
            reason = f"holds a run with other options of jax: {options}, not {numerics.FIXED}"
            raise WorkdirError(self.path, reason)
        return {name: value for name, value in record.items() if name != OPTIONS}

    @contextlib.contextmanager
    def lock(self, shard: str | None = None) -> Iterator[None]:
        """Create the folder and lock it until the block ends, or the process is killed.

        Different shards of an ablation ("1/3") may work in the folder at once; the same shard
        twice is refused.

        Raises:
            WorkdirError: another run holds the lock, or the folder is not writable.
        """
        whole = self.path / ".lock"
        kinds = {whole: fcntl.LOCK_EX}
        if shard is not None:
            kinds = {
                whole: fcntl.LOCK_SH,
                whole.with_suffix("." + shard.replace("/", "_")): fcntl.LOCK_EX,
            }
        with contextlib.ExitStack() as stack:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                for path, kind in kinds.items():
                    fcntl.flock(stack.enter_context(path.open("w")), kind | fcntl.LOCK_NB)
            except BlockingIOError:
                raise WorkdirError(self.path, "in use by another run") from None
            except OSError as error:
                raise WorkdirError(self.path, str(error.strerror)) from error
            yield

    def require_record(self, record: Mapping[str, Any] | None) -> None:
        """Refuse a folder whose record has changed since the config was compared with it.

        Raises:
            WorkdirError: another run wrote the record before this one locked the folder.
        """
        if self.read_record() != record:
            raise WorkdirError(self.path, "another run has just changed config.json; start again")

    def keep_traceback(self, text: str) -> str:
        """Write error.log if the folder exists; returns the text " (see PATH)", or "" if not."""
        path = self.path / "error.log"
        try:
            files.replace_text(path, text)
        except OSError:  # there is no folder yet, or the disk is the problem
            return ""
        return f" (see {path})"

    def record(self, config: Mapping[str, Any]) -> None:
        """Write config.json: the config and the fixed options of jax."""
        record = {**config, OPTIONS: numerics.FIXED}
        files.replace_text(self._record, json.dumps(record, indent=2, allow_nan=False) + "\n")
