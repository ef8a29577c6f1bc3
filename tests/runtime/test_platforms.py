"""The platform is found before jax starts, and only a CPU gets what is meant for CPUs."""

import os

import jax
import pytest
from runs import TOY2D, Run, arguments

from diffusion_jax.errors import ConfigError
from diffusion_jax.runtime import devices, memory, platforms

KNOWN = "--xla_cpu_multi_thread_eigen=false"
UNKNOWN = "--xla_no_such_flag=1"


@pytest.fixture
def flags(monkeypatch):
    """XLA_FLAGS is empty. Jax has started, so it reads no flags and keeps its number of devices."""
    update = jax.config.update

    def update_others(_, name, value):
        if name != "jax_num_cpu_devices":
            update(name, value)

    monkeypatch.setattr(type(jax.config), "update", update_others)
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.delenv("NPROC", raising=False)
    return lambda: os.environ["XLA_FLAGS"].split()


@pytest.mark.parametrize(
    ("names", "platform"),
    [
        ("cpu", "cpu"),
        ("cuda", "gpu"),
        ("rocm,cpu", "gpu"),
        ("gpu", "gpu"),
        ("tpu,cpu", "tpu"),
        ("proxy", "proxy"),
    ],
)
def test_the_first_name_of_jax_platforms_is_the_platform(names, platform):
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", names)
    try:
        assert platforms.find() == platform
    finally:
        jax.config.update("jax_platforms", before)


@pytest.mark.parametrize(
    ("nodes", "plugins", "platform"),
    [
        ((), ("xla_cuda12",), "cpu"),
        (("/dev/nvidia0",), (), "cpu"),
        (("/dev/nvidia0",), ("xla_cuda12",), "gpu"),
        (("/dev/kfd",), ("xla_rocm7",), "gpu"),
        (("/dev/accel0",), (), "tpu"),
    ],
)
def test_without_jax_platforms_it_is_that_of_a_device_with_a_plugin(
    monkeypatch, nodes, plugins, platform
):
    class Entry:
        def __init__(self, name):
            self.name = name

    before = jax.config.jax_platforms
    monkeypatch.setattr(platforms.os.path, "exists", lambda path: path in nodes)
    monkeypatch.setattr(
        platforms.importlib.metadata, "entry_points", lambda group: [*map(Entry, plugins)]
    )
    monkeypatch.setattr(platforms.importlib.util, "find_spec", lambda name: name)
    jax.config.update("jax_platforms", None)
    try:
        assert platforms.find() == platform
    finally:
        jax.config.update("jax_platforms", before)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_only_a_cpu_gets_flags_threads_and_memory_of_cpus(monkeypatch, flags, platform, caplog):
    managed = []
    monkeypatch.setattr(platforms, "find", lambda: platform)
    monkeypatch.setattr(memory, "manage", lambda is_training: managed.append(is_training))
    devices.start(None, 1, False, divide=False)
    is_cpu = platform == "cpu"
    assert flags() == list(devices.XLA_FLAGS) * is_cpu
    assert ("NPROC" in os.environ) == is_cpu
    assert managed == [False] * is_cpu
    # jax runs on the CPU here, which is said where something else was expected
    assert ("jax runs on cpu" in caplog.text) != is_cpu


@pytest.mark.parametrize(
    ("names", "libtpu", "plugins", "chosen"),
    [
        (None, True, set(), "cpu"),
        (None, False, set(), None),
        (None, True, {"another"}, None),
        ("tpu", True, set(), "tpu"),
    ],
)
def test_libtpu_without_a_tpu_is_not_loaded(monkeypatch, names, libtpu, plugins, chosen):
    before = jax.config.jax_platforms
    monkeypatch.setattr(platforms, "_has_libtpu", lambda: libtpu)
    monkeypatch.setattr(platforms, "_plugins", lambda: plugins)
    jax.config.update("jax_platforms", names)
    try:
        platforms.choose_cpu_over_libtpu()
        assert jax.config.jax_platforms == chosen
    finally:
        jax.config.update("jax_platforms", before)


def test_flags_of_the_user_stay_as_they_are(monkeypatch, flags):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=true")
    platforms.add_xla_flags([KNOWN, "--xla_cpu_prefer_vector_width=256"])
    assert flags() == ["--xla_cpu_multi_thread_eigen=true", "--xla_cpu_prefer_vector_width=256"]


def test_an_unknown_flag_is_left_out_with_a_warning(monkeypatch, flags, caplog):
    monkeypatch.setenv("XLA_FLAGS", UNKNOWN)
    platforms.add_xla_flags([KNOWN])
    assert flags() == [KNOWN]
    assert f"does not know {UNKNOWN}: it is left out" in caplog.text


def test_a_run_with_an_unknown_flag_starts(tmp_path):
    """XLA itself ends a process at such a flag."""
    words = arguments(tmp_path / "run", TOY2D | {"train.num_steps": 1})
    done = Run(words, tmp_path / "log", XLA_FLAGS=UNKNOWN).wait()
    assert done.code == 0, done.stderr
    assert f"does not know {UNKNOWN}: it is left out" in done.stderr


def test_deterministic_sets_the_first_flag_that_xla_has(monkeypatch, flags, caplog):
    monkeypatch.setattr(platforms, "find", lambda: "gpu")
    caplog.set_level("INFO")
    devices.start(None, 1, False, divide=False, deterministic=True)
    assert flags() == ["--xla_gpu_deterministic_ops=true"]
    assert "config.deterministic = True: XLA:GPU" in caplog.text


def test_deterministic_is_refused_where_xla_has_no_flag_for_it(monkeypatch, flags):
    monkeypatch.setattr(platforms, "find", lambda: "gpu")
    monkeypatch.setattr(platforms, "DETERMINISTIC", ("xla_gpu_no_such_flag",))
    with pytest.raises(ConfigError, match=r"^config\.deterministic = True: must be False"):
        devices.start(None, 1, False, divide=False, deterministic=True)
