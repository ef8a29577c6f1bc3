"""A process that prepares one case for one contender, and runs it once for each line it reads.

    python -m benchmarks.worker CONTENDER CASE

CASE is JSON: "do", "options" and "platform". Every contender has a process of its own, so that the
peak memory is its own and no threads or caches are shared. The process prints JSON lines: facts
about the contender once it is ready, the seconds of each later run, and the peak memory at the end
of its input.

It is ready when it has prepared, compiled and run once, on a GPU twice. The seconds until then are
those without the imports, and as if nothing had been compiled before.
"""

import importlib
import json
import os
import resource
import sys
import time


def main(contender: str, case: str) -> None:
    """Prepare, run and answer; answers go to the original stdout, output of libraries to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(**fields: object) -> None:
        print(json.dumps(fields), file=answers)

    work = json.loads(case)
    if contender == "ours":
        # tensorboardX imports torch if it is installed; here only the peers need it
        sys.modules["torch"] = None
    name = "benchmarks.ours" if contender == "ours" else "benchmarks.peers"
    module = importlib.import_module(name)
    begun = time.perf_counter()
    run, about = getattr(module, work["do"])(contender, **work["options"])
    run()  # compiles
    on_gpu = work["platform"] == "gpu"
    if on_gpu:
        run()  # torch records CUDA graphs in the second run
        about["device"] = module.device_kind()
    ready_seconds = time.perf_counter() - begun + module.saved_seconds()
    answer(ready_seconds=ready_seconds, program_seconds=module.program_seconds(), **about)
    for _ in sys.stdin:
        begun = time.perf_counter()
        run()
        answer(seconds=time.perf_counter() - begun)
    if on_gpu:
        answer(peak_mib=module.peak_of_device() / 2**20)
    else:  # on Linux ru_maxrss is in KiB
        answer(peak_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


if __name__ == "__main__":
    main(*sys.argv[1:])
