r"""Every measurement on a GPU, one after another.

    pip install -e '.[bench]' 'jax[cuda13]'        # CUDA 13, as torch has it
    python -m benchmarks.gpu --into=docs/BENCHMARKS [--rounds=7] [CASE ...]

First main.py trains and samples, to show that the project works there. Then benchmarks.run measures
the cases of a GPU (or those named), with the peers, and writes the table. Last benchmarks.profile
prints the floor and the profile of the training step in bfloat16.
"""

import os
import subprocess
import sys
import tempfile
import time

from benchmarks.cases import GPU_CASES, PLATFORMS
from benchmarks.run import REPOSITORY, parse_arguments, say

# in a process of its own, because a process that has started a GPU keeps memory of it
FIND_GPU = "import jax; jax.devices('cuda')"
TRAINED_STEPS = 200


def call(*words: str) -> None:
    """Run a command of this Python on the GPU, show its output, and fail if it fails."""
    say(f"+ python {' '.join(words)}")
    begun = time.perf_counter()
    environment = os.environ | PLATFORMS["gpu"]
    subprocess.run([sys.executable, *words], cwd=REPOSITORY, env=environment, check=True)
    say(f"  {time.perf_counter() - begun:.0f} s")


def main() -> None:
    """Run every measurement, and print the command and the duration of each."""
    arguments = parse_arguments(__doc__, list(GPU_CASES))
    # jax gives the reason why it finds no GPU only if JAX_PLATFORMS is empty
    environment = os.environ | PLATFORMS["gpu"] | {"JAX_PLATFORMS": ""}
    words = [sys.executable, "-c", FIND_GPU]
    search = subprocess.run(words, env=environment, capture_output=True, text=True)
    if search.returncode:
        sys.exit((search.stderr.strip() or f"jax ended with {search.returncode}").splitlines()[-1])

    with tempfile.TemporaryDirectory() as folder:
        words = "main.py", "--config=configs/digits.py", f"--workdir={folder}/run"
        call(*words, f"--config.train.num_steps={TRAINED_STEPS}")
    cases = arguments.cases or list(GPU_CASES)
    into = f"--into={arguments.into}", f"--rounds={arguments.rounds}"
    call("-m", "benchmarks.run", *into, *cases)
    training = GPU_CASES["gpu-train"].options
    network = f"--size={training['size']}", f"--batch-size={training['batch_size']}"
    call("-m", "benchmarks.profile", *network, f"--dtype={training['dtype']}")


if __name__ == "__main__":
    main()
