"""The platform is found before jax starts, and only a CPU gets what is meant for CPUs."""

import os

import jax
import pytest
from runs import TOY2D, Run, arguments

from diffusion_jax.errors import ConfigError
from diffusion_jax.runtime import devices, memory, platforms

KNOWN = "--xla_cpu_multi_thread_eigen=false"
UNKNOWN = "--xla_no_such_flag=1"
REMOVED = "--xla_gpu_enable_priority_fusion=true"  # XLA still has its name, and refuses it


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


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine without devices, to which a test adds nodes, PCI devices and plugins."""
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", None)
    nodes, plugins = set(), set()
    monkeypatch.setattr(platforms.os.path, "exists", nodes.__contains__)
    monkeypatch.setattr(platforms, "_plugins", lambda: plugins)
    monkeypatch.setattr(platforms, "_has_libtpu", lambda: "libtpu" in plugins)
    monkeypatch.setattr(platforms, "DEVICES", tmp_path / "dev")
    monkeypatch.setattr(platforms, "PCI", tmp_path / "pci")
    for name in [name for names in platforms.HIDING.values() for name in names]:
        monkeypatch.delenv(name, raising=False)
    yield nodes, plugins, tmp_path
    jax.config.update("jax_platforms", before)


@pytest.mark.parametrize(
    ("nodes", "plugins", "platform"),
    [
        ((), ("xla_cuda12",), "cpu"),
        (("/dev/nvidia0",), (), "cpu"),
        (("/dev/nvidia0",), ("xla_cuda12",), "gpu"),
        (("/dev/nvhost-gpu",), ("xla_cuda13",), "gpu"),
        (("/dev/kfd",), ("xla_cuda12",), "cpu"),  # an AMD chip that the plugin is not for
        (("/dev/kfd",), ("xla_rocm7",), "gpu"),
    ],
)
def test_without_jax_platforms_a_gpu_needs_its_own_plugin(machine, nodes, plugins, platform):
    machine[0].update(nodes)
    machine[1].update(plugins)
    assert platforms.find() == platform


@pytest.mark.parametrize(("value", "platform"), [("", "cpu"), ("-1", "cpu"), ("0", "gpu")])
def test_a_hidden_gpu_is_none(machine, monkeypatch, value, platform):
    machine[0].add("/dev/nvidia0")
    machine[1].add("xla_cuda12")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert platforms.find() == platform


@pytest.mark.parametrize("libtpu", [True, False])
@pytest.mark.parametrize(
    ("node", "pci", "is_tpu"),
    [
        (None, (), False),
        ("accel3", (), True),
        ("vfio/2", (), True),
        ("vfio/vfio", (), False),
        (None, [("0x1ae0", "0x0063")], True),
        (None, [("0x8086", "0x1237"), ("0x1ae0", "0x0042")], False),  # the network card of a host
    ],
)
def test_a_tpu_is_found_by_its_node_or_its_pci_device(machine, libtpu, node, pci, is_tpu):
    _, plugins, path = machine
    if libtpu:
        plugins.add("libtpu")
    if node is not None:
        (path / "dev" / node).parent.mkdir(parents=True)
        (path / "dev" / node).touch()
    for number, (vendor, device) in enumerate(pci):
        folder = path / "pci" / str(number)
        folder.mkdir(parents=True)
        (folder / "vendor").write_text(f"{vendor}\n")
        (folder / "device").write_text(f"{device}\n")
    assert platforms.find() == ("tpu" if libtpu and is_tpu else "cpu")


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


@pytest.mark.parametrize("unknown", [UNKNOWN, REMOVED])
def test_an_unknown_flag_is_left_out_with_a_warning(monkeypatch, flags, caplog, unknown):
    monkeypatch.setenv("XLA_FLAGS", unknown)
    platforms.add_xla_flags([KNOWN])
    assert flags() == [KNOWN]
    assert f"does not know {unknown}: it is left out" in caplog.text


def test_a_run_with_unknown_flags_starts(tmp_path):
    """XLA itself ends a process at such a flag."""
    words = arguments(tmp_path / "run", TOY2D | {"train.num_steps": 1})
    done = Run(words, tmp_path / "log", XLA_FLAGS=f"{UNKNOWN} {REMOVED}").wait()
    assert done.code == 0, done.stderr
    for flag in (UNKNOWN, REMOVED):
        assert f"does not know {flag}: it is left out" in done.stderr


def test_deterministic_sets_the_first_flag_that_xla_has(monkeypatch, flags, caplog):
    monkeypatch.setattr(platforms, "find", lambda: "gpu")
    caplog.set_level("INFO")
    devices.start(None, 1, False, divide=False, deterministic=True)
    assert flags() == ["--xla_gpu_deterministic_ops=true"]
    assert "config.deterministic = True: XLA:GPU" in caplog.text


def test_deterministic_is_refused_if_the_user_has_switched_it_off(monkeypatch, flags):
    monkeypatch.setattr(platforms, "find", lambda: "gpu")
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=false")
    with pytest.raises(ConfigError, match=r"XLA_FLAGS must have --xla_gpu_deterministic_ops=true$"):
        devices.start(None, 1, False, divide=False, deterministic=True)


def test_deterministic_is_refused_where_xla_has_no_flag_for_it(monkeypatch, flags):
    monkeypatch.setattr(platforms, "find", lambda: "gpu")
    monkeypatch.setattr(platforms, "DETERMINISTIC", (("--xla_gpu_no_such_flag=true",),))
    with pytest.raises(ConfigError, match=r"^config\.deterministic = True: must be False"):
        devices.start(None, 1, False, divide=False, deterministic=True)
