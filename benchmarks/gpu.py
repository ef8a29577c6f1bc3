r"""Every measurement on a GPU, part by part, each within a limit of seconds.

    pip install -e '.[bench]' 'jax[cuda13]'        # CUDA 13, as torch has it
    python -m benchmarks.gpu --into=docs/BENCHMARKS --archives=FOLDER [--rounds=7] [PART ...]
    python -m benchmarks.gpu --into=/tmp/rehearsal --platform=cpu     # the same, tiny, on a CPU

Without PART all parts run. --seconds is for all of them; each has its share, and what a part leaves
goes to the later ones. One process works at a time, so that no compilation slows another. A
contender that is not ready within --limit seconds, or half of its part's, is left out in words.

A part reads our programs that an earlier one has compiled, from JAX_COMPILATION_CACHE_DIR or from a
folder that is removed at the end. The seconds of a contender's compilation are those without it.

Every result is written at once: contenders into the table of benchmarks.run, and everything into a
table of its own in the same page and into INTO_GPU.json.
"""

import argparse
import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import traceback
from typing import Any

from benchmarks import commands, tables
from benchmarks.cases import PLATFORMS
from benchmarks.parts import PARTS, Scene
from benchmarks.run import say

BEGIN, END = "<!-- written by benchmarks.gpu -->", "<!-- end of what benchmarks.gpu writes -->"
SECONDS = 580.0  # of ten minutes: jax starts once before the parts do
LEAST_SECONDS = 5  # of a part
CACHE = "JAX_COMPILATION_CACHE_DIR"

# in a process of its own, because a process that has started a GPU keeps memory of it
FIND_GPU = "import jax; print(jax.devices('cuda')[0].device_kind)"


def find_gpu() -> str:
    """The name of the GPU; ends the program with jax's reason if there is none."""
    # jax gives the reason why it finds no GPU only if JAX_PLATFORMS is empty
    environment = os.environ | PLATFORMS["gpu"] | {"JAX_PLATFORMS": ""}
    words = [sys.executable, "-c", FIND_GPU]
    search = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=100)
    if search.returncode:
        sys.exit((search.stderr.strip() or f"jax ended with {search.returncode}").splitlines()[-1])
    return search.stdout.strip().splitlines()[-1]


def share(names: list[str], seconds: float) -> float:
    """The part of some seconds that the first of some parts may take."""
    return seconds * PARTS[names[0]].seconds / sum(PARTS[name].seconds for name in names)


def write(into: pathlib.Path, name: str, row: dict[str, Any]) -> None:
    """Replace a part's older results in the JSON file, and write its table in the page anew."""
    path = into.with_name(f"{into.name}_GPU.json")
    rows = json.loads(path.read_text()) if path.exists() else {}
    rows[name] = row
    path.write_text(json.dumps(rows, indent=1) + "\n")
    lines = ["| part | what | measured |", "|---|---|---|"]
    for part, of_part in rows.items():
        spent = f"{of_part['seconds']:.0f} of at most {of_part['limit']:.0f}"
        for what, value in (of_part["results"] | {"seconds": spent}).items():
            lines.append(f"| {part} | {what} | {value} |")
    lines += tables.describe_machines(rows)
    tables.write_between(into.with_suffix(".md"), (BEGIN, END), "\n".join([*lines, ""]))


def measure(scene: Scene, name: str, limit: float, environment: dict[str, Any]) -> bool:
    """Run a part, and write each result at once; whether it reached its end."""
    say(f"{name}: at most {limit:.0f} s")
    begun, results = time.monotonic(), {}

    def keep(what: str, value: str) -> None:
        say(f"  {what}: {value}")
        results[what] = value
        row = {"limit": limit, "seconds": time.monotonic() - begun, "results": results}
        write(scene.into, name, row | {"environment": environment})

    try:
        for what, value in PARTS[name].measure(scene, begun + limit):
            keep(what, value)
    except Exception as error:  # the other parts go on: a GPU is lent for minutes
        if not isinstance(error, RuntimeError):
            traceback.print_exc()
            error = f"{type(error).__name__}: {error}"
        keep("failed", str(error))
    if not results:
        keep("failed", "it measured nothing")
    return "failed" not in results


def main() -> int:
    """Run the parts, one after another; the exit status is 1 if one failed."""
    about = "\n".join(f"  {name:12}{part.about}" for name, part in PARTS.items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nThe parts:\n{about}",
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--into", required=True, type=pathlib.Path, help="without its suffix")
    parser.add_argument("--archives", help="folder of the original archives of MNIST")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--platform", choices=list(PLATFORMS), default="gpu")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of all parts")
    parser.add_argument("--limit", type=float, default=120, help="seconds of each contender")
    arguments = parser.parse_args()
    unknown = set(arguments.parts) - set(PARTS)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    end = time.monotonic() + arguments.seconds
    environment = tables.environment(find_gpu() if arguments.platform == "gpu" else None)
    names, failed = arguments.parts or list(PARTS), []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        cache = os.environ.setdefault(CACHE, f"{folder}/cache")
        scene = Scene(
            folder=pathlib.Path(folder),
            cache=pathlib.Path(cache),
            into=arguments.into,
            rounds=arguments.rounds,
            ready_seconds=arguments.limit,
            archives=arguments.archives,
            platform=arguments.platform,
        )
        commands.hide_torch(scene.folder)
        for number, name in enumerate(names):
            limit = share(names[number:], end - time.monotonic())
            if limit < LEAST_SECONDS:  # an older result of the part stays
                say(f"{name}: not started, no time was left")
                failed.append(name)
            elif not measure(scene, name, limit, environment):
                failed.append(name)
    with contextlib.suppress(FileNotFoundError):
        print(arguments.into.with_suffix(".md").read_text())
    if failed:
        say(f"failed: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
