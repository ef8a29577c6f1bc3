"""Compilations are shown on a terminal while they go on, and are one line of the log."""

import os
import pty
import subprocess
import sys
import termios
import threading

import jax
import numpy as np
import pytest
from runs import REPOSITORY

from diffusion_jax.runtime import compilation
from diffusion_jax.runtime.compilation import named


@pytest.fixture
def all_are_long(monkeypatch, caplog):
    """Every compilation counts as long, and the log is read."""
    monkeypatch.setattr(compilation, "LONG", 0.0)
    caplog.set_level("INFO", "diffusion_jax")
    return lambda: [record.getMessage().rsplit(" in ", 1)[0] for record in caplog.records]


def test_each_compilation_is_one_line_with_the_name_of_the_program(all_are_long):
    double = named("twice", jax.jit(lambda x: 2 * x))
    other = jax.jit(lambda x: 3 * x)
    assert double(np.ones(3)).tolist() == [2, 2, 2]
    double(np.ones(3))
    other(np.ones(3))
    assert all_are_long() == ["twice: compiled"]
    double(np.ones(4))
    assert all_are_long() == ["twice: compiled"] * 2


def test_a_program_from_the_cache_is_named_as_such(all_are_long, tmp_path):
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_enable_xla_caches",
    )
    before = [jax.config.values[name] for name in names]
    try:
        jax.config.update(names[2], "none")  # as a user's environment may say
        compilation.start_cache(str(tmp_path))
        assert "autotune" in jax.config.values[names[2]]  # what XLA:GPU finds out is kept too
        for _ in range(2):
            named("thrice", jax.jit(lambda x: 3 * x + 1))(np.ones(5))
            jax.clear_caches()
    finally:
        for name, value in zip(names, before):
            jax.config.update(name, value)
        compilation.compilation_cache.reset_cache()
    assert all_are_long() == ["thrice: compiled", "thrice: read from the cache"]


def test_a_failed_compilation_leaves_no_display(all_are_long, monkeypatch):
    shown = []

    def fail(*args, **kwargs):
        shown.extend(thread for thread in threading.enumerate() if "_show" in thread.name)
        raise ValueError("in the compiler")

    monkeypatch.setattr(jax._src.compiler, "backend_compile_and_load", fail)
    with pytest.raises(ValueError, match="in the compiler"):
        named("broken", jax.jit(lambda x: 5 * x))(np.ones(3))
    assert len(shown) == 1
    assert not shown[0].is_alive()
    assert compilation._Display.of_this_thread() is None


ON_CPU = {**os.environ, "JAX_PLATFORMS": "cpu"}
SLOW = """
import logging, sys, time
sys.path.insert(0, {repository!r})
import jax
from diffusion_jax.runtime import compilation
logging.basicConfig(level="INFO", format="%(message)s")
compile = jax._src.compiler.backend_compile_and_load
def slow(*args, **kwargs):
    time.sleep(2.5)
    return compile(*args, **kwargs)
jax._src.compiler.backend_compile_and_load = slow
compilation.named("the slow program", jax.jit(lambda x: x + 1))(1.0)
"""


def run_on_terminal(code):
    """What a program writes to a terminal."""
    ours, its = pty.openpty()
    termios.tcsetwinsize(its, (24, 80))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=its, stderr=its, env=ON_CPU)
    os.close(its)
    written = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # the end of a pseudo-terminal
            break
        if not part:
            break
        written += part
    assert process.wait() == 0, written.decode()
    return written.decode()


def test_a_terminal_shows_what_is_compiled_and_for_how_long():
    shown = run_on_terminal(SLOW.format(repository=str(REPOSITORY)))
    assert "compiling the slow program: 00:01" in shown
    assert "compiling the slow program: 00:02" in shown
    assert "the slow program: compiled in 2." in shown


def test_a_file_gets_the_line_of_the_log_alone():
    code = SLOW.format(repository=str(REPOSITORY))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=ON_CPU
    )
    assert done.stderr.startswith("the slow program: compiled in 2.")
    assert done.stderr.count("\n") == 1
