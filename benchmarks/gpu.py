r"""Every measurement on a GPU, one after another.

    pip install -e '.[bench]' 'jax[cuda13]'        # CUDA 13, as torch has it
    python -m benchmarks.gpu --into=docs/BENCHMARKS [--rounds=7] [CASE ...]

First whether the project trains and then samples there at all, by main.py. Then the cases of a GPU
next to the peers, all or those named, into the table. Last the floor and the profile of the
training step in bfloat16: its share of the measured rate of a matrix product.
"""

import os
import subprocess
import sys
import tempfile
import time

from benchmarks.cases import GPU_CASES, PLATFORMS
from benchmarks.run import REPOSITORY, parse_arguments, say

# by a process of its own, for one that has found a GPU keeps memory of it
FIND_GPU = "import jax; jax.devices('cuda')"
TRAINED_STEPS = 200


def call(*words: str) -> None:
    """Run this Python on the GPU; its output is shown, and it must succeed."""
    say(f"+ python {' '.join(words)}")
    begun = time.perf_counter()
    environment = os.environ | PLATFORMS["gpu"]
    subprocess.run([sys.executable, *words], cwd=REPOSITORY, env=environment, check=True)
    say(f"  {time.perf_counter() - begun:.0f} s")


def main() -> None:
    """Say what is run and how long it took."""
    arguments = parse_arguments(__doc__, list(GPU_CASES))
    environment = os.environ | PLATFORMS["gpu"] | {"JAX_PLATFORMS": ""}  # or jax says nothing
    words = [sys.executable, "-c", FIND_GPU]
    found = subprocess.run(words, env=environment, capture_output=True, text=True)
    if found.returncode:
        sys.exit((found.stderr.strip() or f"jax ended with {found.returncode}").splitlines()[-1])

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
