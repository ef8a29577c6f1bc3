r"""Profile of our training step, and its floor: the shortest time possible on the machine.

    python -m benchmarks.profile --size=mnist --batch-size=64 [--dtype=bfloat16]

The floor is the number of operations of all convolutions and matrix products, divided by the
measured rate of a large matrix product on all devices at once. The profile is the time in each kind
of operation of the compiled step, summed over the devices.
"""

import argparse
import collections
import pathlib
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import block_until_ready
from jax.extend.core import jaxprs_in_params

from benchmarks import ours
from diffusion_jax.runtime import devices

ROUNDS, CALLS = 7, 3
PRODUCTS = 10  # calls under way at once, so that the device does not wait for Python
GEMM = {"cpu": 2048, "gpu": 8192}  # side of the matrices
COPIED = {"cpu": 2**25, "gpu": 2**28}  # floats that are copied on each device
# parts of the names of the library calls in a program that is compiled for a GPU
LIBRARY_CALLS = {
    "convForward": "convolutions: forward",
    "convBiasActivationForward": "convolutions: forward",
    "convBackwardInput": "convolutions: by inputs",
    "convBackwardFilter": "convolutions: by weights",
    "cublas": "matrix products",
}


def operations(jaxpr: Any) -> float:
    """The number of multiplications and additions in a program's convolutions and products."""
    total = 0.0
    for equation in jaxpr.eqns:
        inputs, parameters = equation.invars, equation.params
        if equation.primitive.name == "conv_general_dilated":
            kernel = inputs[1].aval.shape
            spec = parameters["dimension_numbers"].rhs_spec
            taps = np.prod([kernel[axis] for axis in spec[1:]])
            dilated = np.prod(parameters["lhs_dilation"])  # the zeros between inputs do not count
            total += 2 * np.prod(equation.outvars[0].aval.shape) * taps / dilated
        elif equation.primitive.name == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            summed = np.prod([inputs[0].aval.shape[axis] for axis in contracted])
            total += 2 * np.prod(equation.outvars[0].aval.shape) * summed
        inner = [operations(program) for program in jaxprs_in_params(parameters)]
        if equation.primitive.name == "cond":  # by platform: the plain form has the most operations
            total += max(inner)
        else:
            total += sum(inner) * parameters.get("length", 1)  # of a scan
    return float(total)


def rate(function: Callable[..., Any], shape: tuple[int, ...], dtype: str, amount: float) -> float:
    """The highest measured rate of a function on all devices at once: ``amount`` per second."""
    count = jax.local_device_count()
    # random numbers: a GPU that multiplies equal numbers stays cooler, and is faster
    x = jax.random.normal(jax.random.key(0), (count, *shape), dtype)
    x = devices.divide(x, jax.local_devices())
    compiled = jax.pmap(function)
    block_until_ready(compiled(x))
    seconds = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        block_until_ready([compiled(x) for _ in range(PRODUCTS)])
        seconds.append(time.perf_counter() - begun)
    return count * PRODUCTS * amount / min(seconds)


def kind_of(name: str, definitions: dict[str, tuple[str, str]], bodies: dict[str, str]) -> str:
    """The kind of an operation of the compiled step, for the table."""
    rest, source = definitions.get(name, ("", ""))
    target = re.search(r'custom_call_target="([^"]*)"', rest)
    for part, kind in LIBRARY_CALLS.items():
        if target and part in target.group(1):
            return kind
    called = re.search(r"calls=%?([\w.\-]+)", rest)
    body = bodies.get(called.group(1), "") if called else f" {name.split('.')[0]}("
    gradient = "transpose(" in source
    if " convolution(" in body:
        return "convolutions: " + (
            "by weights" if not source else "by inputs" if gradient else "forward"
        )
    if " dot(" in body:
        return "matrix products"
    if "all-reduce" in name:
        return "all-reduce, with waiting for the other devices"
    if " reduce(" in body:
        return "sums"
    if " transpose(" in body or " copy(" in body:
        return "transposes, with what is fused into them"
    if " concatenate(" in body:
        return "concatenations"
    if " exponential(" in body:
        return "norm and SiLU"
    return "other elementwise"


def profile(text: str, run: Callable[[], None]) -> collections.Counter:
    """Nanoseconds in each kind of operation while ``run`` runs the compiled program ``text``."""
    bodies = {}
    for part in text.split("\n\n"):
        head = re.match(r"(?:ENTRY )?%?([\w.\-]+) ", part)
        if head:
            bodies[head.group(1)] = part
    definitions = {}
    for line in text.splitlines():
        match = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)", line)
        if match:
            source = re.search(r'op_name="([^"]*)"', line)
            definitions[match.group(1)] = match.group(2), source.group(1) if source else ""
    total = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            for line in plane.lines:
                for event in line.events:
                    # not the event's own name, which on a GPU is that of a kernel
                    if name := dict(event.stats).get("hlo_op"):
                        total[kind_of(name, definitions, bodies)] += event.duration_ns
    return total


def main() -> None:
    """Print the floor, the measured step and its profile."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--size", required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--dtype", default="float32", help="of the model and of the products")
    arguments = parser.parse_args()
    dtype = arguments.dtype
    steps, state, inputs, per_call, _ = ours.create_step(
        arguments.size, arguments.batch_size, {"model.dtype": dtype}
    )
    count, platform = jax.local_device_count(), jax.default_backend()
    needed = count * operations(jax.make_jaxpr(steps)(state, *inputs).jaxpr) / per_call
    side, copied = GEMM[platform], COPIED[platform]
    peak = rate(lambda x: x @ x, (side, side), dtype, 2 * side**3)
    bandwidth = rate(lambda x: x + 1, (copied,), "float32", 8 * copied)
    print(
        f"{count} {jax.devices()[0].device_kind} devices: {peak / 1e9:.0f} Gflop/s in a {dtype} "
        f"matrix product, {bandwidth / 1e9:.0f} GB/s"
    )
    print(f"operations of a step: {needed / 1e9:.1f} G, floor {1e3 * needed / peak:.2f} ms")
    compiled = steps.lower(state, *inputs).compile()

    def run() -> None:
        nonlocal state
        for _ in range(CALLS):
            state, metrics = compiled(state, *inputs)
            block_until_ready(metrics)

    run()
    seconds = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        run()
        seconds.append((time.perf_counter() - begun) / CALLS / per_call)
    median = statistics.median(seconds)
    print(f"measured: {1e3 * median:.2f} ms, {needed / peak / median:.0%} of the peak rate\n")
    print("| kind | ms of a step, all devices | share |\n|---|---|---|")
    total = profile(compiled.as_text(), run)
    for kind, nanoseconds in total.most_common():
        share = nanoseconds / total.total()
        print(f"| {kind} | {nanoseconds / 1e6 / CALLS / per_call:.2f} | {share:.0%} |")


if __name__ == "__main__":
    main()
