r"""The cases measured for diffusion_jax and its peers in turn on one machine, as a table.

    pip install -e '.[bench]'
    python -m benchmarks.run --into=docs/BENCHMARKS [--rounds=7] [--limit=600] [CASE ...]

Without CASE it runs all cases of a CPU; benchmarks.gpu those of a GPU. Contenders start and
compile one after another; one that is not ready within --limit seconds is left out. In each round
every contender runs once, in a process of its own that waits while the others run. A ratio is the
median over the rounds of our time / the time of the best peer, the one with the smallest median. A
case replaces its older measurement in the JSON file, and the table of the Markdown file is written
from that, so one case can be measured again by itself. The machine should do nothing else.
"""

import argparse
import contextlib
import json
import math
import os
import pathlib
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks import commands, tables
from benchmarks.cases import CASES, GPU_CASES, PLATFORMS, SIZES, Case

REPOSITORY = pathlib.Path(__file__).parent.parent
READY_SECONDS, ENDING_SECONDS = 600.0, 20.0


class NotReadyError(RuntimeError):
    """A contender was over its limit of seconds."""


class Limits(NamedTuple):
    """How long the contenders of a case may take, in seconds and in those of time.monotonic()."""

    to_be_ready: float = READY_SECONDS  # of each contender: it prepares, compiles and runs once
    last_start: float = math.inf  # a contender must be ready by then
    end: float = math.inf  # of all rounds


def kill(process: subprocess.Popen) -> None:
    """Kill a process that leads a session of its own, with those that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class Worker:
    """A process of benchmarks.worker, which must answer within a limit of seconds.

    A process that does not is killed, with those that it has started.
    """

    def __init__(
        self, contender: str, case: Case, limit: float, environment: dict[str, str] | None = None
    ) -> None:
        # not a pipe: nothing reads it, and a compiler that fills a pipe with warnings would block
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the process
        # torch keeps kernels there: a compilation must not find those of an earlier one
        self._kernels = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        work = {"do": case.do, "options": case.options, "platform": case.platform}
        caches = {"TORCHINDUCTOR_CACHE_DIR": self._kernels.name}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", contender, json.dumps(work)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=REPOSITORY,
            env=os.environ | PLATFORMS[case.platform] | caches | (environment or {}),
            start_new_session=True,
        )
        try:
            self.about = self._answer(limit, "not ready")
        except BaseException:
            self.kill()
            raise

    def _answer(self, limit: float, overdue: str) -> dict[str, Any]:
        # each answer is one line, so that none waits in a buffer, where select does not look
        seconds = None if math.isinf(limit) else limit
        if not select.select([self._process.stdout], [], [], seconds)[0]:
            self.kill()
            raise NotReadyError(f"{overdue} within {limit:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            errors = [text for text in self._errors.read().splitlines() if "Error" in text]
            raise RuntimeError(errors[-1] if errors else f"it ended with {code}")
        return json.loads(line)

    def seconds(self, limit: float) -> float:
        """Run the case once; its wall time in seconds."""
        with contextlib.suppress(BrokenPipeError):  # it has ended: the missing answer tells why
            print("go", file=self._process.stdin, flush=True)
        return self._answer(limit, "a round was not done")["seconds"]

    def peak_mib(self) -> float:
        """End the process; its peak memory in MiB."""
        self._process.stdin.close()
        peak = self._answer(ENDING_SECONDS, "its peak memory was not told")["peak_mib"]
        with contextlib.suppress(subprocess.TimeoutExpired):  # it may have files to remove
            self._process.wait(ENDING_SECONDS)
        return peak

    def kill(self) -> None:
        """End the process and those that it has started, whatever they do."""
        kill(self._process)


def start_all(
    case: Case, limits: Limits, leave_out: Callable[[str, RuntimeError], None]
) -> dict[str, Worker]:
    """The contenders that are ready; each starts once the one before it is ready or left out."""
    workers = {}
    for contender in ("ours", *case.peers):
        left = limits.last_start - time.monotonic()
        if left <= 0:
            leave_out(contender, NotReadyError("not started: no time was left"))
            continue
        say(f"  starting {contender}")
        try:
            workers[contender] = Worker(contender, case, min(limits.to_be_ready, left))
        except RuntimeError as error:
            leave_out(contender, error)
    return workers


def measure(
    case: Case, rounds: int, limits: Limits
) -> tuple[dict[str, tables.Figures], str | None]:
    """The measurements of every contender, or why it was left out; and the name of the GPU, if any.

    Raises:
        RuntimeError: ours fails other than by a limit.
        ValueError: a contender has another number of parameters than its architecture has.
    """
    workers, figures = {}, {}

    def leave_out(contender: str, error: RuntimeError) -> None:
        if contender == "ours" and not isinstance(error, NotReadyError):
            raise error
        say(f"  left out: {contender}: {error}")
        figures[contender] = tables.Figures([], left_out=str(error))
        if contender in workers:
            workers.pop(contender).kill()

    try:
        workers |= start_all(case, limits, leave_out)
        device = next((worker.about.get("device") for worker in workers.values()), None)
        seconds = {contender: [] for contender in workers}
        for number in range(rounds):
            if number and time.monotonic() > limits.end:
                say(f"  no time was left after {number} rounds")
                break
            for contender, worker in list(workers.items()):
                try:
                    left = max(limits.end - time.monotonic(), 1)
                    seconds[contender].append(worker.seconds(left))
                except RuntimeError as error:
                    leave_out(contender, error)
        for contender, worker in list(workers.items()):
            _require_parameters(case, contender, worker.about.get("num_parameters"))
            try:
                figures[contender] = tables.Figures(
                    seconds=seconds[contender],
                    peak_mib=worker.peak_mib(),
                    num_parameters=worker.about.get("num_parameters"),
                    ready_seconds=worker.about["ready_seconds"],
                )
            except RuntimeError as error:
                leave_out(contender, error)
    finally:
        for worker in workers.values():
            worker.kill()
    return {name: figures[name] for name in ("ours", *case.peers)}, device


def _require_parameters(case: Case, contender: str, count: int | None) -> None:
    if count and case.peers and contender.split()[0] in ("ours", "diffusers"):
        expected = SIZES[case.options["size"]].num_parameters
        if count != expected:
            raise ValueError(f"{contender} has {count} parameters, not {expected}")


def add(into: pathlib.Path, name: str, case: Case, rounds: int, limits: Limits) -> dict[str, Any]:
    """Measure a case, write its row into the table, and return it."""
    figures, gpu = measure(case, rounds, limits)
    fields = ("title", "do", "options", "amount", "unit", "per_second", "target")
    return tables.add(into, name, {field: getattr(case, field) for field in fields}, figures, gpu)


def say(text: str) -> None:
    """Print the progress to standard error."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Measure the cases, and write both files after each case."""
    cases = CASES | GPU_CASES
    names = [*cases, *commands.COMMANDS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(names)}")
    parser.add_argument("--into", required=True, help="path of the table without its suffix")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--limit",
        type=float,
        default=READY_SECONDS,
        help="seconds of a contender to be ready (%(default)g), or the row says that it was not",
    )
    arguments = parser.parse_args()
    unknown = set(arguments.cases) - set(names)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    into = pathlib.Path(arguments.into)
    for name in arguments.cases or [*CASES, *commands.COMMANDS]:
        say(name)
        if name in cases:
            add(into, name, cases[name], arguments.rounds, Limits(to_be_ready=arguments.limit))
            continue
        command = commands.COMMANDS[name]
        fields = ("title", "amount", "unit", "per_second", "target", "limit")
        row = {field: getattr(command, field) for field in fields}
        tables.add(into, name, row, command.measure(say), None)
    print(into.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
