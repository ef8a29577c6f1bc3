"""The cases that are whole commands: imports, the time to the first step, an ablation."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from benchmarks.cases import COMPILED, EAGER, PLATFORMS
from benchmarks.tables import Figures

REPOSITORY = pathlib.Path(__file__).parent.parent
ROUNDS, ABLATION_ROUNDS = 5, 3
PEERS = EAGER[-1], COMPILED[-1]
ARMS, ARM_STEPS, ARM_IMAGES, CHAIN_STEPS, BATCH_SIZE = 7, 150, 100, 50, 128

Say = Callable[[str], None]
Measure = Callable[[Say], dict[str, Figures]]


class Command(NamedTuple):
    """A row of the table whose contenders are whole processes."""

    title: str
    measure: Measure
    target: float | None = None  # ours / best peer
    limit: float | None = None  # of ours, in seconds
    amount: int = 1
    unit: str = "s"
    per_second: bool = False


@contextlib.contextmanager
def fresh_caches() -> Iterator[dict[str, str]]:
    """An environment with empty compilation caches, which its commands share."""
    with tempfile.TemporaryDirectory() as folder:
        caches = {"XDG_CACHE_HOME": folder, "TORCHINDUCTOR_CACHE_DIR": folder}
        yield caches | {"HIDDEN": hide_torch(pathlib.Path(folder))} | PLATFORMS["cpu"]


def hide_torch(folder: pathlib.Path) -> str:
    """A new folder for PYTHONPATH in which torch cannot be imported.

    tensorboardX imports torch if it is installed; in the benchmark only the peers need it.
    """
    hidden = folder / "hidden"
    hidden.mkdir()
    (hidden / "torch.py").write_text("raise ImportError('only the peers need it')\n")
    return str(hidden)


def call(words: list[str], environment: dict[str, str], is_peer: bool = True) -> float:
    """The wall time in seconds of a command of this Python.

    Raises:
        RuntimeError: it failed.
    """
    begun = time.perf_counter()
    if code := _start(words, environment, is_peer).wait():
        raise RuntimeError(f"{words[:3]} ended with {code}")
    return time.perf_counter() - begun


def _start(words: list[str], environment: dict[str, str], is_peer: bool) -> subprocess.Popen:
    paths = [str(REPOSITORY)] if is_peer else [environment["HIDDEN"], str(REPOSITORY)]
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=REPOSITORY,
        env=os.environ | environment | {"PYTHONPATH": os.pathsep.join(paths)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def imports(ours: list[str], peers: dict[str, list[str]]) -> Measure:
    """Wall time of commands that only import, with the start of Python; they take turns."""

    def measure(say: Say) -> dict[str, Figures]:
        times = {"ours": [], **{name: [] for name in peers}}
        with fresh_caches() as environment:
            for number in range(ROUNDS + 1):  # the first reads the files from the disk
                for name, words in {"ours": ours, **peers}.items():
                    seconds = call(words, environment, is_peer=name != "ours")
                    if number:
                        times[name].append(seconds)
        return {name: Figures(seconds) for name, seconds in times.items()}

    return measure


def first_step(is_warm: bool) -> Measure:
    """Wall time until the end of the first step; ours also checks, prepares and records a run."""

    def until_record(environment: dict[str, str], folder: pathlib.Path) -> float:
        """Wall time until the run has written the record of its first step; then kill the run."""
        words = ["main.py", "--config=configs/digits.py", f"--workdir={folder}"]
        words += [f"--config.compilation_cache={environment['XDG_CACHE_HOME']}/jax"]
        words += ["--config.train.log_every_steps=1"]
        begun, records = time.perf_counter(), folder / "metrics.jsonl"
        process = _start(words, environment, is_peer=False)
        while not (records.exists() and records.stat().st_size):
            if process.poll() is not None:
                raise RuntimeError(f"main.py ended with {process.returncode}")
            time.sleep(0.01)
        seconds = time.perf_counter() - begun
        process.send_signal(signal.SIGKILL)
        process.wait()
        return seconds

    def once(name: str, environment: dict[str, str], folder: pathlib.Path) -> float:
        if name == "ours":
            return until_record(environment, folder)
        options = {"size": "digits", "batch_size": BATCH_SIZE, "num_steps": 1}
        return call(_worker(name, "train_step", options), environment)

    def measure(say: Say) -> dict[str, Figures]:
        figures = {}
        for name in ("ours", *PEERS):
            say(f"  {name}")
            seconds = []
            with fresh_caches() as environment, tempfile.TemporaryDirectory() as folder:
                once(name, environment, pathlib.Path(folder) / "first")  # prepares the data too
                for number in range(3):
                    at = pathlib.Path(folder) / str(number)
                    if is_warm:
                        seconds.append(once(name, environment, at))
                        continue
                    with fresh_caches() as cold:
                        seconds.append(once(name, cold, at))
            figures[name] = Figures(seconds)
        return figures

    return measure


def _worker(name: str, do: str, options: dict[str, object]) -> list[str]:
    """The arguments of a worker that runs its case once: its standard input is empty."""
    work = {"do": do, "options": options, "platform": "cpu"}
    return ["-m", "benchmarks.worker", name, json.dumps(work)]


def ablation(say: Say) -> dict[str, Figures]:
    """Our ablation of seven offsets, and seven times one run of the peer; the first round compiles.

    Ours also evaluates the bound of 100 images and writes the report. It saves each arm halfway, so
    that two devices can share an arm: one trains its first half, the other its second half.
    """
    words = ["main.py", "--config=configs/digits_offset.py", "--mode=ablate"]
    fields = {
        "ablate.seeds": "(0,)",
        "train.num_steps": ARM_STEPS,
        "checkpoint.every_steps": ARM_STEPS // 2,
        "sampling.num_images": ARM_IMAGES,
        "sampling.batch_size": ARM_IMAGES,
        "sampling.num_steps": CHAIN_STEPS,
        "evaluate.num_examples": 100,
    }
    words += [f"--config.{name}={value}" for name, value in fields.items()]
    figures = {"ours": Figures([])}
    options = {"size": "digits", "batch_size": BATCH_SIZE, "num_steps": ARM_STEPS}
    options |= {"num_images": ARM_IMAGES, "num_sampling_steps": CHAIN_STEPS}
    with fresh_caches() as environment, tempfile.TemporaryDirectory() as folder:
        words.append(f"--config.compilation_cache={environment['XDG_CACHE_HOME']}/jax")
        for number in range(ABLATION_ROUNDS):
            say("  ours")
            at = f"--workdir={folder}/{number}"
            figures["ours"].seconds.append(call([*words, at], environment, is_peer=False))
    peer, compiled = PEERS
    figures[compiled] = Figures([], left_out="not run: each of its seven runs would compile anew")
    figures[peer] = Figures([])
    with fresh_caches() as environment:
        for _ in range(ABLATION_ROUNDS):
            say(f"  {peer}")
            one = call(_worker(peer, "train_and_sample", options), environment)
            figures[peer].seconds.append(ARMS * one)
    return figures


PYTHON = "-c"
IMPORTED_PEERS = {
    "diffusers": [PYTHON, "from diffusers import UNet2DModel, DDPMPipeline"],
    "ddpp": [PYTHON, "import denoising_diffusion_pytorch"],
}
COMMANDS = {
    "import": Command(
        "import diffusion_jax; the peers' models and samplers",
        imports(
            [PYTHON, "import diffusion_jax"],
            IMPORTED_PEERS,
        ),
        limit=2.0,
    ),
    "import-training": Command(
        "import all that training needs; the peers' models and samplers",
        imports(
            [PYTHON, "from diffusion_jax.training import train"],
            IMPORTED_PEERS,
        ),
    ),
    "help": Command("main.py --help", imports(["main.py", "--help"], {}), limit=2.0),
    "first-step-cold": Command(
        "from the command to the first step, digits, nothing compiled", first_step(is_warm=False)
    ),
    "first-step-warm": Command(
        "from the command to the first step, digits, compiled before",
        first_step(is_warm=True),
        limit=10.0,
    ),
    "ablation": Command(
        "7 offsets on digits: 150 steps of 128, 100 images of 50 steps each; 7 runs of the peer",
        ablation,
        target=0.85,
    ),
}
