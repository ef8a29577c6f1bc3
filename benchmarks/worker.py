"""A process that has prepared one case for one contender and runs it whenever it is told to.

    python -m benchmarks.worker CONTENDER CASE

CASE is JSON: "do", "options" and "platform". Every contender has a process of its own, so that the
peak memory is its own and nobody's threads or caches serve another. It answers when it has run
once, then for each line that it reads runs again and answers the seconds, and at the end its peak
memory.
"""

import importlib
import json
import os
import resource
import sys
import time


def main(contender: str, case: str) -> None:
    """Answer on what was stdout; whatever libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(**fields: object) -> None:
        print(json.dumps(fields), file=answers)

    asked = json.loads(case)
    if contender == "ours":
        # tensorboardX imports torch wherever it is, which is here for the peers alone
        sys.modules["torch"] = None
    name = "benchmarks.ours" if contender == "ours" else "benchmarks.peers"
    module = importlib.import_module(name)
    run, about = getattr(module, asked["do"])(contender, **asked["options"])
    run()  # compiles
    on_gpu = asked["platform"] == "gpu"
    if on_gpu:
        run()  # the second time CUDA graphs are recorded
        about["device"] = module.device_kind()
    answer(**about)
    for _ in sys.stdin:
        begun = time.perf_counter()
        run()
        answer(seconds=time.perf_counter() - begun)
    if on_gpu:
        answer(peak_mib=module.peak_of_device() / 2**20)
    else:  # of Linux, in KiB
        answer(peak_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


if __name__ == "__main__":
    main(*sys.argv[1:])
