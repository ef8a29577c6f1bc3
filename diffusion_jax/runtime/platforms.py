"""The platform that jax will run on, found before jax starts, and the XLA flags for it.

Memory, threads and flags must be set before jax starts, and what is right for a CPU is wrong for
an accelerator.
"""

import importlib.metadata
import importlib.util
import logging
import mmap
import os
import pathlib
from collections.abc import Iterable

import jax
import jaxlib

from diffusion_jax.errors import require

LOG = logging.getLogger("diffusion_jax")

# jax's names of platforms, and ours.
NAMES = {"cpu": "cpu", "cuda": "gpu", "rocm": "gpu", "gpu": "gpu", "tpu": "tpu"}

# The device nodes of NVIDIA (also under WSL 2) and AMD.
GPU_NODES = "/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg", "/dev/kfd"
TPU_NODES = "/dev/accel0", "/dev/vfio/0"
# The first of these flags also fixes the choice of kernels, which else depends on timings.
DETERMINISTIC = "xla_gpu_deterministic_ops", "xla_gpu_exclude_nondeterministic_ops"
GOOGLE = "0x1ae0"  # the PCI vendor of TPUs


def find() -> str:
    """The platform that jax will choose: cpu, gpu, tpu, or another name in JAX_PLATFORMS.

    Without JAX_PLATFORMS jax takes an accelerator that is there and that it has a plugin for.
    ``warn_unless`` tells when the guess was wrong.
    """
    asked = jax.config.jax_platforms  # type: ignore[attr-defined]  # jax adds it at run time
    if asked:
        first = asked.split(",")[0]
        return NAMES.get(first, first)
    if _plugins() and any(map(os.path.exists, GPU_NODES)):
        return "gpu"
    if _has_libtpu() and _has_tpu():
        return "tpu"
    return "cpu"


def choose_cpu_over_libtpu() -> None:
    """Choose the CPU if libtpu is installed without a TPU, because libtpu would print errors.

    Without libtpu, or with another plugin, the choice stays with jax.
    """
    if not jax.config.jax_platforms and _has_libtpu() and not _plugins():  # type: ignore[attr-defined]  # jax adds it at run time
        jax.config.update("jax_platforms", "cpu")


def _plugins() -> set[str]:
    return {entry.name for entry in importlib.metadata.entry_points(group="jax_plugins")}


def _has_libtpu() -> bool:
    return importlib.util.find_spec("libtpu") is not None


def _has_tpu() -> bool:
    vendors = pathlib.Path("/sys/bus/pci/devices").glob("*/vendor")
    return any(map(os.path.exists, TPU_NODES)) or any(
        vendor.read_text().strip() == GOOGLE for vendor in vendors
    )


def warn_unless(expected: str) -> None:
    """Say so if jax runs on another platform than was prepared for."""
    actual = jax.default_backend()
    if actual != expected:
        LOG.warning(
            "jax runs on %s where %s was expected, so its memory and flags are not set for it: "
            "JAX_PLATFORMS=%s sets them",
            *(actual, expected, actual),
        )


def add_xla_flags(flags: Iterable[str]) -> None:
    """Add flags, as "--name=value", to XLA_FLAGS; those that the user has set stay as they are.

    XLA ends the process at a flag that it does not know, so such a flag is left out with a warning.
    """
    words = os.environ.get("XLA_FLAGS", "").split()
    present = {_name(word) for word in words}
    words += [flag for flag in flags if _name(flag) not in present]
    unknown = [word for word in words if word.startswith("--") and not knows_xla_flag(_name(word))]
    for word in unknown:
        LOG.warning("XLA_FLAGS: this jaxlib does not know %s: it is left out", word)
    os.environ["XLA_FLAGS"] = " ".join(word for word in words if word not in unknown)


def add_deterministic_flag() -> None:
    """Make XLA:GPU compute equal bits in every run, and say what it costs.

    Raises:
        ConfigError: this version of jax has no such flag.
    """
    known = [name for name in DETERMINISTIC if knows_xla_flag(name)]
    allowed = f"False: this jaxlib has none of the XLA flags {', '.join(DETERMINISTIC)}"
    require(known, "config.deterministic", True, allowed)
    add_xla_flags([f"--{known[0]}=true"])
    LOG.info(
        "config.deterministic = True: XLA:GPU chooses kernels without timing them and avoids those "
        "that add in a random order, so steps are slower"
    )


def knows_xla_flag(name: str) -> bool:
    """Whether every library of XLA that is installed has the name of a flag in it."""
    return all(_contains(library, name.encode()) for library in _xla_libraries())


def _name(flag: str) -> str:
    return flag.lstrip("-").split("=")[0]


def _xla_libraries() -> list[pathlib.Path]:
    """The libraries of jaxlib and of its plugins, each of which parses XLA_FLAGS by itself."""
    folder = pathlib.Path(jaxlib.__file__).parent
    largest = max(folder.glob("*.so"), key=lambda path: path.stat().st_size)
    return [largest, *folder.parent.glob("jax_plugins/*/xla_*_plugin.so")]


def _contains(path: pathlib.Path, text: bytes) -> bool:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(text) >= 0
