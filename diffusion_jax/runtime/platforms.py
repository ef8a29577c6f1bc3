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

# For each kind of GPU, a part of its plugin's name: its device nodes (/dev/dxg under WSL 2), and
# the variables that can hide the GPU.
GPU_NODES = {
    "cuda": ("/dev/nvidia0", "/dev/nvidiactl", "/dev/nvhost-gpu", "/dev/dxg"),
    "rocm": ("/dev/kfd", "/dev/dxg"),
}
HIDING = {
    "cuda": ("CUDA_VISIBLE_DEVICES",),
    "rocm": ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"),
}
TPU_NODES = ("accel[0-9]*", "vfio/[0-9]*")  # in /dev
DEVICES, PCI = pathlib.Path("/dev"), pathlib.Path("/sys/bus/pci/devices")
GOOGLE = "0x1ae0"  # the PCI vendor of TPUs and of network cards
TPU_IDS = {"0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"}  # v3 to 7x

# Each of these makes XLA:GPU deterministic; the second also needs kernels that are not timed.
DETERMINISTIC = (
    ("--xla_gpu_deterministic_ops=true",),
    ("--xla_gpu_exclude_nondeterministic_ops=true", "--xla_gpu_autotune_level=0"),
)


def find() -> str:
    """The platform that jax will choose: cpu, gpu, tpu, or another name in JAX_PLATFORMS.

    Without JAX_PLATFORMS jax takes an accelerator that is there and that it has a plugin for.
    ``warn_unless`` tells when the guess was wrong.
    """
    if names := requested():
        first = names.split(",")[0]
        return NAMES.get(first, first)
    if any(_has_gpu(kind) for kind in GPU_NODES):
        return "gpu"
    return "tpu" if _has_libtpu() and _has_tpu() else "cpu"


def requested() -> str | None:
    """The platforms that JAX_PLATFORMS, or jax's option, names."""
    names: str | None = jax.config.jax_platforms  # type: ignore[attr-defined]  # jax adds it at run time
    return names


def choose_cpu_over_libtpu() -> None:
    """Choose the CPU if libtpu is installed without a TPU, because libtpu would print errors.

    Without libtpu, or with another plugin, the choice stays with jax.
    """
    if not requested() and _has_libtpu() and not _plugins():
        LOG.info("libtpu is installed, but no TPU was found (JAX_PLATFORMS=tpu looks again)")
        jax.config.update("jax_platforms", "cpu")


def _plugins() -> set[str]:
    return {entry.name for entry in importlib.metadata.entry_points(group="jax_plugins")}


def _has_gpu(kind: str) -> bool:
    is_hidden = any(os.environ.get(name) in ("", "-1") for name in HIDING[kind])
    has_node = any(map(os.path.exists, GPU_NODES[kind]))
    return has_node and not is_hidden and any(kind in plugin for plugin in _plugins())


def _has_libtpu() -> bool:
    return importlib.util.find_spec("libtpu") is not None


def _has_tpu() -> bool:
    if any(path for nodes in TPU_NODES for path in DEVICES.glob(nodes)):
        return True
    return any(
        (device / "vendor").read_text().strip() == GOOGLE
        and (device / "device").read_text().strip() in TPU_IDS
        for device in PCI.glob("*")
    )


def warn_unless(expected: str) -> None:
    """Say so if jax runs on another platform than was prepared for."""
    actual = jax.default_backend()
    if actual != expected and expected in NAMES.values():
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


def add_deterministic_flags() -> None:
    """Make XLA:GPU compute equal bits in every run, and log what it costs.

    Raises:
        ConfigError: this jaxlib has no such flags, or XLA_FLAGS has another value of them.
    """
    known = [flags for flags in DETERMINISTIC if all(map(knows_xla_flag, map(_name, flags)))]
    names = ", ".join(_name(flags[0]) for flags in DETERMINISTIC)
    allowed = f"False: this jaxlib has none of the XLA flags {names}"
    require(known, "config.deterministic", True, allowed)
    add_xla_flags(known[0])
    missing = set(known[0]) - set(os.environ["XLA_FLAGS"].split())
    allowed = f"False, or XLA_FLAGS must have {' '.join(known[0])}"
    require(not missing, "config.deterministic", True, allowed)
    LOG.info(
        "config.deterministic = True: XLA:GPU chooses kernels without timing them and avoids those "
        "that add in a random order, so steps are slower"
    )


def knows_xla_flag(name: str) -> bool:
    """Whether every library of XLA that is installed has a flag of this name."""
    # A name that ends here and starts here: libraries also contain the names of removed flags.
    return all(_contains(library, b"\0" + name.encode() + b"\0") for library in _xla_libraries())


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
