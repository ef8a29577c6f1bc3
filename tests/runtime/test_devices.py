"""Training on several devices and processes: the same losses, one compilation, a joint end."""

import functools
import json
import signal
import socket
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import DIGITS, REPOSITORY, TOY2D, Run, arguments, checkpoint, run

from diffusion_jax.config.config import load
from diffusion_jax.data.batches import read_batches
from diffusion_jax.data.dataset import Split
from diffusion_jax.errors import ConfigError
from diffusion_jax.experiment.experiment import create_experiment
from diffusion_jax.runtime import devices
from diffusion_jax.runtime.workdir import Workdir
from diffusion_jax.training.step import (
    BETWEEN_DEVICES,
    Constants,
    TrainState,
    compile_steps,
    init_state,
    step_choices,
    train_step,
)

SMALL = DIGITS | {
    "model.dropout": 0.3,
    "model.class_conditional": "true",
    "optimizer.learning_rate": 1e-3,
}


@pytest.fixture(scope="module")
def experiment():
    overrides = [(name, str(value)) for name, value in SMALL.items()]
    config = load(str(REPOSITORY / "configs" / "digits.py"), overrides)
    return create_experiment(config)


def batches_of(count):
    source = np.random.default_rng(0)
    images = source.integers(0, 17, (count, 16, 8, 8, 1), dtype=np.uint8)
    return {"image": images, "label": source.integers(0, 10, (count, 16), dtype=np.int32)}


def create_steps(experiment, cpu_devices):
    """The compiled steps, the replicated state and constants, and the indices of each device."""
    step = functools.partial(train_step, step_choices(experiment, BETWEEN_DEVICES))
    state = init_state(experiment, seed=0, num_timesteps=10)
    constants = Constants(experiment.schedule, jax.random.key(1))
    inputs = devices.replicate((state, constants), cpu_devices)
    return compile_steps(step, cpu_devices), inputs, np.arange(16).reshape(len(cpu_devices), -1)


def share(batches, cpu_devices):
    """Reshape [step, example, ...] to [device, step, example, ...]."""
    return {
        name: np.moveaxis(leaf.reshape(len(leaf), len(cpu_devices), -1, *leaf.shape[2:]), 1, 0)
        for name, leaf in batches.items()
    }


def losses_of(experiment, num_devices, calls):
    """The losses of training steps and the state after them; ``calls`` has the steps per call."""
    cpu_devices = jax.devices()[:num_devices]
    steps, (state, constants), indices = create_steps(experiment, cpu_devices)
    batches, found, first = batches_of(sum(calls)), [], 0
    for count in calls:
        part = {name: leaf[first : first + count] for name, leaf in batches.items()}
        state, metrics = steps(state, constants, indices, share(part, cpu_devices))
        found.extend(np.asarray(metrics.loss))  # read at once: see MAX_IN_FLIGHT_ON_CPU
        first += count
    return np.array(found), devices.local_copy(state)


@pytest.fixture(scope="module")
def on_one(experiment):
    return losses_of(experiment, 1, [1] * 20)


@pytest.mark.parametrize("num_devices", [pytest.param(2, marks=pytest.mark.slow), 8])
def test_the_loss_does_not_depend_on_the_number_of_devices(experiment, on_one, num_devices):
    losses, _ = losses_of(experiment, num_devices, [1] * 20)
    np.testing.assert_allclose(losses, on_one[0], rtol=1e-5)
    assert len(set(losses)) == 20


@pytest.mark.slow  # test_train.py has a quick test of several steps per call
def test_several_steps_per_call_are_the_same_steps(experiment, on_one):
    losses, state = losses_of(experiment, 2, [4] * 5)
    np.testing.assert_allclose(losses, on_one[0], rtol=1e-5)
    assert state.step == 20
    # Adam divides by gradients that may be near 0: rounding may cost two of its steps of 1e-3 each
    for found, expected in zip(jax.tree.leaves(state.ema), jax.tree.leaves(on_one[1].ema)):
        np.testing.assert_allclose(found, expected, atol=2e-3)


def test_the_step_compiles_once_and_makes_no_implicit_transfers(experiment):
    """One compilation serves the step's own outputs and the arrays of a checkpoint."""
    cpu_devices = jax.devices()[:2]
    steps, (state, constants), indices = create_steps(experiment, cpu_devices)
    mesh = jax.sharding.Mesh(np.array(cpu_devices), ("device",))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("device"))
    batch = jax.device_put(share(batches_of(1), cpu_devices), spread)
    indices = jax.device_put(indices, spread)
    compiled = []

    def count(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    state, _ = steps(state, constants, indices, batch)
    jax.block_until_ready(state)
    restored = TrainState(*devices.local_copy(state))
    restored = devices.replicate(restored, cpu_devices)
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        with jax.transfer_guard("disallow"):
            for _ in range(3):
                state, metrics = steps(state, constants, indices, batch)
                jax.block_until_ready(metrics)
            restored, metrics = steps(restored, constants, indices, batch)
            jax.block_until_ready(metrics)
        assert not compiled
        jax.jit(lambda x: x * 3.25)(jnp.ones(7)).block_until_ready()
        assert compiled  # the listener does count compilations
    finally:
        jax.monitoring.unregister_event_duration_listener(count)


def test_rare_records_do_not_deadlock_two_devices(tmp_path):
    """If nothing reads the results of steps on several CPU devices, XLA aborts after 40 seconds."""
    fields = {"num_devices": 2, "train.num_steps": 400, "train.log_every_steps": 200}
    fields = TOY2D | fields | {"checkpoint.every_steps": 400}
    done = run(arguments(tmp_path / "run", fields), tmp_path / "log")
    assert done.code == 0, done.stderr
    assert "2 cpu devices" in done.stderr


def test_cpu_cores_become_devices_that_share_the_batch_evenly():
    counts = {
        (b, c): devices._devices_for(b, c) for b in (1, 8, 16, 48, 64, 100) for c in (1, 4, 7)
    }
    for (batch, cores), count in counts.items():
        assert batch % count == 0
        assert 1 <= count <= cores
        assert count == 1 or batch // count >= devices.MIN_EXAMPLES_PER_CORE
    assert counts[64, 4] == 4
    assert counts[64, 7] == 4
    assert counts[48, 7] == 6
    assert counts[16, 4] == 2
    assert counts[8, 4] == 1


@pytest.mark.parametrize(
    ("number", "process", "named"),
    [
        ("two", "0", "JAX_NUM_PROCESSES"),
        ("2", "-1", "JAX_PROCESS_ID"),
        ("2", "2", "JAX_PROCESS_ID"),
    ],
)
def test_a_wrong_process_number_is_named(monkeypatch, number, process, named):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", number)
    monkeypatch.setenv("JAX_PROCESS_ID", process)
    with pytest.raises(ConfigError, match=named):
        devices._join()


def start_two(workdir, fields, folder):
    """Start a run of two processes with one device each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    words = arguments(workdir, fields | {"distributed": "true", "num_devices": 1})
    together = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2"}
    return [Run(words, folder / f"log{i}", **together, JAX_PROCESS_ID=str(i)) for i in range(2)]


def losses_in(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return {record["step"]: record["loss"] for record in map(json.loads, lines)}


def test_two_processes_train_like_one_and_stop_together(tmp_path):
    """They have the losses of one process with two devices, which can resume their checkpoint."""
    together, alone = tmp_path / "together", tmp_path / "alone"
    endless = TOY2D | {"train.num_steps": 1_000_000, "train.sample_every_steps": 10}
    both = start_two(together, endless, tmp_path)
    while not (together / "checkpoints" / "20").exists():
        assert all(process.is_running() for process in both), both[0].wait().stderr
        time.sleep(0.01)
    both[1].kill(signal.SIGTERM)  # this process writes no files
    for process in both:
        done = process.wait()
        assert done.code == 143, done.stderr
    step = int(checkpoint(together)["step"])
    assert f"after saving step {step}\n" in done.stderr
    fields = TOY2D | {"num_devices": 2, "train.num_steps": step + 10}
    for workdir in (together, alone):
        done = run(arguments(workdir, fields), tmp_path / "log")
        assert done.code == 0, done.stderr
        assert ("resuming" in done.stderr) == (workdir is together)
    found, expected = losses_in(together), losses_in(alone)
    assert found.keys() == expected.keys()
    for at in list(found)[:2]:  # later losses differ more by rounding
        np.testing.assert_allclose(found[at], expected[at], rtol=1e-5)


def test_processes_fail_together_at_the_start(tmp_path):
    """If the first process finds the folder in use, the second one ends too."""
    with Workdir(tmp_path / "run").lock():
        first, second = (process.wait() for process in start_two(tmp_path / "run", TOY2D, tmp_path))
    assert first.code == 2
    assert first.stderr.splitlines()[-1].endswith("run: in use by another run")
    assert second.code == 1
    assert second.stderr.splitlines()[-1].startswith("RunError: another process of this run failed")


@pytest.mark.slow
def test_processes_fail_together_after_training(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "samples").touch()  # the first process needs a folder of this name
    first, second = (process.wait() for process in start_two(tmp_path / "run", TOY2D, tmp_path))
    assert (first.code, second.code) == (1, 1)
    assert first.stderr.splitlines()[-1].startswith("FileExistsError: ")
    assert second.stderr.splitlines()[-1].startswith("RunError: another process of this run failed")
    assert checkpoint(tmp_path / "run")["step"] == 40


def test_each_of_two_processes_reads_its_half_of_a_batch():
    images = np.arange(64, dtype=np.float32).reshape(32, 2)
    split = Split(images, None)
    whole = read_batches(split, 8, 0)
    halves = [read_batches(split, 8, 0, process_index=i, process_count=2) for i in range(2)]
    for _ in range(5):
        parts = [next(half)["image"] for half in halves]
        np.testing.assert_array_equal(np.concatenate(parts), next(whole)["image"])
