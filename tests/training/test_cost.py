"""The cost of a compiled training step in operations and bytes, which are counted, not timed.

test_devices.py tests that the step compiles once and makes no implicit transfers; test_samplers.py
tests that a chain of any sampler is one scan.
"""

import functools
import platform
import subprocess
import sys

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import DIGITS, REPOSITORY

from diffusion_jax.config.config import load
from diffusion_jax.diffusion import samplers, schedules
from diffusion_jax.diffusion.process import Prediction
from diffusion_jax.diffusion.streams import Stream, stream_key
from diffusion_jax.experiment.experiment import create_experiment
from diffusion_jax.runtime import devices
from diffusion_jax.training.step import ALONE, Constants, init_state, step_choices, train_step

BATCH_SIZE = 16
MODEL = {"model.width": 16, "train.batch_size": BATCH_SIZE}


@pytest.fixture(scope="module")
def experiment():
    fields = DIGITS | MODEL
    overrides = [(name, str(value)) for name, value in fields.items()]
    return create_experiment(load(str(REPOSITORY / "configs/digits.py"), overrides))


@pytest.fixture(scope="module")
def step(experiment):
    """The compiled training step of a device that has the whole batch, and its first state."""
    step = functools.partial(train_step, step_choices(experiment, ALONE))
    schedule = experiment.schedule
    state = init_state(experiment, seed=0, num_timesteps=len(schedule))
    images = np.zeros((BATCH_SIZE, *experiment.dataset.shape), np.uint8)
    batch = {"image": images, "label": None}
    constants = Constants(schedule, stream_key(0, Stream.TRAINING))
    inputs = state, constants, np.arange(BATCH_SIZE), batch
    return jax.jit(step, donate_argnums=0).lower(*inputs).compile(), state


def forward_flops(experiment, trains):
    """The operations of a forward pass; the network gets dropout keys if it trains."""
    x_t = jax.ShapeDtypeStruct((BATCH_SIZE, *experiment.dataset.shape), jnp.float32)
    timestep = jax.ShapeDtypeStruct((BATCH_SIZE,), jnp.float32)
    params = jax.eval_shape(experiment.model.init, jax.random.key(0))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), BATCH_SIZE))

    def forward(params, x_t, timestep, keys):
        return experiment.model.apply(params, x_t, timestep, None, keys)

    lowered = jax.jit(forward).lower(params, x_t, timestep, keys if trains else None)
    return lowered.compile().cost_analysis()["flops"]


def test_a_step_has_the_operations_of_three_forward_passes(experiment, step):
    """These are the network, its gradient for the weights and its gradient for the activations."""
    assert 2.3 < step[0].cost_analysis()["flops"] / forward_flops(experiment, trains=True) < 3.3


def test_a_network_that_does_not_train_has_fewer_operations(experiment):
    """Winograd's convolutions save more multiplications than the additions they cost."""
    ratio = forward_flops(experiment, trains=False) / forward_flops(experiment, trains=True)
    assert 0.5 < ratio < 0.95


def test_the_state_is_updated_in_place(step):
    compiled, state = step
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    analysis = compiled.memory_analysis()
    assert analysis.alias_size_in_bytes >= size
    assert (
        analysis.output_size_in_bytes < 1.01 * size
    )  # 1 % for the metrics and a table of addresses


def test_the_lean_gradient_needs_less_memory_than_the_plain_one(experiment):
    """Dropout keys select the lean gradient, because they mean that the network trains."""
    params = jax.eval_shape(experiment.model.init, jax.random.key(0))
    x_t = jax.ShapeDtypeStruct((BATCH_SIZE, *experiment.dataset.shape), jnp.float32)
    timestep = jax.ShapeDtypeStruct((BATCH_SIZE,), jnp.float32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), BATCH_SIZE))

    def loss(params, x_t, timestep, keys):
        return jnp.mean(jnp.square(experiment.model.apply(params, x_t, timestep, None, keys)))

    def temporaries(keys):
        compiled = jax.jit(jax.grad(loss)).lower(params, x_t, timestep, keys).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(keys) < 0.9 * temporaries(None)


@pytest.mark.parametrize("num_steps", [1, 7])
def test_a_chain_is_a_scan_of_its_length_that_traces_the_network_once(num_steps):
    traced = []

    def predict(x_t, row):
        traced.append(())
        return Prediction(0 * x_t, x_t)

    rows = schedules.respace(schedules.cosine(100), num_steps)

    def chain(key):
        return samplers.sample(key, predict, rows, samplers.ancestral(), (2, 3))

    equations = jax.make_jaxpr(chain)(jax.random.key(0)).jaxpr.eqns
    lengths = [e.params["length"] for e in equations if e.primitive.name == "scan"]
    assert lengths == [num_steps]
    assert len(traced) == 1


KEPT = """
import resource
import sys

import jax
import jax.numpy as jnp

from diffusion_jax.runtime import devices

devices.start(1, 1, False, divide=True)
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
double = jax.jit(lambda x: jnp.cumsum(2 * x)[::-1])
x = jnp.ones(2**23)  # 32 MiB
least = 9.0
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    double(x).block_until_ready()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    least = min(least, faults * resource.getpagesize() / x.nbytes)
print(least)
"""


GIVEN_BACK = """
import re
import sys

import jax
import numpy as np

from diffusion_jax.runtime import devices

devices.start(1, 1, False, divide=False)


def resident_mib():
    with open("/proc/self/status") as file:
        return int(re.search(r"VmRSS:\\s+([0-9]+)", file.read()).group(1)) / 1024


blocks = [np.ones(2**13) for _ in range(4096)]  # 256 MiB, freed but for the one on top
before, blocks = resident_mib(), blocks[-1]
kept = before - resident_mib()
jax.monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", 2.0)
print(kept, before - resident_mib())
"""
FILLED = """
import ctypes

import jax

from diffusion_jax.runtime import devices

devices.start(1, 1, False, divide=True)
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_size_t, (ctypes.c_size_t,)
libc.free.argtypes = (ctypes.c_size_t,)
blocks = [libc.malloc(20_000) for _ in range(4096)]
for hole in blocks[::2]:
    libc.free(hole)
reused = libc.malloc(20_000) in blocks
jax.monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", 2.0)
print(int(reused), sum(libc.malloc(20_000) in blocks for _ in range(1000)))
"""
THREADS = """
import os

import jax

from diffusion_jax.runtime import devices

devices.start(None, 1, False, divide=False)
jax.jit(lambda x: x + 1)(1.0).block_until_ready()
threads = os.listdir("/proc/self/task")
names = [open(f"/proc/self/task/{thread}/comm").read() for thread in threads]
print(sum(name.startswith("tf_XLAEigen") for name in names))
"""
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")


def printed(script):
    """The numbers that a script prints in a new process."""
    words = [sys.executable, "-c", script, str(conftest.CACHE)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    return [float(word) for word in done.stdout.split()]


@glibc
def test_freed_memory_is_kept_for_the_next_step():
    """The pages of a call's two arrays do not fault again.

    One of the two arrays may still fault if a thread was started before.
    """
    assert printed(KEPT)[0] < 1.5


@glibc
def test_memory_that_the_compiler_frees_is_returned_to_the_system():
    kept, given_back = printed(GIVEN_BACK)
    assert kept < 16
    assert given_back > 200


@glibc
def test_small_allocations_do_not_search_the_holes_that_the_compiler_leaves():
    """Otherwise a step would search tens of thousands of holes for each small array."""
    reused, reused_after = printed(FILLED)
    assert reused
    assert reused_after < 10


@pytest.mark.skipif(sys.platform != "linux", reason="threads have their names there")
@pytest.mark.skipif(devices.count_cores() == 1, reason="there is one thread anyway")
def test_one_image_is_sampled_by_one_thread(monkeypatch):
    """Its operations take microseconds, so passing them between two threads would cost more."""
    monkeypatch.delenv("NPROC", raising=False)
    assert printed(THREADS) == [1]
