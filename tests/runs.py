"""Run main.py in child processes, forked from a server that has done the imports."""

import atexit
import functools
import multiprocessing
import os
import pathlib
import resource
import signal
import sys
import time
from multiprocessing import forkserver
from typing import NamedTuple
from unittest import mock

import conftest
import numpy as np

from diffusion_jax.runtime.checkpoint import Arrays, load, saved_steps

REPOSITORY = pathlib.Path(__file__).parent.parent
TIMEOUT = 300  # seconds for one run; on an idle machine no run takes a tenth of it

# Imports take seconds of every start, so the fork server does them once. In all else a forked child
# is like a new process. The list includes modules that the package imports inside functions.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "diffusion_jax.commands",
        "diffusion_jax.ablation.ablate",
        "diffusion_jax.data.sources.builder",
        "grain",
        "jax.experimental.multihost_utils",
        "matplotlib.figure",
        "matplotlib.backends.backend_agg",
        "sklearn.datasets",
        "runs",
    ]
)

TOY2D = {
    "dataset.name": "toy2d",
    "model.width": 16,
    "model.num_layers": 1,
    "schedule.num_timesteps": 10,
    "optimizer.warmup_steps": 5,
    "optimizer.decay": "constant",
    "train.num_steps": 40,
    "train.batch_size": 16,
    "train.log_every_steps": 10,
    "train.sample_every_steps": 0,
    "checkpoint.every_steps": 10,
    "sampling.num_images": 4,
    "sampling.batch_size": 4,
    "sampling.num_frames": 0,
}
DIGITS = {
    **TOY2D,
    "dataset.name": "digits",
    "model.width": 8,
    "model.channel_multipliers": (1,),  # compiles fast; test_models has deeper networks
    "model.num_blocks": 1,
    "model.attention_resolutions": (),
    "model.head_channels": 8,
}
del DIGITS["model.num_layers"]


def arguments(
    workdir: pathlib.Path | str, fields: dict, config: str = "toy2d", mode: str = "train"
) -> list[str]:
    """The command line of main.py; ``fields`` maps fields of the config to their values."""
    words = [f"--config={REPOSITORY}/configs/{config}.py", f"--workdir={workdir}", f"--mode={mode}"]
    fields = {"compilation_cache": conftest.CACHE, **fields}
    return words + [f"--config.{field}={value}" for field, value in fields.items()]


class Result(NamedTuple):
    """The exit status and the output of a run."""

    code: int  # minus the number of a signal if that signal killed the run
    stdout: str
    stderr: str


class Run:
    """A running main.py; its standard output and error go to ``log``.out and ``log``.err."""

    def __init__(self, words: list[str], log: pathlib.Path, **environment: str) -> None:
        _start_server()
        self._files = log.with_suffix(".out"), log.with_suffix(".err")
        self._process = FORKS.Process(target=_main, args=(words, self._files, environment))
        self._process.start()
        atexit.register(self._process.kill)  # a test that fails leaves no run behind

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to the run, SIGKILL by default."""
        os.kill(self._process.pid, number)

    def limit_files(self, size: int) -> None:
        """Make every write beyond ``size`` bytes of a file fail from now on."""
        resource.prlimit(self._process.pid, resource.RLIMIT_FSIZE, (size, size))

    def is_running(self) -> bool:
        """Whether the run has not ended yet."""
        return self._process.is_alive()

    def wait(self) -> Result:
        """Wait until the run ends; kill it after TIMEOUT seconds."""
        self._process.join(TIMEOUT)
        if self._process.is_alive():
            self._process.kill()
            raise TimeoutError(self._files[1].read_text())
        return Result(self._process.exitcode, *(file.read_text() for file in self._files))

    def wait_for(self, path: pathlib.Path) -> None:
        """Wait until a file exists; fail if the run ends first."""
        deadline = time.monotonic() + TIMEOUT
        while not path.exists():
            assert self.is_running(), self.wait().stderr
            assert time.monotonic() < deadline, path
            time.sleep(0.01)


def run(words: list[str], log: pathlib.Path) -> Result:
    """Run main.py from start to end."""
    return Run(words, log).wait()


@functools.cache
def _start_server() -> None:
    """Start the fork server, with the module path on which it finds this module."""
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        forkserver.ensure_running()


def _main(words: list[str], files: tuple[pathlib.Path, ...], environment: dict[str, str]) -> None:
    for stream, file in zip((1, 2), files):
        os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), stream)
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # children of the fork server ignore it
    os.environ.update({"JAX_PLATFORMS": "cpu", **environment})
    os.chdir(os.environ["PWD"])
    sys.path.insert(0, str(REPOSITORY))
    import jax

    jax.config.update("jax_platforms", "cpu")
    import main

    sys.exit(main.main(words))


def checkpoint(workdir: pathlib.Path, step: int | None = None) -> Arrays:
    """The arrays of a run's checkpoint at ``step``, by default of the newest checkpoint."""
    directory = workdir / "checkpoints"
    return load(directory, saved_steps(directory)[-1] if step is None else step)


def assert_same(arrays: Arrays, others: Arrays) -> None:
    """Assert that two checkpoints have the same arrays, bit for bit."""
    assert arrays.keys() == others.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, others[name], err_msg=name, strict=True)
