r"""Our figures and the peers' in turn on one machine, as a table.

    pip install -e '.[bench]'
    python -m benchmarks.run --into=docs/BENCHMARKS [--rounds=7] [CASE ...]

Without CASE all of a CPU; those of a GPU are benchmarks.gpu's. In each round every contender runs
once, each in a process of its own that waits while the others run; a ratio is the median over the
rounds of ours / the best peer's, which is the one of the smallest median. Each case that is done
goes into the JSON file beside the others, from which the table of the Markdown is written: a case
can be measured again by itself. The machine should do nothing else.
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
        # no pipe: nobody would read what a compiler has to say, and a full one stops it
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the process
        asked = {"do": case.do, "options": case.options, "platform": case.platform}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", contender, json.dumps(asked)],
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
            said = [text for text in self._errors.read().splitlines() if "Error" in text]
            raise RuntimeError(said[-1] if said else f"it ended with {code}")
        return json.loads(line)

    def seconds(self) -> float:
        """Run the case once."""
        print("go", file=self._process.stdin, flush=True)
        return self._answer()["seconds"]

    def peak_mib(self) -> float:
        """End it; the largest memory that it ever had."""
        self._process.stdin.close()
        peak = self._answer()["peak_mib"]
        self._process.wait()
        return peak


def measure(case: Case, rounds: int) -> tuple[dict[str, tables.Figures], str | None]:
    """The seconds of every contender in every round, or why it was left out; the GPU, if any."""
    workers, found, seconds = {}, {}, {}

    def leave_out(contender: str, error: RuntimeError) -> None:
        if contender == "ours":
            raise error
        say(f"  left out: {contender}: {error}")
        found[contender] = tables.Figures([], left_out=str(error))
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
        found[contender] = tables.Figures(seconds[contender], worker.peak_mib(), count)
    return found, workers["ours"].about.get("device")


def say(text: str) -> None:
    """Tell how far it is, beside the table."""
    print(text, file=sys.stderr, flush=True)


def parse_arguments(description: str, names: list[str]) -> argparse.Namespace:
    """The cases, of those that there are, the table that they go into, and how many rounds."""
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
    """Measure, and write both files after each case."""
    cases = CASES | GPU_CASES
    arguments = parse_arguments(__doc__, [*cases, *commands.COMMANDS])
    into = pathlib.Path(arguments.into)
    for name in arguments.cases or [*CASES, *commands.COMMANDS]:
        say(name)
        gpu = None
        if name in cases:
            case = cases[name]
            found, gpu = measure(case, arguments.rounds)
            fields = ("title", "do", "options", "amount", "unit", "per_second", "target")
        else:
            case = commands.COMMANDS[name]
            found = case.measure(say)
            fields = ("title", "amount", "unit", "per_second", "target", "limit")
        row = {field: getattr(case, field) for field in fields}
        tables.add(into, name, row, found, gpu)
    print(into.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
