"""The parts of benchmarks.gpu. Each yields what it measured, result by result, until its deadline.

Everything that uses the GPU is a process of its own, which is killed at the deadline. So a part
that takes too long says so, and what it had measured before stays.
"""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple

import numpy as np

from benchmarks import run, tables
from benchmarks.cases import GPU_CASES, PLATFORMS, REHEARSED_CASES, SMALL_NETWORK, Case

Results = Iterator[tuple[str, str]]  # what was measured, and its value in words
Fields = dict[str, Any]  # of a config, such as {"train.num_steps": 200}

PRECISIONS = "highest", "high", "default"
NO_TRITON = "--xla_gpu_enable_triton_gemm=false"
COMPILATION = re.compile(r"\] (.+): ((?:compiled|read from the cache) in [\d.]+ s)$")
SHORT_CHAIN = {
    "train.sample_every_steps": 0,
    "sampling.num_images": 16,
    "sampling.batch_size": 16,
    "sampling.num_steps": 10,
    "sampling.num_frames": 0,
}


class Setting(NamedTuple):
    """What differs between a GPU and the rehearsal on a CPU: the sizes."""

    cases: dict[str, Case]
    smoke: Fields
    mnist: Fields
    resume: Fields
    evaluation: Fields


SETTINGS = {
    "gpu": Setting(
        cases=GPU_CASES,
        smoke={"train.num_steps": 200},
        mnist={"train.num_steps": 1_000},
        resume=SHORT_CHAIN
        | {
            "train.num_steps": 1_000,
            "train.log_every_steps": 20,
            "checkpoint.every_steps": 100,
        },
        evaluation={"evaluate.num_examples": 200, "evaluate.num_timesteps": 50},
    ),
    "cpu": Setting(
        cases=REHEARSED_CASES,
        smoke=SMALL_NETWORK | SHORT_CHAIN | {"train.num_steps": 20},
        mnist=SMALL_NETWORK
        | SHORT_CHAIN
        | {
            "train.num_steps": 10,
            "train.batch_size": 16,
            "train.log_every_steps": 2,
        },
        resume=SMALL_NETWORK
        | SHORT_CHAIN
        | {
            "train.num_steps": 200,
            "train.batch_size": 32,
            "train.log_every_steps": 7,
            "checkpoint.every_steps": 10,
        },
        evaluation={"evaluate.num_examples": 16, "evaluate.num_timesteps": 5},
    ),
}


class Done(NamedTuple):
    """A command that has ended: its output, and why it failed, None if it did not."""

    lines: list[str]
    seconds: float
    failure: str | None

    def require_success(self) -> None:
        """Raise a RuntimeError with the failure, if there is one."""
        if self.failure is not None:
            raise RuntimeError(self.failure)


class Scene(NamedTuple):
    """What the parts share."""

    folder: pathlib.Path  # of runs; removed at the end
    cache: pathlib.Path  # of compiled programs: a later part reads those of an earlier one
    into: pathlib.Path
    rounds: int
    ready_seconds: float  # of each contender
    archives: str | None
    platform: str  # of PLATFORMS

    @property
    def setting(self) -> Setting:
        """The sizes on this platform."""
        return SETTINGS[self.platform]

    def call(self, words: list[str], deadline: float, platform: str | None = None) -> Done:
        """Run a command of this Python, show its output, and kill it at the deadline."""
        run.say(f"  + python {' '.join(words)}")
        begun, allowed = time.monotonic(), max(deadline - time.monotonic(), 1)
        process = self.start(words, subprocess.PIPE, platform)
        timer = threading.Timer(allowed, run.kill, (process,))
        timer.start()
        lines = []
        try:
            for line in process.stdout:
                run.say(f"    {line.rstrip()}")
                lines.append(line.rstrip())
            code = process.wait()
        finally:
            timer.cancel()
            run.kill(process)
        seconds = time.monotonic() - begun
        failure = None
        if code == -signal.SIGKILL and seconds >= allowed:
            failure = f"not done within {allowed:.0f} s"
        elif code:
            failure = lines[-1] if lines else f"ended with {code}"
        return Done(lines=lines, seconds=seconds, failure=failure)

    def start(
        self, words: list[str], output: int | IO[str], platform: str | None = None
    ) -> subprocess.Popen:
        """Start a command of this Python, and do not wait for it."""
        paths = [str(self.folder / "hidden"), os.environ.get("PYTHONPATH", "")]
        environment = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
        return subprocess.Popen(
            [sys.executable, *words],
            cwd=run.REPOSITORY,
            env=os.environ | PLATFORMS[platform or self.platform] | environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def main(self, config: str, name: str, fields: Fields, mode: str = "train") -> list[str]:
        """The words of main.py for the run of this name."""
        words = ["main.py", f"--config=configs/{config}.py", f"--workdir={self.folder / name}"]
        fields = {"compilation_cache": self.cache, **fields}
        return [*words, f"--mode={mode}", *(f"--config.{n}={v}" for n, v in fields.items())]


def _compilations(done: Done) -> Results:
    """The seconds of main.py's compilations, as its log tells them."""
    for line in done.lines:
        if match := COMPILATION.search(line):
            yield match[1], match[2]


def smoke(scene: Scene, deadline: float) -> Results:
    """main.py trains configs/digits.py for a few steps and samples from it."""
    done = scene.call(scene.main("digits", "digits", scene.setting.smoke), deadline)
    yield from _compilations(done)
    done.require_success()
    yield "trained and sampled in", f"{done.seconds:.0f} s"


def mnist(scene: Scene, deadline: float) -> Results:
    """main.py trains configs/mnist.py at its defaults; its own images/s, and its samples."""
    fields = scene.setting.mnist
    if scene.archives is not None:
        fields = fields | {"dataset.archives": scene.archives}
    done = scene.call(scene.main("mnist", "mnist", fields), deadline)
    yield from _compilations(done)
    records = scene.folder / "mnist" / "metrics.jsonl"
    lines = records.read_text().splitlines() if records.exists() else []
    speeds = [json.loads(line).get("images_per_second") for line in lines]
    speeds = [speed for speed in speeds if speed is not None]
    if speeds:
        low, median, high = np.quantile(speeds, (0, 0.5, 1))
        yield (
            "images/s of metrics.jsonl, median [lowest, highest]",
            f"{median:,.0f} [{low:,.0f}, {high:,.0f}] of {len(speeds)} records",
        )
    done.require_success()
    grid = scene.into.with_name(f"{scene.into.name}_mnist.png")
    shutil.copy(scene.folder / "mnist" / "samples" / "grid.png", grid)
    yield "samples", grid.name


def compile_alone(scene: Scene, deadline: float) -> Results:
    """The compile seconds of the training step, with nothing else going on."""
    case = scene.setting.cases["gpu-train"]
    variants = {"as it is": {}, f"XLA_FLAGS={NO_TRITON}": {"XLA_FLAGS": NO_TRITON}}
    for number, (name, flags) in enumerate(variants.items()):
        limit = (deadline - time.monotonic()) / (len(variants) - number)
        with tempfile.TemporaryDirectory(dir=scene.folder) as empty:
            environment = {}
            if flags:  # and what XLA has timed for the step as it is must not help
                words = f"{os.environ.get('XLA_FLAGS', '')} {flags['XLA_FLAGS']}"
                environment = {"XLA_FLAGS": words, "JAX_COMPILATION_CACHE_DIR": empty}
            try:
                worker = run.Worker("ours", case, limit, environment)
            except RuntimeError as error:
                yield f"{case.title}, {name}", str(error)
                continue
            worker.kill()
        program, ready = (worker.about[f"{what}_seconds"] for what in ("program", "ready"))
        yield f"{case.title}, {name}", f"{program:.1f} s, ready after {ready:.1f} s"


def measure_case(name: str) -> Callable[[Scene, float], Results]:
    """The part that measures a case with its peers, and writes its row into the table."""

    def part(scene: Scene, deadline: float) -> Results:
        case, now = scene.setting.cases[name], time.monotonic()
        limits = run.Limits(
            to_be_ready=min(scene.ready_seconds, 0.5 * (deadline - now)),
            last_start=now + 0.8 * (deadline - now),
            end=deadline,
        )
        row = run.add(scene.into, name, case, scene.rounds, limits)
        for contender, figures in row["contenders"].items():
            value = tables.speed(row, figures)
            if not figures["left_out"]:
                value += f" {tables.unit_of(row)}, compiled in {figures['ready_seconds']:.1f} s"
            yield f"{case.title}, {contender}", value

    return part


def resume(scene: Scene, deadline: float) -> Results:
    """A run killed by SIGKILL and resumed, with config.deterministic, beside one that was not."""
    fields = scene.setting.resume | {"deterministic": True}
    done = scene.call(scene.main("digits", "uninterrupted", fields), deadline)
    yield from _compilations(done)
    done.require_success()
    words, saved = scene.main("digits", "killed", fields), scene.folder / "killed" / "checkpoints"
    steps = _kill_once_saved(scene, words, saved, deadline)
    if str(fields["train.num_steps"]) in steps:
        raise RuntimeError("the run had ended before it was killed")
    yield "killed after checkpoint", ", ".join(steps)
    scene.call(words, deadline).require_success()
    runs = [str(scene.folder / name) for name in ("killed", "uninterrupted")]
    done = scene.call(["-m", "benchmarks.same", *runs], deadline, "cpu")
    found = [
        line
        for line in done.lines
        if re.match(r"every bit|the newest|checkpoint \d|metrics|samples", line)
    ]
    yield "last checkpoint, records, samples", "; ".join(found) or str(done.failure)
    done.require_success()


def _kill_once_saved(
    scene: Scene, words: list[str], saved: pathlib.Path, deadline: float
) -> list[str]:
    """Start a run, kill it at its first checkpoint, and return the steps of its checkpoints."""
    with tempfile.TemporaryFile("w+") as output:
        process = scene.start(words, output)
        try:
            while not (steps := [path.name for path in saved.glob("*") if path.name.isdigit()]):
                if process.poll() is not None:
                    output.seek(0)
                    raise RuntimeError(output.read().splitlines()[-1])
                if time.monotonic() > deadline:
                    raise RuntimeError("no time was left until its first checkpoint")
                time.sleep(0.01)
        finally:
            run.kill(process)
    return steps


def precision(scene: Scene, deadline: float) -> Results:
    """Bits/dim of the digits' model at each evaluate.precision, beside those of the CPU."""
    if not (scene.folder / "digits" / "samples" / "samples.npz").exists():
        yield from smoke(scene, deadline)
    bits = {}
    for name, platform, value in (
        ("bits/dim, highest, on the CPU", "cpu", "highest"),
        *((f"bits/dim, {value}", scene.platform, value) for value in PRECISIONS),
    ):
        fields = scene.setting.smoke | scene.setting.evaluation | {"evaluate.precision": value}
        # the sums of an equal evaluation, with which this one would go on
        (scene.folder / "digits" / "evaluation.npz").unlink(missing_ok=True)
        words = scene.main("digits", "digits", fields, "evaluate")
        scene.call(words, deadline, platform).require_success()
        report = json.loads((scene.folder / "digits" / "evaluation.json").read_text())
        bits[name] = report["bits_per_dim"]
        distance = bits[name] - next(iter(bits.values()))
        yield name, f"{bits[name]:.7f}" + (f", {distance:+.1e} from the CPU's" if distance else "")


def profile(scene: Scene, deadline: float) -> Results:
    """The floor of the training step and the time in each kind of its operations."""
    options = scene.setting.cases["gpu-train"].options
    words = ["-m", "benchmarks.profile", f"--size={options['size']}"]
    words += [f"--batch-size={options['batch_size']}", f"--dtype={options['dtype']}"]
    done = scene.call(words, deadline)
    for line in done.lines:
        name, colon, value = line.partition(": ")
        if colon and ("Gflop/s in a" in line or name in ("operations of a step", "measured")):
            yield name, value
        elif line.startswith("|") and not line.startswith(("| kind", "|---")):
            kind, milliseconds, share = (cell.strip() for cell in line.strip("|").split("|"))
            yield kind, f"{milliseconds} ms of a step, {share}"
    done.require_success()


class Part(NamedTuple):
    """A part, and its seconds where all parts run; ten minutes hold all of them."""

    seconds: float
    measure: Callable[[Scene, float], Results]
    about: str


PARTS = {
    "smoke": Part(60, smoke, "main.py trains configs/digits.py and samples"),
    "compile": Part(
        120, compile_alone, "compile seconds of the training step of 35.7 M parameters"
    ),
    "train": Part(130, measure_case("gpu-train"), "that step beside torch.compile's"),
    "profile": Part(30, profile, "its floor, and the time in each kind of operation"),
    "sample-1": Part(50, measure_case("gpu-sample-1"), "sampling 1 image beside torch.compile's"),
    "mnist": Part(70, mnist, "main.py trains configs/mnist.py: its own images/s"),
    "sample-256": Part(40, measure_case("gpu-sample-256"), "sampling 256 images"),
    "resume": Part(50, resume, "a killed and resumed run has the bits of an uninterrupted one"),
    "precision": Part(30, precision, "bits/dim at each evaluate.precision, and on the CPU"),
}
