r"""The cases measured for diffusion_jax and its peers in turn on one machine, as a table.

    pip install -e '.[bench]'
    python -m benchmarks.run --into=docs/BENCHMARKS [--rounds=7] [CASE ...]

Without CASE it runs all cases of a CPU; benchmarks.gpu runs those of a GPU. In each round every
contender runs once, in a process of its own that waits while the others run. A ratio is the median
over the rounds of our time / the time of the best peer, the one with the smallest median. A case
replaces its older measurement in the JSON file, and the table of the Markdown file is written from
that, so one case can be measured again by itself. The machine should do nothing else.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

from benchmarks import commands, tables
from benchmarks.cases import CASES, GPU_CASES, PLATFORMS, SIZES, Case

REPOSITORY = pathlib.Path(__file__).parent.parent


class Worker:
    """A process of benchmarks.worker."""

    def __init__(self, contender: str, case: Case) -> None:
        # not a pipe: nothing reads it, and a compiler that fills a pipe with warnings would block
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the process
        work = {"do": case.do, "options": case.options, "platform": case.platform}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", contender, json.dumps(work)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=REPOSITORY,
            env=os.environ | PLATFORMS[case.platform],
        )
        self.about = self._answer()

    def _answer(self) -> dict[str, float]:
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            errors = [text for text in self._errors.read().splitlines() if "Error" in text]
            raise RuntimeError(errors[-1] if errors else f"it ended with {code}")
        return json.loads(line)

    def seconds(self) -> float:
        """Run the case once; its wall time in seconds."""
        print("go", file=self._process.stdin, flush=True)
        return self._answer()["seconds"]

    def peak_mib(self) -> float:
        """End the process; its peak memory in MiB."""
        self._process.stdin.close()
        peak = self._answer()["peak_mib"]
        self._process.wait()
        return peak


def measure(case: Case, rounds: int) -> tuple[dict[str, tables.Figures], str | None]:
    """The measurements of every contender, or why it was left out; and the name of the GPU, if any.

    Raises:
        RuntimeError: ours fails.
        ValueError: a contender has another number of parameters than its architecture has.
    """
    workers, figures, seconds = {}, {}, {}

    def leave_out(contender: str, error: RuntimeError) -> None:
        if contender == "ours":
            raise error
        say(f"  left out: {contender}: {error}")
        figures[contender] = tables.Figures([], left_out=str(error))
        workers.pop(contender, None)

    for contender in ("ours", *case.peers):
        say(f"  starting {contender}")
        try:
            workers[contender] = Worker(contender, case)
            seconds[contender] = []
        except RuntimeError as error:
            leave_out(contender, error)
    for _ in range(rounds):
        for contender, worker in list(workers.items()):
            try:
                seconds[contender].append(worker.seconds())
            except RuntimeError as error:
                leave_out(contender, error)
    for contender, worker in workers.items():
        count = worker.about.get("num_parameters")
        if count and case.peers and contender.split()[0] in ("ours", "diffusers"):
            expected = SIZES[case.options["size"]].num_parameters
            if count != expected:
                raise ValueError(f"{contender} has {count} parameters, not {expected}")
        figures[contender] = tables.Figures(seconds[contender], worker.peak_mib(), count)
    return figures, workers["ours"].about.get("device")


def say(text: str) -> None:
    """Print the progress to standard error."""
    print(text, file=sys.stderr, flush=True)


def parse_arguments(description: str, names: list[str]) -> argparse.Namespace:
    """Parse the command line: the cases (of ``names``), the path of the table, the rounds."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(names)}")
    parser.add_argument("--into", required=True, help="path of the table without its suffix")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    unknown = set(arguments.cases) - set(names)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    return arguments


def main() -> None:
    """Measure the cases, and write both files after each case."""
    cases = CASES | GPU_CASES
    arguments = parse_arguments(__doc__, [*cases, *commands.COMMANDS])
    into = pathlib.Path(arguments.into)
    for name in arguments.cases or [*CASES, *commands.COMMANDS]:
        say(name)
        gpu = None
        if name in cases:
            case = cases[name]
            figures, gpu = measure(case, arguments.rounds)
            fields = ("title", "do", "options", "amount", "unit", "per_second", "target")
        else:
            case = commands.COMMANDS[name]
            figures = case.measure(say)
            fields = ("title", "amount", "unit", "per_second", "target", "limit")
        row = {field: getattr(case, field) for field in fields}
        tables.add(into, name, row, figures, gpu)
    print(into.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
