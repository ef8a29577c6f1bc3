r"""Seconds to trace, lower and compile a program, its lines, and the memory that it needs.

    python -m benchmarks.compile --what=train --size=mnist --batch-size=64 [--platform=tpu]

``--what`` is train, sample or evaluate. Training also has its parts, each as a program of its own:
the network, the loss with the network, the gradient with the loss, clipping, the optimizer with
clipping, the averages and the exchange of the devices.

``--platform=tpu`` compiles for one v5e chip, or for ``--topology``, with libtpu and without a TPU
(pip install -e '.[bench-tpu]'). ``cpu`` and ``gpu`` compile for the devices of this machine. The
compilation cache is off. Prints a Markdown table.
"""

import argparse
import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

# libtpu reads these when it is loaded: there is no TPU, and no metadata server to ask for one.
WITHOUT_TPU = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
PLATFORMS = {"cpu": {"JAX_PLATFORMS": "cpu"}, "gpu": {}, "tpu": WITHOUT_TPU}
TOPOLOGY = "v5e:1x1"
TRACED = "/jax/core/compile/jaxpr_trace_duration"  # an event of jax
WHAT = ("train", "sample", "evaluate")
MIB = 2**20


class Measured(NamedTuple):
    """One program: seconds of the three stages, lines of StableHLO, bytes of the result."""

    trace: float
    lower: float
    compile: float
    lines: int
    temporaries: int
    code: int


def measure(compiled: Any, *arguments: Any) -> Measured:
    """Trace, lower and compile a jitted or pmapped function for arguments or their shapes."""
    # these import jax, for which the environment is set now
    from benchmarks.ours import SECONDS
    from diffusion_jax.runtime.compilation import COMPILED, LOWERED

    SECONDS.clear()
    lowered = compiled.lower(*arguments)
    program = lowered.compile()
    memory = program.memory_analysis()
    # the trace of the whole program contains those of the functions that it calls
    return Measured(
        *(max(SECONDS[stage]) for stage in (TRACED, LOWERED, COMPILED)),
        lines=lowered.as_text().count("\n"),
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
    )


def describe_topology(name: str) -> list[Any]:
    """The devices of a TPU topology that is not there."""
    from jax.experimental import topologies

    chips = [int(side) for side in name.partition(":")[2].split("x")]
    bounds = [*chips, 1]
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=name, chips_per_host_bounds=bounds
    )
    return list(topology.devices)


def create_programs(
    what: str, size: str, batch_size: int, dtype: str, devices: list[Any] | None
) -> dict[str, Callable[[], Measured]]:
    """The programs of a mode by their names; ``devices`` None: those of this machine."""
    from benchmarks import programs  # which imports jax too

    create = {
        "train": programs.of_training,
        "sample": programs.of_sampling,
        "evaluate": programs.of_evaluation,
    }[what]
    created = create(size, batch_size, dtype, devices)
    return {name: functools.partial(measure, *program) for name, program in created.items()}


def main() -> None:
    """Print the row of each program as soon as it is compiled."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--what", choices=WHAT, required=True)
    parser.add_argument("--size", required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--platform", choices=PLATFORMS, default="cpu")
    parser.add_argument("--topology", default=TOPOLOGY, help="of a TPU, such as v5e:2x4")
    parser.add_argument("--dtype", default="float32", help="of the model")
    parser.add_argument("--parts", nargs="*", help="the programs to measure; without it, all")
    arguments = parser.parse_args()
    os.environ.update(PLATFORMS[arguments.platform])
    import jax

    jax.config.update("jax_enable_compilation_cache", False)
    devices = describe_topology(arguments.topology) if arguments.platform == "tpu" else None
    named = create_programs(
        arguments.what, arguments.size, arguments.batch_size, arguments.dtype, devices
    )
    unknown = set(arguments.parts or ()) - set(named)
    if unknown:
        parser.error(f"--parts: {', '.join(sorted(unknown))}: must be in {', '.join(named)}")
    kind = devices[0].device_kind if devices else jax.devices()[0].device_kind
    print(
        f"{arguments.size}, batch {arguments.batch_size}, {arguments.dtype}, {kind}, jax "
        f"{jax.__version__}\n"
    )
    print("| program | trace s | lower s | compile s | lines | temporaries MiB | code MiB |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for name in arguments.parts or named:
        one = named[name]()
        print(
            f"| {name} | {one.trace:.1f} | {one.lower:.1f} | {one.compile:.1f} | {one.lines:,} | "
            f"{one.temporaries / MIB:.1f} | {one.code / MIB:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
