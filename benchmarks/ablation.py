r"""Wall time of an ablation, relative to that of its jobs as separate runs.

    python -m benchmarks.ablation --config=configs/digits_offset.py --workdir=DIR [FLAGS]

It times whole commands, with start-up and compilation: the ablation with its report, and some of
its jobs as ``--mode=train``, which also samples as many images by the same chain, and then
``--mode=evaluate``. Both do the same arithmetic. The first single run fills the compilation cache
for the others, so that the median is that of runs with a warm cache; the ablation compiles its own
programs.
"""

import pathlib
import statistics
import subprocess
import sys
import time

from diffusion_jax.__main__ import parse_arguments
from diffusion_jax.ablation import grid
from diffusion_jax.config.config import load

MAIN = pathlib.Path(__file__).parent.parent / "main.py"
NUM_SINGLES = 3  # spread over the jobs; one before the ablation, the others after it


def seconds_of(words: list[str]) -> float:
    """The wall time of a command, which must succeed."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, str(MAIN), *words], check=True)
    return time.perf_counter() - begun


def main(argv: list[str]) -> None:
    """Print the times and their ratio."""
    arguments = parse_arguments([*argv, "--mode=ablate"])
    config = load(arguments.config_path, arguments.overrides)
    jobs = grid.create_jobs(config)
    path = pathlib.Path(arguments.workdir)
    flags = [f"--config={arguments.config_path}"]
    flags += [f"--config.{name}={value}" for name, value in arguments.overrides]

    def single(number: int) -> float:
        job = jobs[number]
        fields = {**job.arm.fields, "seed": job.seed}
        words = [*flags, *(f"--config.{name}={value}" for name, value in fields.items())]
        words += [f"--workdir={path / 'singles' / str(number)}"]
        return seconds_of([*words, "--mode=train"]) + seconds_of([*words, "--mode=evaluate"])

    def say(text: str) -> None:
        print(f"benchmark: {text}", flush=True)

    chosen = [number * len(jobs) // NUM_SINGLES for number in range(NUM_SINGLES)]
    singles = [single(chosen[0])]
    say(f"a single run: {singles[0]:.1f} s")
    ablation = seconds_of([*flags, f"--workdir={path / 'ablation'}", "--mode=ablate"])
    say(f"the ablation of {len(jobs)} jobs: {ablation:.1f} s")
    singles += [single(number) for number in chosen[1:]]
    median = statistics.median(singles)
    say(f"single runs: {', '.join(f'{seconds:.1f}' for seconds in singles)} s, median {median:.1f}")
    say(f"the ablation takes {ablation / (len(jobs) * median):.3f} of {len(jobs)} single runs")


if __name__ == "__main__":
    main(sys.argv[1:])
