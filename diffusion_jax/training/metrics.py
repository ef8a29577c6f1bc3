"""What a run reports while it trains: metrics.jsonl, TensorBoard, a progress bar."""

import json
import logging
import math
import sys
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from tensorboardX import SummaryWriter
from tqdm import tqdm

from diffusion_jax.errors import RunError
from diffusion_jax.runtime import files

LOG = logging.getLogger("diffusion_jax")


# A kill loses at most this much of TensorBoard's view; metrics.jsonl loses nothing.
TENSORBOARD_FLUSH_SECONDS = 5


class MetricsWriter:
    """Appends scalars to workdir/metrics.jsonl and to workdir/tensorboard.

    A run that resumes at `resume_step` reports every later step again, so older records of those
    steps are dropped: the file ends up like that of a run that was never killed.

    Args:
        workdir: the folder of the run.
        resume_step: the step of the restored checkpoint; 0 for a fresh start.

    Raises:
        DamagedRecordError: a line of metrics.jsonl, other than a partial last one, is no record.
    """

    def __init__(self, workdir: str | Path, resume_step: int = 0) -> None:
        path = Path(workdir) / "metrics.jsonl"
        if path.exists():
            _drop_after(path, resume_step)
        self._file = path.open("a", encoding="utf-8")
        # purge_step makes TensorBoard ignore earlier events from that step on. The name of an event
        # file has the second in which it starts, and a file of the same name is overwritten. The
        # suffix prevents that, except for a start at the same step, whose events are all purged.
        self._tensorboard = SummaryWriter(
            logdir=str(Path(workdir) / "tensorboard"),
            purge_step=resume_step + 1,
            flush_secs=TENSORBOARD_FLUSH_SECONDS,
            filename_suffix=f".{resume_step}",
        )

    def write(self, step: int, **scalars: float | int) -> None:
        """Report the scalars of one step; the record is in the file when this returns."""
        record = {name: float(value) for name, value in scalars.items()}
        for name, value in record.items():
            self._tensorboard.add_scalar(name, value, step)
        # JSON has no NaN or infinity (RFC 8259): with null every parser can read the file.
        finite = {name: v if math.isfinite(v) else None for name, v in record.items()}
        # One write per record, so that a kill cuts at most the last line.
        self._file.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
        self._file.flush()

    def write_image(self, step: int, name: str, image: UInt8[np.ndarray, "h w c"]) -> None:
        """Show a picture in TensorBoard."""
        self._tensorboard.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        """Finish both files."""
        self._file.close()
        self._tensorboard.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class DamagedRecordError(RunError):
    """A line in the middle of metrics.jsonl is not a record."""


def _drop_after(path: Path, resume_step: int) -> None:
    content = path.read_bytes()
    lines = content.split(b"\n")
    remaining = []
    for number, line in enumerate(lines, start=1):
        try:
            step = json.loads(line)["step"]
            keep = step <= resume_step
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):
                break  # it has no newline: a record that a kill cut off, or the end of the file
            raise DamagedRecordError(
                f"{path}, line {number}: not a record with a step: {line[:80]!r}"
            ) from error
        if keep:
            remaining.append(line + b"\n")
    if b"".join(remaining) == content:
        return
    # The whole file is replaced at once, so that a kill at this moment does not lose the history.
    with files.replace(path) as file:
        file.writelines(remaining)


class Progress:
    """A progress bar on a terminal; elsewhere (a log file, a batch queue) lines of text.

    Args:
        num_steps: the step at which the run ends.
        resume_step: the step at which it starts.
        name: of the run, if several runs train at the same time.
    """

    def __init__(self, num_steps: int, resume_step: int = 0, name: str = "") -> None:
        self._num_steps = num_steps
        self._prefix = f"{name}: " if name else ""
        # disable=None: silent where the stream is not a terminal.
        self._bar = tqdm(
            total=num_steps,
            initial=resume_step,
            disable=None,
            file=sys.stderr,
            unit="step",
            desc=name or None,
            dynamic_ncols=True,
        )

    def advance(self, step: int) -> None:
        """Move the bar to a step."""
        self._bar.update(step - self._bar.n)

    def report(self, step: int, loss: float, images_per_second: float) -> None:
        """Show the loss and the speed of the last logging interval."""
        if self._bar.disable:
            LOG.info(
                "%sstep %d/%d loss %.4f %.0f images/s",
                self._prefix,
                step,
                self._num_steps,
                loss,
                images_per_second,
            )
        else:
            self._bar.set_postfix_str(f"loss {loss:.4f}, {images_per_second:.0f} images/s")

    def close(self) -> None:
        """Leave the bar as it stands and end its line."""
        self._bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
