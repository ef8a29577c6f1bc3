"""What jax compiles: a terminal shows it while it goes on, and the log has a line with its seconds.

Compiled programs, and what XLA:GPU finds out by timing kernels, are kept on disk.
"""

import functools
import logging
import pathlib
import threading
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax
from jax.experimental.compilation_cache import compilation_cache
from tqdm import tqdm

LOG = logging.getLogger("diffusion_jax")

# jax's events. It tells their durations at their ends; compilation begins where lowering ends.
LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"
COMPILED = "/jax/core/compile/backend_compile_duration"
FROM_CACHE = "/jax/compilation_cache/cache_hits"
AUTOTUNING = "xla_gpu_per_fusion_autotune_cache_dir"
LONG = 1.0  # seconds of a compilation that the log tells

P = ParamSpec("P")
R = TypeVar("R")


def named(program: str, function: Callable[P, R]) -> Callable[P, R]:
    """A compiled function whose compilations are shown under a name, such as "the training step".

    It compiles at its first call, and again at calls with other shapes.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with _Display(program):
            return function(*args, **kwargs)

    return call


class _Display:
    """Shows the compilations of this thread while it is open."""

    _open = threading.local()  # .display: the one of this thread

    def __init__(self, program: str) -> None:
        self._program = program
        self._is_from_cache = False
        self._ended = threading.Event()  # of the compilation that goes on
        self._thread: threading.Thread | None = None  # that shows it

    def __enter__(self) -> None:
        _listen()
        self._open.display = self

    def __exit__(self, *_: object) -> None:
        self._open.display = None
        self._stop()  # a compilation that failed has told no end

    @classmethod
    def of_this_thread(cls) -> "_Display | None":
        return getattr(cls._open, "display", None)

    def begin(self) -> None:
        self._stop()
        self._is_from_cache = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._show, args=(self._ended,), daemon=True)
        self._thread.start()

    def end(self, seconds: float) -> None:
        self._stop()
        if seconds > LONG:
            verb = "read from the cache" if self._is_from_cache else "compiled"
            LOG.info("%s: %s in %.1f s", self._program, verb, seconds)

    def found_in_cache(self) -> None:
        self._is_from_cache = True

    def _stop(self) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()  # so that the terminal's line is gone before the next one
            self._thread = None

    def _show(self, ended: threading.Event) -> None:
        """A line of the terminal with the seconds so far; nothing where there is no terminal."""
        if ended.wait(LONG):
            return
        form = "{desc}: {elapsed}"
        with tqdm(
            desc=f"compiling {self._program}", bar_format=form, disable=None, leave=False
        ) as bar:
            bar.start_t = time.time() - LONG
            while not ended.wait(0.5):
                bar.refresh()


@functools.cache  # jax keeps listeners for ever
def _listen() -> None:
    def on_duration(event: str, duration_secs: float, **_: object) -> None:
        display = _Display.of_this_thread()
        if display is not None and event == LOWERED:
            display.begin()
        elif display is not None and event == COMPILED:
            display.end(duration_secs)

    def on_event(event: str, **_: object) -> None:
        display = _Display.of_this_thread()
        if display is not None and event == FROM_CACHE:
            display.found_in_cache()

    jax.monitoring.register_event_duration_secs_listener(on_duration)
    jax.monitoring.register_event_listener(on_event)


def start_cache(folder: str | None) -> None:
    """Save compiled programs in a folder, so that later starts are fast; "off" saves none."""
    if folder == "off":
        return
    try:
        folder = folder or str(pathlib.Path("~/.cache/diffusion_jax").expanduser())
    except RuntimeError as error:
        LOG.warning("config.compilation_cache = None: no compiled program is kept: %s", error)
        return
    jax.config.update("jax_compilation_cache_dir", folder)
    # on a GPU also what XLA finds out by timing kernels
    jax.config.update("jax_persistent_cache_enable_xla_caches", AUTOTUNING)
    # Save small programs too: a start compiles dozens of them, which takes two seconds.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()  # jax reads the folder only at its first compilation
