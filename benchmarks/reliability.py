"""Whether runs survive kills, damaged files, a full disk, a second start and concurrent readers.

    python -m benchmarks.reliability [--into=docs/RELIABILITY.md] [--seed=0] [CASE ...]

The trials are real: processes of main.py, signals, files on a disk, a full tmpfs. A trial holds if
the run ends with exactly the arrays, records and samples of an undisturbed run, or is refused in
one line. A trial with a damaged file holds if the restored arrays are exactly those of a saved
step. Without CASE all cases run, and the table of the page is written. The exit status is 1 if a
trial did not hold.
"""

import argparse
import contextlib
import itertools
import logging
import os
import pathlib
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from benchmarks import same, tables
from benchmarks.cases import SMALL_NETWORK
from diffusion_jax.errors import RunError
from diffusion_jax.runtime import checkpoint

REPOSITORY = pathlib.Path(__file__).parent.parent
BEGIN = "<!-- written by benchmarks.reliability -->"
END = "<!-- end of what benchmarks.reliability writes -->"
NUM_STEPS, EVERY = 200, 10
SMALL = {
    **SMALL_NETWORK,
    "train.num_steps": NUM_STEPS,
    "train.batch_size": 32,
    "train.log_every_steps": 7,
    "train.sample_every_steps": 0,
    "checkpoint.every_steps": EVERY,
    "sampling.num_images": 64,
    "sampling.batch_size": 16,
    "sampling.num_frames": 0,
    "optimizer.warmup_steps": 5,
}
NUM_KILLS, NUM_DAMAGES, NUM_TWICE, NUM_READ = 20, 60, 3, 5
IN_USE = "in use by another run"


class Outcome(NamedTuple):
    """A row of the table: the number of trials, the number that held, and the observations."""

    trials: int
    held: int
    seen: str


class Scene(NamedTuple):
    """The folder of the trials, and the undisturbed run that they are compared with."""

    folder: pathlib.Path
    untouched: pathlib.Path
    seconds: float  # duration of the undisturbed run
    random: random.Random

    def words(self, workdir: pathlib.Path, **changes: Any) -> list[str]:
        """The command of a run."""
        fields = {name.replace("__", "."): value for name, value in changes.items()}
        flags = [f"--config={REPOSITORY}/configs/digits.py", f"--workdir={workdir}"]
        flags += [f"--config.{name}={value}" for name, value in (SMALL | fields).items()]
        return [sys.executable, str(REPOSITORY / "main.py"), *flags]

    def start(self, workdir: pathlib.Path, **changes: Any) -> subprocess.Popen:
        """Start a run, and do not wait for it."""
        return subprocess.Popen(
            self.words(workdir, **changes),
            cwd=REPOSITORY,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, workdir: pathlib.Path, **changes: Any) -> tuple[int, str]:
        """The exit status of a run, and its standard error."""
        process = self.start(workdir, **changes)
        log = process.communicate()[1]
        return process.returncode, log

    def is_untouched(self, workdir: pathlib.Path) -> bool:
        """Whether a run ended with the arrays, records and samples of the undisturbed run."""
        return not list(same.differences(workdir, self.untouched))


def _wait_for_step(process: subprocess.Popen, workdir: pathlib.Path, step: int) -> None:
    while max(checkpoint.saved_steps(workdir / "checkpoints"), default=0) < step:
        if process.poll() is not None:
            raise RuntimeError(process.communicate()[1])
        time.sleep(0.01)


def killed(scene: Scene) -> Iterator[Outcome]:
    """Killed at a random moment, SIGKILL and SIGTERM in turn, then started again."""
    for number in range(NUM_KILLS):
        workdir, kind = (
            scene.folder / f"killed{number}",
            (signal.SIGKILL, signal.SIGTERM)[number % 2],
        )
        process = scene.start(workdir)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(scene.random.uniform(0.05, 1) * scene.seconds)
        process.send_signal(kind)
        process.communicate()
        steps = checkpoint.saved_steps(workdir / "checkpoints") if workdir.exists() else []
        code, log = scene.run(workdir)
        held = code == 0 and scene.is_untouched(workdir)
        where = "at its end" if steps[-1:] == [NUM_STEPS] else "in training" if steps else "before"
        yield Outcome(1, held, f"{kind.name} {where}" + ("" if held else f": {code} {log[-300:]}"))
        shutil.rmtree(workdir)


def damaged(scene: Scene) -> Iterator[Outcome]:
    """A file of the newest checkpoint deleted, cut in half, or with a bit flipped."""
    directory = scene.untouched / "checkpoints"
    digests = {
        step: checkpoint.digest(checkpoint.load(directory, step))
        for step in checkpoint.saved_steps(directory)
    }
    newest = max(digests)
    template = checkpoint.load(directory, newest)
    files = sorted(path for path in (directory / str(newest)).rglob("*") if path.is_file())
    for number in range(NUM_DAMAGES):
        copy = shutil.copytree(directory, scene.folder / f"damaged{number}")
        file = copy / scene.random.choice(files).relative_to(directory)
        kind = ("deleted", "cut", "flipped")[number % 3]
        content = bytearray(file.read_bytes())
        if kind == "deleted":
            file.unlink()
        elif kind == "cut":
            file.write_bytes(content[: len(content) // 2])
        else:
            if content:
                content[scene.random.randrange(len(content))] ^= 1 << scene.random.randrange(8)
            file.write_bytes(content)
        try:
            restored = checkpoint.restore(copy, template)
            held = checkpoint.digest(restored.state) == digests[restored.step]
            seen = f"{kind}: " + ("nothing lost" if restored.step == newest else "fell back")
        except RunError as error:
            held, seen = False, f"{kind}: {error}"
        yield Outcome(1, held, seen if held else f"{seen}, {file.name}")
        shutil.rmtree(copy)


def full(scene: Scene) -> Iterator[Outcome]:
    """A tmpfs with room for some checkpoints; then it is made larger and the run goes on."""
    disk, copy = scene.folder / "disk", scene.folder / "kept"
    disk.mkdir()
    size = sum(path.stat().st_size for path in (scene.untouched / "checkpoints").rglob("*"))
    everything = sum(path.stat().st_size for path in scene.untouched.rglob("*"))
    room = everything - size + 4 * size // 3  # of this, a third of ``size`` is filled below
    command = shlex.join(scene.words(disk / "run"))
    script = f"""
        mount -t tmpfs -o size={room} tmpfs {disk} || exit 9
        dd if=/dev/zero of={disk}/other bs=1k count={size // 3000} 2>/dev/null
        {command} >/dev/null 2>{scene.folder}/first.err; echo $? >{scene.folder}/first.code
        ls {disk}/run/checkpoints >{scene.folder}/first.steps
        mount -o remount,size=1g {disk}
        {command} >/dev/null 2>{scene.folder}/second.err; echo $? >{scene.folder}/second.code
        cp -r {disk}/run {copy}
    """
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", script],
        cwd=REPOSITORY,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    if not (scene.folder / "first.code").exists():
        yield Outcome(0, 0, f"not tried, no tmpfs can be mounted here: {done.stderr.strip()}")
        return
    read = {path.name: path.read_text() for path in scene.folder.glob("*.*") if path.is_file()}
    codes = int(read["first.code"]), int(read["second.code"])
    errors = [line for line in read["first.err"].splitlines() if "Error" in line]
    errors += [line for line in read["first.err"].splitlines() if "Traceback" in line]
    steps = [int(name) for name in read["first.steps"].split() if name.isdigit()]
    held = codes == (1, 0) and len(errors) == 1 and bool(steps) and scene.is_untouched(copy)
    seen = f"exit {codes[0]} with {len(errors)} line, steps {steps} stay, then exit {codes[1]}"
    yield Outcome(1, held, seen if held else f"{seen}: {errors[:3]}")


def twice(scene: Scene) -> Iterator[Outcome]:
    """A second run started in the folder of a run, and again after the first run was killed."""
    for number in range(NUM_TWICE):
        workdir = scene.folder / f"twice{number}"
        first = scene.start(workdir, train__num_steps=1_000_000)
        _wait_for_step(first, workdir, EVERY)
        code, log = scene.run(workdir)
        is_refused = code == 2 and log.splitlines()[-1].endswith(IN_USE)
        is_running = first.poll() is None
        first.kill()
        first.communicate()
        steps = max(checkpoint.saved_steps(workdir / "checkpoints")) + EVERY
        code, log = scene.run(workdir, train__num_steps=steps)
        held = is_refused and is_running and code == 0
        yield Outcome(1, held, "refused, then free" if held else f"{code}: {log[-300:]}")
        shutil.rmtree(workdir)


def read(scene: Scene) -> Iterator[Outcome]:
    """A live run; a process reads its checkpoints repeatedly, and a second run is guided by it."""
    for number in range(NUM_READ):
        workdir, other = scene.folder / f"read{number}", scene.folder / f"guided{number}"
        live = scene.start(workdir)
        _wait_for_step(live, workdir, EVERY)
        template = checkpoint.load(
            scene.untouched / "checkpoints",
            max(checkpoint.saved_steps(scene.untouched / "checkpoints")),
        )
        guided = scene.start(
            other,
            guidance__weak_workdir=workdir,
            guidance__weight=1.5,
            train__num_steps=EVERY,
        )
        steps = []
        while live.poll() is None or guided.poll() is None:
            steps.append(checkpoint.restore(workdir / "checkpoints", template).step)
        log = live.communicate()[1] + guided.communicate()[1]
        held = live.returncode == guided.returncode == 0 and scene.is_untouched(workdir)
        seen = f"{len(steps)} reads of {len(set(steps))} steps"
        yield Outcome(1, held, seen if held else f"{seen}: {log[-300:]}")
        shutil.rmtree(workdir)
        shutil.rmtree(other)


CASES: dict[str, Callable[[Scene], Iterator[Outcome]]] = {
    "killed": killed,
    "damaged": damaged,
    "full": full,
    "twice": twice,
    "read": read,
}


def summarise(outcomes: list[Outcome]) -> Outcome:
    """The sums over all trials of a case, with the number of times of each observation."""
    seen = sorted(outcome.seen for outcome in outcomes)
    counts = [f"{len(list(group))} x {text}" for text, group in itertools.groupby(seen)]
    if len(counts) == len(seen):
        counts = seen
    return Outcome(
        trials=sum(outcome.trials for outcome in outcomes),
        held=sum(outcome.held for outcome in outcomes),
        seen="; ".join(counts),
    )


def write_table(outcomes: dict[str, Outcome], page: pathlib.Path) -> None:
    """Write the table between its two marks in the page."""
    machine = tables.environment(None)
    lines = ["| what happens | trials | held | seen |", "|---|---|---|---|"]
    for name, outcome in outcomes.items():
        title = (CASES[name].__doc__ or "").rstrip(".")
        lines.append(f"| {title} | {outcome.trials} | {outcome.held} | {outcome.seen} |")
    versions = f"jax {machine['versions']['jax']}, Python {machine['python']}"
    lines += ["", f"At {machine['commit']}, {machine['date']}, {versions}, {machine['cpu']}."]
    tables.write_between(page, (BEGIN, END), "\n".join([*lines, ""]))


def main() -> int:
    """Run the cases, print each trial, and write the table if all cases ran."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--into", default="docs/RELIABILITY.md", type=pathlib.Path)
    parser.add_argument("--seed", default=0, type=int, help="of the times of kills and of damage")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}")
    arguments = parser.parse_args()
    unknown = set(arguments.cases) - set(CASES)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    logging.getLogger("diffusion_jax").setLevel(logging.ERROR)  # warnings of damage are expected
    outcomes = {}
    with tempfile.TemporaryDirectory() as folder:
        scene = Scene(
            folder=pathlib.Path(folder),
            untouched=pathlib.Path(folder) / "untouched",
            seconds=0.0,
            random=random.Random(arguments.seed),
        )
        for path in (scene.folder / "first", scene.untouched):  # the first one compiles
            begun = time.monotonic()
            code, log = scene.run(path)
            if code:
                sys.exit(log)
        scene = scene._replace(seconds=time.monotonic() - begun)
        for name in arguments.cases or CASES:
            trials = []
            for outcome in CASES[name](scene):
                print(f"{name}: {'held' if outcome.held else 'LOST'}: {outcome.seen}", flush=True)
                trials.append(outcome)
            outcomes[name] = summarise(trials)
    if not arguments.cases:
        write_table(outcomes, arguments.into)
    for name, outcome in outcomes.items():
        print(f"{name}: {outcome.held} of {outcome.trials} held")
    return int(any(outcome.held < outcome.trials for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
