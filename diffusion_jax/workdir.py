"""A run's folder: one run at a time in it, and its record of what it was started with."""

import fcntl
import json
import os
import pathlib

from ml_collections import ConfigDict

from diffusion_jax import config as configuration
from diffusion_jax.config import ConfigError

# What a checkpoint depends on. The rest of a config may differ when a run goes on.
OF_THE_MODEL = ("dataset.name", "schedule", "model", "loss.prediction", "loss.variance")
OF_THE_TRAINING = (
    *OF_THE_MODEL,
    "seed",
    "dataset.flip",
    "loss",
    "optimizer",
    "ema",
    "train.batch_size",
)


class Workdir:
    """The folder of one run, held by a lock that dies with the process."""

    def __init__(self, path: str | pathlib.Path) -> None:
        self.path = pathlib.Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.samples = self.path / "samples"
        self.arms = self.path / "arms"  # of an ablation
        self._record = self.path / "config.json"
        self._locks = []

    def check(self, config: ConfigDict, fixed: tuple[str, ...]) -> bool:
        """Whether a run is there already; it must agree with ``config`` in the ``fixed`` fields.

        Raises:
            ConfigError: the path is a file, or holds an ablation, or the run there has another
                value in a fixed field.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"--workdir={self.path}: is a file")
        if self.arms.exists():
            raise ConfigError(
                f"--workdir={self.path}: holds an ablation; its runs are the folders in {self.arms}"
            )
        if not self._record.exists():
            return False
        try:
            recorded = json.loads(self._record.read_text())
        except ValueError as error:
            raise ConfigError(f"--workdir={self.path}: config.json is damaged: {error}") from error
        for field, (before, now) in configuration.differences(config, recorded).items():
            if field.startswith(tuple(f"config.{name}" for name in fixed)):
                raise ConfigError(
                    f"{field} = {now!r}: the run in {self.path} has {before!r}; "
                    "use that value or another --workdir"
                )
        return True

    def lock(self, shard: str | None = None) -> None:
        """Create the folder and hold it until this process ends, kill -9 included.

        A ``shard`` of an ablation, "1/3", bears with the others, and not with itself.

        Raises:
            ConfigError: another run holds it, or it cannot be written.
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
            raise ConfigError(f"--workdir={self.path}: {error.strerror}") from error
        try:
            for file, kind in zip(self._locks, kinds.values()):
                fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"--workdir={self.path}: in use by another run") from None

    def record(self, config: ConfigDict) -> None:
        """Write config.json, whole or not at all."""
        temporary = self._record.with_suffix(".tmp")
        temporary.write_text(configuration.to_json(config))
        os.replace(temporary, self._record)
