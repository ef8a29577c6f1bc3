import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import REPOSITORY, TOY2D, Run, arguments, assert_same, checkpoint, run

from diffusion_jax.config.config import load, to_record
from diffusion_jax.experiment.experiment import create_experiment
from diffusion_jax.experiment.training import create_optimizer, describe_changes
from diffusion_jax.training.step import ema_decay

LONG = TOY2D | {"train.num_steps": 700, "checkpoint.every_steps": 35, "train.log_every_steps": 25}


def records(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k != "images_per_second"} for line in lines
    ]


def create_config(**fields):
    overrides = [(name, str(value)) for name, value in (TOY2D | fields).items()]
    return load(str(REPOSITORY / "configs" / "toy2d.py"), overrides)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run that came to its end."""
    folder = tmp_path_factory.mktemp("finished")
    done = run(arguments(folder / "run", TOY2D), folder / "log")
    assert done.code == 0, done.stderr
    return folder / "run"


@pytest.fixture
def workdir(finished, tmp_path):
    """A copy of it to do harm to."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The long run that nothing stopped."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    done = run(arguments(folder / "run", LONG), folder / "log")
    assert done.code == 0, done.stderr
    return folder / "run"


def assert_equals(workdir, uninterrupted):
    assert_same(checkpoint(workdir), checkpoint(uninterrupted))
    assert records(workdir) == records(uninterrupted)


def has_step(workdir, least):
    steps = [int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()]
    return max(steps, default=0) >= least


def wait_for_step(started, workdir, least):
    while not has_step(workdir, least):
        assert started.is_running(), started.wait().stderr
        time.sleep(0.01)


def test_killed_at_random_moments_it_ends_as_if_it_never_was(uninterrupted, tmp_path):
    chance = random.Random()
    moments, reached = [], 0
    for _ in range(3):
        started = Run(arguments(tmp_path / "run", LONG), tmp_path / "log")
        wait_for_step(started, tmp_path / "run", reached + 1)
        moments.append(chance.uniform(0, 0.4))
        time.sleep(moments[-1])
        started.kill()
        assert started.wait().code in (-signal.SIGKILL, 0)
        steps = [int(p.name) for p in (tmp_path / "run/checkpoints").glob("*") if p.name.isdigit()]
        reached = max(steps)
        if reached >= 600:
            break
    done = run(arguments(tmp_path / "run", LONG), tmp_path / "log")
    assert done.code == 0, (moments, done.stderr)
    assert "resuming at step" in done.stderr
    assert_equals(tmp_path / "run", uninterrupted)


def test_half_the_steps_and_then_the_rest_equal_all_of_them(uninterrupted, tmp_path):
    for num_steps in (350, 700):
        fields = LONG | {"train.num_steps": num_steps}
        assert run(arguments(tmp_path / "run", fields), tmp_path / "log").code == 0
    assert_equals(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
)
def test_a_signal_saves_and_the_same_command_goes_on_from_there(
    uninterrupted, tmp_path, number, code
):
    workdir = tmp_path / "run"
    started = Run(arguments(workdir, LONG), tmp_path / "log")
    wait_for_step(started, workdir, 35)
    started.kill(number)
    done = started.wait()
    assert done.code == code, done.stderr
    step = max(int(p.name) for p in (workdir / "checkpoints").glob("*"))
    assert f"after saving step {step}" in done.stderr
    assert checkpoint(workdir)["step"] == step < 700
    done = run(arguments(workdir, LONG), tmp_path / "log")
    assert done.code == 0, done.stderr
    assert f"resuming at step {step}\n" in done.stderr
    assert_equals(workdir, uninterrupted)


def test_a_workdir_in_use_is_refused_until_its_run_is_killed(tmp_path):
    fields = TOY2D | {"train.num_steps": 1_000_000}
    words = arguments(tmp_path / "run", fields)
    first = Run(words, tmp_path / "first")
    wait_for_step(first, tmp_path / "run", 10)
    second = run(words, tmp_path / "second")
    assert second.code == 2
    assert second.stderr.splitlines() == [f"--workdir={tmp_path}/run: in use by another run"]
    assert first.is_running()
    first.kill()
    first.wait()
    third = Run(words, tmp_path / "third")
    wait_for_step(third, tmp_path / "run", 20)
    third_log = tmp_path / "third.err"
    while not third_log.exists() or "resuming" not in third_log.read_text():
        assert third.is_running(), third.wait().stderr
        time.sleep(0.05)
    third.kill()
    third.wait()


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    poisoned = TOY2D | {"optimizer.learning_rate": 1e38, "train.log_every_steps": 7}
    poisoned |= {"optimizer.warmup_steps": 30, "checkpoint.every_steps": 1}
    done = run(arguments(tmp_path / "bad", poisoned), tmp_path / "log")
    assert done.code == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("NonFiniteLossError: step ")
    step = int(last.split()[2].rstrip(":"))
    assert all(np.isfinite(record["loss"]) for record in records(tmp_path / "bad"))
    assert all(record["step"] < step for record in records(tmp_path / "bad"))
    state = checkpoint(tmp_path / "bad")
    assert state["step"] == step - 1 > 0
    assert all(np.isfinite(array).all() for array in state.values())


def test_every_checkpoint_damaged_is_one_line(workdir, tmp_path):
    for file in (workdir / "checkpoints").glob("*/state/**/d/*"):
        file.write_bytes(b"")
    for mode in ("train", "sample"):
        done = run(arguments(workdir, TOY2D, mode=mode), tmp_path / "log")
        assert done.code == 1
        said = "NoIntactCheckpointError: none of the checkpoints [30, 40] is intact"
        assert done.stderr.splitlines()[-1] == said
        assert "Traceback" not in done.stderr


def test_a_checkpoint_of_another_model_is_one_line(workdir, tmp_path):
    """Where config.json, by which it would be refused before anything is done, is lost."""
    (workdir / "config.json").unlink()
    done = run(arguments(workdir, TOY2D | {"model.width": 8}), tmp_path / "log")
    assert done.code == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("OtherModelError: checkpoint has float32")
    assert checkpoint(workdir)["step"] == 40


def test_a_damaged_newest_checkpoint_costs_only_the_steps_since_the_one_before(workdir, tmp_path):
    good, lines = checkpoint(workdir), records(workdir)
    for file in (workdir / "checkpoints").glob("40/state/**/d/*"):
        file.unlink()
    done = run(arguments(workdir, TOY2D), tmp_path / "log")
    assert done.code == 0, done.stderr
    assert "checkpoint 40 is damaged" in done.stderr
    assert "resuming at step 30" in done.stderr
    assert_same(checkpoint(workdir), good)
    assert records(workdir) == lines


def test_calls_of_several_steps_go_on_where_single_steps_stopped(finished, tmp_path):
    """Stopped at step 13, resumed with ten steps per call: the next calls end at 20, 30, 40."""
    stopped = TOY2D | {"train.num_steps": 13}
    assert run(arguments(tmp_path / "run", stopped), tmp_path / "log").code == 0
    together = TOY2D | {"train.steps_per_call": 10}
    done = run(arguments(tmp_path / "run", together), tmp_path / "log")
    assert done.code == 0, done.stderr
    assert checkpoint(tmp_path / "run")["step"] == 40
    assert [r["step"] for r in records(tmp_path / "run")] == [10, 13, 20, 30, 40]
    states = checkpoint(tmp_path / "run"), checkpoint(finished)
    for name in states[1]:
        np.testing.assert_allclose(states[0][name], states[1][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("warmup", [True, False])
def test_ema_decay_is_the_formula(warmup):
    plan = create_experiment(create_config(**{"ema.decay": 0.95, "ema.warmup": warmup})).training
    steps = np.arange(0, 400, 7)
    expected = [min(0.95, (1 + k) / (10 + k)) if warmup else 0.95 for k in steps]
    found = [ema_decay(plan, jnp.int32(step)) for step in steps]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def adam_in_numpy(gradients, rates, b1, b2, weight_decay, clip_norm, x):
    """Kingma & Ba 2015, algorithm 1, with the decoupled decay of Loshchilov & Hutter 2019."""
    m = v = np.zeros_like(x)
    path = []
    for t, (gradient, rate) in enumerate(zip(gradients, rates), start=1):
        g = gradient * min(1, clip_norm / np.sqrt((gradient**2).sum()))
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        step = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + 1e-8)
        x = x - rate * (step + weight_decay * x)
        path.append(x)
    return np.array(path)


@pytest.mark.parametrize(("name", "weight_decay"), [("adam", 0.0), ("adamw", 0.0), ("adamw", 0.1)])
@pytest.mark.parametrize("decay", ["constant", "cosine"])
def test_the_optimizer_is_the_papers(name, weight_decay, decay):
    fields = {
        "name": name,
        "weight_decay": weight_decay,
        "decay": decay,
        "learning_rate": 0.03,
        "b1": 0.8,
        "b2": 0.95,
        "clip_norm": 1.5,
    }
    config = create_config(**{f"optimizer.{key}": value for key, value in fields.items()})
    k = np.arange(40)  # warm-up of 5 steps from 0, of 40 steps in all
    falling = 0.5 * (1 + np.cos(np.pi * (k - 5) / 35)) if decay == "cosine" else np.ones(40)
    rates = 0.03 * np.where(k < 5, k / 5, falling)
    source = np.random.default_rng(0)
    gradients = source.normal(size=(40, 6)) * source.uniform(0.1, 2, (40, 1))
    start = source.normal(size=6)
    expected = adam_in_numpy(gradients, rates, 0.8, 0.95, weight_decay, 1.5, start)
    optimizer = create_optimizer(config)
    # as a pytree of two leaves, whose norm is that of both
    params = {"a": jnp.float32(start[:2]), "b": jnp.float32(start[2:])}
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for gradient, wanted in zip(gradients, expected):
        tree = {"a": jnp.float32(gradient[:2]), "b": jnp.float32(gradient[2:])}
        updates, state = update(tree, state, params)
        params = optax.apply_updates(params, updates)
        found = np.concatenate([params["a"], params["b"]])
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_it_learns(uninterrupted):
    losses = [record["loss"] for record in records(uninterrupted)]
    assert np.mean(losses[-10:]) < 0.5 * losses[0]


def test_metrics_are_flat(uninterrupted):
    for record in records(uninterrupted):
        assert {"step", "loss", "gradient_norm"} <= record.keys()
        quartiles = [record[f"loss_quartile_{i}"] for i in range(1, 5)]
        assert min(quartiles) <= record["loss"] <= max(quartiles)


def test_can_be_lost_the_last_good_step_where_the_disk_is_full(finished, tmp_path):
    """A limit on the size of files stands for it: one line, and the step before is still there."""
    fields = TOY2D | {"train.num_steps": 1_000_000, "train.log_every_steps": 1_000_000}
    started = Run(arguments(tmp_path / "run", fields), tmp_path / "log")
    wait_for_step(started, tmp_path / "run", 10)
    started.limit_files(16_384)  # bytes: less than a checkpoint has, more than the log
    done = started.wait()
    assert done.code == 1
    last = done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert last.startswith("SaveError: checkpoint "), done.stderr
    assert "earlier checkpoints stay" in last
    assert "File too large" in last
    failed = int(last.split()[2])
    assert sum("Error" in line for line in done.stderr.splitlines()) == 1
    state = checkpoint(tmp_path / "run")
    assert state["step"] == failed - 10
    going_on = TOY2D | {"train.num_steps": failed, "train.log_every_steps": 1_000_000}
    done = run(arguments(tmp_path / "run", going_on), tmp_path / "log")
    assert done.code == 0, done.stderr
    assert checkpoint(tmp_path / "run")["step"] == failed


def test_can_be_lost_nothing_by_an_error_beside_the_checkpoints(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").mkdir()
    done = run(arguments(tmp_path / "run", TOY2D), tmp_path / "log")
    assert done.code == 1
    assert done.stderr.splitlines()[-1].startswith("IsADirectoryError: ")
    assert "Traceback" not in done.stderr


def test_means_two_things_an_option_of_jax_in_the_environment(finished, tmp_path):
    """The run is the one without it, and says so."""
    options = {"JAX_ENABLE_X64": "1", "JAX_DEFAULT_PRNG_IMPL": "rbg"}  # read when jax is imported
    words = [sys.executable, REPOSITORY / "main.py", *arguments(tmp_path / "run", TOY2D)]
    done = subprocess.run(words, env=os.environ | options, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "jax_enable_x64 = True: set to False, because results depend on it" in done.stderr
    assert "jax_default_prng_impl = rbg: set to threefry2x32" in done.stderr
    assert_same(checkpoint(tmp_path / "run"), checkpoint(finished))
    samples = (
        np.load(run / "samples/samples.npz")["points"] for run in (tmp_path / "run", finished)
    )
    np.testing.assert_array_equal(*samples)


@pytest.mark.parametrize(
    ("decay", "num_steps", "is_said"),
    [("cosine", 80, True), ("cosine", 20, True), ("cosine", 40, False), ("constant", 80, False)],
)
def test_knowable_at_the_start_another_number_of_steps_under_a_rate_that_decays(
    decay, num_steps, is_said
):
    fields = {"optimizer.decay": decay}
    recorded = to_record(create_config(**fields))
    config = create_config(**fields, **{"train.num_steps": num_steps})
    said = [
        f"config.train.num_steps = {num_steps}, it was 40: the cosine decay of the learning rate "
        f"now ends at step {num_steps}, so the steps that were taken had other rates than those of "
        f"a run of {num_steps} steps"
    ]
    assert describe_changes(config, recorded) == said * is_said
    assert describe_changes(config, None) == []


def test_knowable_at_the_start_fewer_steps_than_are_taken(workdir, tmp_path):
    fewer = TOY2D | {"train.num_steps": 30, "sampling.num_images": 1}
    done = run(arguments(workdir, fewer), tmp_path / "log")
    assert done.code == 0, done.stderr
    assert "checkpoint is of step 40, past config.train.num_steps = 30" in done.stderr
    assert checkpoint(workdir)["step"] == 40


GUIDED = {"guidance.weight": 1.5, "checkpoint.keep_last": 1, "checkpoint.keep_best": 0}


def test_knowable_at_the_start_a_checkpoint_that_guides_is_kept(tmp_path):
    """Pruned by age it would be missing when the training is over."""
    fields = TOY2D | GUIDED | {"guidance.weak_step": 10}
    done = run(arguments(tmp_path / "run", fields), tmp_path / "log")
    assert done.code == 0, done.stderr
    assert "guided away from step 10" in done.stderr
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["10", "40"]


@pytest.mark.parametrize(("step", "num_steps"), [(15, 60), (10, 60)])
def test_knowable_at_the_start_a_checkpoint_that_guides_will_not_be_there(
    workdir, tmp_path, step, num_steps
):
    """Between two saves, or removed already."""
    before = sorted(workdir.rglob("*"))
    fields = TOY2D | GUIDED | {"guidance.weak_step": step, "train.num_steps": num_steps}
    done = run(arguments(workdir, fields), tmp_path / "log")
    assert done.code == 2
    assert done.stderr.splitlines() == [
        f"config.guidance.weak_step = {step}: must be one of the checkpoints [30, 40], or a later "
        f"step that is saved: every 10 steps, and {num_steps}"
    ]
    assert sorted(workdir.rglob("*")) == before


def test_knowable_at_the_start_the_checkpoint_of_another_run_that_guides(workdir, tmp_path):
    fields = TOY2D | GUIDED | {"guidance.weak_workdir": workdir, "guidance.weak_step": 7}
    done = run(arguments(tmp_path / "other", fields), tmp_path / "log")
    assert done.code == 2
    assert done.stderr.splitlines()[-1].startswith("config.guidance.weak_step = 7: must be a check")
    assert not (tmp_path / "other").exists()
