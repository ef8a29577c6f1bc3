"""Ablations: padded schedules, three ways to train arms, kills, scores; arms equal single runs."""

import contextlib
import csv
import functools
import html
import json
import os
import random
import re
import shlex
import shutil
import signal
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import DIGITS, REPOSITORY, Run, arguments, assert_same, checkpoint, run

from diffusion_jax.ablation import ablate, collecting, comparison, grid, slots
from diffusion_jax.ablation.jobs import Parallel, Site, folder_of, is_finished
from diffusion_jax.ablation.slots import choose_parallel
from diffusion_jax.ablation.training import train_jobs
from diffusion_jax.config import config as configuration
from diffusion_jax.data.load import load_dataset
from diffusion_jax.diffusion import losses, schedules
from diffusion_jax.diffusion.losses import Examples, LossInputs, Objective
from diffusion_jax.diffusion.parametrisations import PREDICTIONS
from diffusion_jax.diffusion.timesteps import TIMESTEP_SAMPLERS
from diffusion_jax.diffusion.variances import VARIANCES
from diffusion_jax.diffusion.weightings import WEIGHTINGS
from diffusion_jax.errors import ConfigError, RunError
from diffusion_jax.evaluation import classifier as classifiers
from diffusion_jax.evaluation.classifier import Classifier, load_classifier
from diffusion_jax.experiment.dataset import create_dataset_choice
from diffusion_jax.models.classifier import create_classifier
from diffusion_jax.runtime.checkpoint import saved_steps
from diffusion_jax.runtime.workdir import Workdir
from diffusion_jax.sampling.gallery import grids_in_training
from diffusion_jax.sampling.generator import Generator
from diffusion_jax.training.run import Run as TrainingRun
from diffusion_jax.training.step import StepMetrics, train_step
from diffusion_jax.training.train import train

# Padded schedules


def objective(timesteps="uniform", is_vlb=False, variance="posterior"):
    return Objective(
        parametrisation=PREDICTIONS["eps"],
        weighting=WEIGHTINGS["simple"](),
        is_vlb=is_vlb,
        variance=VARIANCES[variance],
        vlb_scale=0.001,
        timesteps=TIMESTEP_SAMPLERS[timesteps],
        levels=17,
        num_classes=3,
        label_dropout=0.0,
    )


def half(params, x_t, timestep, label, keys):
    """A network without parameters."""
    return 0.5 * x_t + 0.01 * timestep[:, None, None]


@functools.partial(jax.jit, static_argnums=(0, 1))
def losses_of(timesteps, is_vlb, schedule, seed):
    x_0 = jax.random.uniform(jax.random.key(9), (64, 3, 2), minval=-1.0)
    examples = Examples(x_0=x_0, label=None, indices=jnp.arange(64), batch_size=64)
    key = jax.random.key(seed)
    inputs = LossInputs(schedule=schedule, timestep_state=(), key=key, examples=examples)
    return losses.discrete_time(objective(timesteps, is_vlb), half)({}, inputs)


def poisoned(schedule, num_timesteps):
    """The schedule with NaN in all rows past T, except in the timesteps, which determine T."""
    counts = np.arange(len(schedule)) < num_timesteps
    columns = {
        name: np.where(counts, getattr(schedule, name), np.nan)
        for name in schedule.__dataclass_fields__
        if name != "timestep"
    }
    return schedules.Schedule(timestep=schedule.timestep, **columns)


@pytest.mark.parametrize("num_timesteps", [1, 2, 10])
def test_a_padded_schedule_keeps_its_rows_and_its_T(num_timesteps):
    schedule = schedules.cosine(num_timesteps)
    padded = schedules.pad(schedule, 25)
    assert len(padded) == 25
    assert schedules.num_timesteps(padded) == num_timesteps
    assert schedules.num_timesteps(schedule) == num_timesteps
    for column, before in zip(jax.tree.leaves(padded), jax.tree.leaves(schedule)):
        np.testing.assert_array_equal(column[:num_timesteps], before)
        assert (column[num_timesteps:] == before[-1]).all()


def test_a_schedule_padded_to_its_own_length_is_itself():
    schedule = schedules.linear(10)
    for column, before in zip(
        jax.tree.leaves(schedules.pad(schedule, 10)), jax.tree.leaves(schedule)
    ):
        np.testing.assert_array_equal(column, before, strict=True)
    with pytest.raises(ValueError, match="length = 9: must be at least the 10 rows there are"):
        schedules.pad(schedule, 9)


@pytest.mark.parametrize(("timesteps", "is_vlb"), [("uniform", True), ("low_discrepancy", False)])
@pytest.mark.parametrize("num_timesteps", [1, 10, 24])
def test_rows_past_T_are_never_seen(num_timesteps, timesteps, is_vlb):
    """Losses equal those of the schedule without padding, bit for bit, also for NaN padding."""
    schedule = schedules.cosine(num_timesteps)
    padded = schedules.pad(schedule, 25)
    for seed in range(3):
        expected = losses_of(timesteps, is_vlb, schedule, seed)
        assert np.isfinite(expected.losses).all()
        assert len(np.unique(expected.rows)) > num_timesteps // 2
        for other in (padded, poisoned(padded, num_timesteps)):
            ours = losses_of(timesteps, is_vlb, other, seed)
            for one, reference in zip(ours, expected):
                np.testing.assert_array_equal(one, reference, strict=True)


@pytest.mark.parametrize("num_timesteps", [1, 2, 10])
def test_the_clipped_variance_is_that_of_the_schedule_without_padding(num_timesteps):
    schedule = schedules.cosine(num_timesteps)
    expected = schedules.clip_posterior_variance(schedule).posterior_variance
    assert (expected > 0).all()
    padded = schedules.pad(schedule, 25)
    for other in (padded, poisoned(padded, num_timesteps)):
        clipped = schedules.clip_posterior_variance(other).posterior_variance
        np.testing.assert_array_equal(clipped[:num_timesteps], expected)


# Three ways to train arms

TINY = DIGITS | {
    "train.num_steps": 7,
    "train.log_every_steps": 1,
    "checkpoint.every_steps": 3,
    "ablate.seeds": (1,),
    "ablate.grid": "schedule.s=0,0.02 | schedule.num_timesteps=14",
}


@pytest.fixture(scope="module")
def digits(data_dir):
    config = load({"dataset.data_dir": data_dir})
    return load_dataset(create_dataset_choice(config))


def load(fields):
    overrides = [(name, str(value)) for name, value in (TINY | fields).items()]
    return configuration.load(str(REPOSITORY / "configs" / "digits.py"), overrides)


def create_jobs(fields, data_dir):
    return grid.create_jobs(load({"dataset.data_dir": data_dir} | fields))


def records(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k != "images_per_second"} for line in lines
    ]


@pytest.fixture(scope="module")
def devices():
    return jax.devices()[:2]


@pytest.fixture(scope="module")
def alone(data_dir, digits, devices, tmp_path_factory):
    """Each arm trained as a single run, as `--mode=train` does, on the same devices."""
    path = tmp_path_factory.mktemp("alone")
    jobs = create_jobs({}, data_dir)
    for job in jobs:
        experiment, workdir = job.experiment, folder_of(job, path)
        generator = Generator(experiment, None, devices)
        every = experiment.training.sample_every_steps
        on_step = grids_in_training(generator, every, workdir.samples)
        with workdir.lock():
            train(experiment, digits, workdir, devices, on_step)
    return path


SAVE = TrainingRun.save


def interrupted_save(self, state):
    """Save, then send SIGTERM to this process."""
    SAVE(self, state)
    signal.raise_signal(signal.SIGTERM)


# The tolerances are relative for logged numbers and absolute for parameters, which are of size 1;
# the measured differences are 1.3e-7 and 1e-6
@pytest.mark.parametrize(
    ("parallel", "per_device", "resumed", "rtol", "atol"),
    [
        ("sequence", 1, ["4"], 0, 0),
        ("device", 1, ["3"], 1e-5, 1e-5),
        pytest.param("vmap", 2, [], 1e-5, 1e-5, marks=pytest.mark.slow),
    ],
)
def test_arms_are_trained_like_single_runs_with_one_compiled_step(
    alone,
    data_dir,
    digits,
    devices,
    tmp_path,
    monkeypatch,
    caplog,
    parallel,
    per_device,
    resumed,
    rtol,
    atol,
):
    """The jobs have two lengths of schedule, T = 10 and 14, and share one compiled step.

    With "device" five jobs share two slots, so the third one is cut at its first checkpoint.
    """
    more = " | schedule.s=0.001 | schedule.name=linear" if parallel == "device" else ""
    caplog.set_level("INFO", "diffusion_jax")
    jobs = create_jobs({"ablate.grid": TINY["ablate.grid"] + more}, data_dir)
    traced = []

    def step(choices, state, constants, *others):
        traced.append(len(constants.schedule))
        return train_step(choices, state, constants, *others)

    monkeypatch.setattr(slots, "train_step", step)
    inputs = jobs, Site(digits, tmp_path, devices, Parallel(parallel, per_device)), {}
    if parallel == "sequence":  # stop at the first checkpoint, then resume with the same call
        with monkeypatch.context() as patched:
            patched.setattr(TrainingRun, "save", interrupted_save)
            assert train_jobs(*inputs) == signal.SIGTERM
        assert checkpoint(folder_of(jobs[0], tmp_path).path)["step"] == 4
        traced.clear()
    assert train_jobs(*inputs) is None
    assert re.findall(r"resuming at step (\d)", caplog.text) == resumed
    for job in jobs[:3]:
        ours, theirs = folder_of(job, tmp_path).path, folder_of(job, alone).path
        logged, expected = records(ours), records(theirs)
        assert [record["step"] for record in logged] == list(range(1, 8))
        for one, reference in zip(logged, expected):
            assert one.keys() == reference.keys()
            for name in reference:
                np.testing.assert_allclose(one[name], reference[name], rtol=rtol)
        assert "7" in {p.name for p in (ours / "checkpoints").iterdir()}
        state, expected = checkpoint(ours), checkpoint(theirs)
        assert state.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_allclose(state[name], array, rtol=rtol, atol=atol, err_msg=name)
    assert traced == [14]


@pytest.fixture
def traced(monkeypatch):
    """Replace the training step by one that learns nothing and compiles fast.

    Gives a list of the schedule's number of rows at each tracing. With T = 3 the loss is NaN.
    """
    lengths = []

    def step(choices, state, constants, *others):
        lengths.append(len(constants.schedule))
        loss = jnp.where(schedules.num_timesteps(constants.schedule) == 3, jnp.nan, 1.0)
        metrics = StepMetrics(loss, loss, jnp.zeros(4), jnp.ones(4))
        return state._replace(step=state.step + 1), metrics

    monkeypatch.setattr(slots, "train_step", step)
    return lengths


@pytest.fixture
def site(digits, devices, tmp_path):
    return Site(digits, tmp_path, devices, Parallel("device", 1))


def test_a_step_is_compiled_for_each_set_of_static_choices(traced, data_dir, site):
    fields = {"train.num_steps": 1}
    fields["ablate.grid"] = "loss.prediction=eps,v; schedule.num_timesteps=10,14"
    jobs = create_jobs(fields, data_dir)
    assert train_jobs(jobs, site, {}) is None
    assert traced == [14, 14]


def test_a_job_that_diverges_leaves_its_slot_to_the_next(traced, data_dir, site):
    fields = {"ablate.grid": "schedule.num_timesteps=3,4,5,6", "train.num_steps": 3}
    jobs = create_jobs(fields, data_dir)
    failed = {}
    assert train_jobs(jobs, site, failed) is None
    name = "schedule.num_timesteps=3, seed 1"
    assert failed == {name: "step 1: loss nan, gradient norm nan"}
    assert traced == [6]
    assert not list((folder_of(jobs[0], site.path).path / "checkpoints").glob("*"))
    for job in jobs[1:]:
        assert checkpoint(folder_of(job, site.path).path)["step"] == 3


def test_a_cut_job_that_diverged_is_not_resumed(traced, data_dir, site):
    """Five jobs share two slots: the third job is cut, and its loss is NaN."""
    fields = {"ablate.grid": "schedule.num_timesteps=4,5,3,6,7"}
    jobs = create_jobs(fields, data_dir)
    failed = {}
    assert train_jobs(jobs, site, failed) is None
    assert list(failed) == ["schedule.num_timesteps=3, seed 1"]
    steps = [saved_steps(folder_of(job, site.path).checkpoints)[-1:] for job in jobs]
    assert steps == [[7], [7], [], [7], [7]]


def test_a_cut_job_whose_checkpoint_is_damaged_is_named(traced, data_dir, site, monkeypatch):
    jobs = create_jobs({"ablate.grid": "schedule.num_timesteps=4,5,6"}, data_dir)

    def close_and_damage(run):
        closed(run)
        if run.step == 3:
            for path in folder_of(jobs[1], site.path).checkpoints.rglob("*"):
                if path.is_file():
                    path.write_bytes(b"")

    closed = TrainingRun.close
    monkeypatch.setattr(TrainingRun, "close", close_and_damage)
    failed = {}
    assert train_jobs(jobs, site, failed) is None
    assert list(failed) == ["schedule.num_timesteps=5, seed 1"]
    assert "none of the checkpoints [3] is intact" in failed["schedule.num_timesteps=5, seed 1"]
    assert not folder_of(jobs[1], site.path).checkpoints.joinpath("7").exists()


def test_a_signal_during_the_last_save_is_returned(traced, data_dir, site, monkeypatch):
    monkeypatch.setattr(TrainingRun, "save", interrupted_save)
    jobs = create_jobs({"ablate.grid": "schedule.s=0", "train.num_steps": 1}, data_dir)
    stopped = train_jobs(jobs, site, {})
    assert stopped == signal.SIGTERM


def is_locked(workdir):
    try:
        with workdir.lock():
            return False
    except ConfigError as error:
        if "in use by another run" not in str(error):
            raise
        return True


def test_a_running_job_locks_its_folder(traced, data_dir, site, monkeypatch):
    """So two processes in the folder of an ablation never train the same job at once."""
    jobs = create_jobs({}, data_dir)
    locked = []

    def took(run, *arguments):
        locked.append([is_locked(folder_of(job, site.path)) for job in jobs])
        return reported(run, *arguments)

    reported = TrainingRun.took
    monkeypatch.setattr(TrainingRun, "took", took)
    assert train_jobs(jobs, site, {}) is None
    assert locked[0] == [True, True, False]  # the third waits
    assert any(third for *_, third in locked)
    assert not any(is_locked(folder_of(job, site.path)) for job in jobs)


def test_more_arms_than_fit_are_refused(devices, monkeypatch, tmp_path):
    """Their checkpoints must fit on the disk and their states in the memory."""
    ablation = grid.create_ablation(load({"ablate.parallel": "vmap"}))
    inputs = ablation, Workdir(tmp_path / "new"), devices, choose_parallel(ablation, "vmap", 2)
    ablate.check(*inputs)
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        message = r"^config\.ablate\.grid = '3 jobs': must be fewer: .* has 1,000$"
        with pytest.raises(ConfigError, match=message):
            ablate.check(*inputs)
    monkeypatch.setattr(os, "sysconf", lambda name: 100)
    with pytest.raises(
        ConfigError, match=r"^config\.ablate\.arms_per_device = 2: must be at most 0"
    ):
        ablate.check(*inputs)
    assert not (tmp_path / "new").exists()


def test_only_different_shards_may_use_a_folder_at_once(tmp_path):
    workdir, message = Workdir(tmp_path), r"^workdir=.*: in use by another run$"
    with workdir.lock("1/2"), workdir.lock("2/2"):
        for same in (None, "1/2"):
            with pytest.raises(ConfigError, match=message), workdir.lock(same):
                pass
    with workdir.lock(), pytest.raises(ConfigError, match=message), workdir.lock("1/2"):
        pass


# Ablations as processes

GRID = "schedule.s=0.02 | schedule.name=linear"
ARMS = GRID.split(" | ")
ADDED = "schedule.num_timesteps=14"
SMALL = DIGITS | {
    "num_devices": 2,
    "evaluate.num_examples": 12,
    "evaluate.batch_size": 12,
    "evaluate.timesteps_per_call": 7,
    "sampling.num_images": 8,
    "sampling.batch_size": 8,
    "ablate.grid": GRID,
    "ablate.seeds": (0, 1),
    "ablate.distance": "kernel",
    "ablate.parallel": "device",
}


@pytest.fixture(scope="module")
def classifier(digits, tmp_path_factory):
    """The file of an untrained classifier: training takes 20 s, and tests only compare features."""
    network = create_classifier(digits.shape, digits.num_classes)
    params = network.init(jax.random.key(0))
    untrained = Classifier(jax.jit(network.apply), params, digits.levels, 1.0, 0.1)
    folder = tmp_path_factory.mktemp("classifier")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifiers, "train_classifier", lambda dataset, seed: untrained)
        load_classifier(digits, 0, folder)
    return folder / "classifier-digits-0.npz"


@pytest.fixture(scope="module")
def small(data_dir):
    return SMALL | {"dataset.data_dir": data_dir}


def words(fields, path, **changes):
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    return arguments(path, fields | changes, "digits", "ablate")


@pytest.fixture
def workdir(classifier, tmp_path):
    """A new folder with the classifier in it."""
    (tmp_path / "run").mkdir()
    shutil.copy(classifier, tmp_path / "run")
    return tmp_path / "run"


def ablated(fields, classifier, folder):
    """The folder and the result of an ablation that nothing interrupted."""
    path = folder / "run"
    path.mkdir()
    shutil.copy(classifier, path)
    done = run(words(fields, path), folder / "log")
    assert done.code == 0, done.stderr
    return path, done


@pytest.fixture(scope="module")
def finished(small, classifier, tmp_path_factory):
    """An ablation of two arms and two seeds."""
    return ablated(small, classifier, tmp_path_factory.mktemp("finished"))


def folders(path):
    return sorted(p.parent for p in path.glob("arms/*/*/metrics.jsonl"))


def contents(path):
    """Every file of a folder and the time of its last change."""
    return {p: p.stat().st_mtime_ns for p in path.rglob("*") if p.is_file()}


def table(path):
    with (path / "ablation.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def assert_equals(path, expected):
    """Assert that two ablations have the same runs and scores, bit for bit."""
    ours, theirs = folders(path), folders(expected)
    assert [p.relative_to(path) for p in ours] == [p.relative_to(expected) for p in theirs]
    for one, other in zip(ours, theirs):
        assert_same(checkpoint(one), checkpoint(other))
        assert records(one) == records(other)
    assert (path / "ablation.csv").read_text() == (expected / "ablation.csv").read_text()


def test_an_ablation_leaves_a_run_for_each_job_a_table_and_a_report(finished, small):
    path, done = finished
    rows = table(path)
    assert [(row["arm"], row["seed"]) for row in rows] == [
        (arm, seed) for arm in ARMS for seed in "01"
    ]
    assert [row["schedule.s"] for row in rows] == ["0.02", "0.02", "", ""]
    for row in rows:
        of_job = path / row["folder"]
        assert row["folder"] == f"arms/{row['arm']}/seed_{row['seed']}"
        evaluated = json.loads((of_job / "evaluation.json").read_text())
        assert int(row["step"]) == evaluated["step"] == 40
        for name, term in evaluated["terms"].items():
            assert float(row[name]) == pytest.approx(term["bits_per_dim"], rel=1e-12)
        assert float(row["bits_per_dim"]) == pytest.approx(evaluated["bits_per_dim"], rel=1e-12)
        assert float(row["training_loss"]) == records(of_job)[-1]["loss"]
        record = json.loads((of_job / "finished.json").read_text())
        assert (record["config_hash"], record["step"]) == (row["config_hash"], 40)
        with np.load(of_job / "samples" / "samples.npz") as arrays:
            assert arrays["images"].shape == (8, 8, 8, 1)
    assert len({row["config_hash"] for row in rows}) == 4
    page = html.unescape((path / "report.html").read_text())
    assert shlex.join(["python", "main.py", *words(small, path)]) in re.sub("</?span>", "", page)
    assert "training default, evaluation highest, samples default" in page
    assert ("Its terms are skewed" in page) == ("evaluate.num_timesteps" in small)
    for arm in ARMS:
        assert arm in done.stdout
    assert "the reference" in done.stdout


@pytest.mark.parametrize(("num_timesteps", "is_skewed"), [(9, True), (10, False), (None, False)])
def test_a_report_says_that_the_terms_of_few_timesteps_are_skewed(num_timesteps, is_skewed):
    overrides = DIGITS | {"ablate.grid": "schedule.s=0,0.008", "ablate.reference": "none"}
    overrides |= {"evaluate.num_timesteps": num_timesteps}
    texts = [(name, str(value)) for name, value in overrides.items()]
    config = configuration.load(f"{REPOSITORY}/configs/digits.py", texts)
    notes = ablate._notes(grid.create_ablation(config), [], [])
    assert (ablate.SKEWED in notes) == is_skewed


@pytest.fixture(scope="module")
def collected(finished, small, digits):
    """The results of the finished ablation."""
    path, _ = finished
    ablation = grid.create_ablation(load(small))
    classifier = load_classifier(digits, 0, path)
    about = collecting.About(command="command", versions={}, facts={}, notes=())
    return collecting.collect(ablation, digits, classifier, path, about)


def test_the_differences_are_those_of_pairs_of_jobs(collected):
    first, other = collected.arms
    assert collected.reference == first.name
    of_job = {
        "bits_per_dim": lambda job: job.bits,
        "quality": lambda job: job.quality.value,
        "loss": lambda job: job.loss,
    }
    for name, values in of_job.items():
        ours, theirs = (np.array([values(job) for job in arm.jobs]) for arm in (other, first))
        assert first.scores[name].difference is None
        assert first.scores[name].mean == comparison.mean_interval(theirs)
        assert other.scores[name].mean == comparison.mean_interval(ours)
        difference = comparison.paired_difference(ours, theirs)
        assert other.scores[name].difference == difference
        assert difference.value == pytest.approx(ours.mean() - theirs.mean())
        assert {"better", "worse", "best", ""} >= {arm.scores[name].mark for arm in collected.arms}


def test_the_density_of_a_job_integrates_to_its_bound(collected):
    for arm in collected.arms:
        for job in arm.jobs:
            total = np.sum(job.density * np.diff(collected.edges))
            np.testing.assert_allclose(total, job.terms["L_1 to L_{T-1}"], rtol=1e-6)
            assert job.bits.mean() == pytest.approx(sum(job.terms.values()), rel=1e-9)


def test_the_density_integrates_to_the_sum_of_the_bits():
    """This holds for any schedule; the density is 0 where the schedule has no timesteps."""
    short, long = schedules.cosine(10), schedules.linear(50, 0.01, 0.1)
    edges = collecting.bin_edges([short, long])
    assert (np.diff(edges) == collecting.BIN).all()
    assert edges[0] == np.floor(edges[0])
    for schedule in (short, long):
        log_snr = np.asarray(schedule.log_snr, np.float64)
        assert edges[0] <= log_snr.min()
        assert log_snr.max() <= edges[-1]
        bits = np.random.default_rng(0).uniform(0.1, 1, len(schedule))
        density = collecting.density(edges, log_snr, bits)
        np.testing.assert_allclose(np.sum(density * np.diff(edges)), bits[1:].sum(), rtol=1e-9)
        beyond = (edges[:-1] > log_snr.max()) | (edges[1:] < log_snr.min())
        assert (density[beyond] == 0).all()
        assert (density[~beyond] > 0).all()
    # One bit is spread evenly over [-2, 1], so each unit has a third of it
    density = collecting.density(np.arange(-3.0, 4.0), np.array([1.0, -2.0]), np.array([9.0, 1.0]))
    np.testing.assert_allclose(density, [0, 1 / 3, 1 / 3, 1 / 3, 0, 0], rtol=1e-12)


def test_the_error_of_eps_is_a_mean_over_log_snr_for_every_schedule():
    """A denoiser whose error depends only on log SNR has the same error under every schedule."""
    chains = [schedules.cosine(1000, s) for s in (0.0, 0.008, 0.1)] + [schedules.linear(500)]
    low, high = collecting.common_range(chains)
    for chain in chains:
        log_snr = np.asarray(chain.log_snr, np.float64)
        assert log_snr[-1] <= low < high <= log_snr[0]
        mean = collecting.mean_over(low, high, log_snr, 1 / (1 + np.exp(-log_snr)))
        exact = (np.logaddexp(0, high) - np.logaddexp(0, low)) / (high - low)
        np.testing.assert_allclose(mean, exact, rtol=1e-3)
    with pytest.raises(RunError, match="no log SNR is common"):
        collecting.common_range([schedules.cosine(10), schedules.linear(10, 1e-9, 1e-8)])


def test_zero_terminal_snr_has_bins():
    schedule = schedules.zero_terminal_snr(schedules.cosine(10))
    edges = collecting.bin_edges([schedule])
    log_snr = np.asarray(schedule.log_snr, np.float64)
    assert np.isneginf(log_snr[-1])
    bits = np.ones(10)
    density = collecting.density(edges, log_snr, bits)
    np.testing.assert_allclose(np.sum(density * np.diff(edges)), 9, rtol=1e-9)


@pytest.mark.slow
def test_a_job_equals_a_training_run_and_their_folders_are_not_mixed(finished, small, tmp_path):
    """They have the same parameters and samples; each mode refuses a folder of the other."""
    path, _ = finished
    fields = small | {"schedule.s": 0.02, "seed": 1}
    single = tmp_path / "single"
    done = run(arguments(single, fields, "digits"), tmp_path / "log")
    assert done.code == 0, done.stderr
    of_job = path / "arms/schedule.s=0.02/seed_1"
    for one, expected in zip(records(of_job), records(single)):
        assert one.keys() == expected.keys()
        for name in expected:
            np.testing.assert_allclose(one[name], expected[name], rtol=1e-4)
    state, expected = checkpoint(of_job), checkpoint(single)
    assert state.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(state[name], array, rtol=1e-3, atol=1e-4)
    with (
        np.load(of_job / "samples/samples.npz") as ours,
        np.load(single / "samples/samples.npz") as theirs,
    ):
        assert (ours["images"] == theirs["images"]).mean() > 0.98
    refused = run(words(small, single), tmp_path / "log")
    assert refused.code == 2
    message = f"--workdir={single}: must be a folder for an ablation: a single run is in it"
    assert refused.stderr.splitlines() == [message]
    assert not (single / "arms").exists()
    before = contents(path)
    refused = run(arguments(path, fields, "digits"), tmp_path / "log")
    assert refused.code == 2
    assert len(refused.stderr.splitlines()) == 1
    assert contents(path) == before


@pytest.mark.slow  # test_a_job_that_diverges_leaves_its_slot_to_the_next is the quick half
def test_only_added_arms_are_trained_and_one_that_diverges_is_left_out(finished, small, tmp_path):
    path = shutil.copytree(finished[0], tmp_path / "run")
    before = contents(path / "arms")
    added, bad = ADDED, "optimizer.learning_rate=1e30"
    seeds = {"ablate__seeds": (0,)}
    done = run(
        words(small, path, ablate__grid=f"{GRID} | {added} | {bad}", **seeds), tmp_path / "log"
    )
    assert done.code == 1, done.stderr
    lines = [line for line in done.stderr.splitlines() if "FailedJobsError" in line]
    assert len(lines) == 1
    assert lines[0] == done.stderr.splitlines()[-1]
    assert lines[0].startswith("FailedJobsError: optimizer.learning_rate=1e+30, seed 0: step ")
    assert "Traceback" not in done.stderr
    assert checkpoint(path / "arms" / added / "seed_0")["step"] == 40
    assert [row["arm"] for row in table(path)] == [*ARMS, added]
    assert (
        "optimizer.learning_rate=1e+30 failed and is left out" in (path / "report.html").read_text()
    )
    trained = contents(path / "arms" / added / "seed_0" / "checkpoints")

    done = run(words(small, path, ablate__grid=f"{GRID} | {added}", **seeds), tmp_path / "log")
    assert done.code == 0, done.stderr
    assert "training" not in done.stderr.replace(f"training {added}", "")
    now = contents(path / "arms")
    assert {p: t for p, t in now.items() if p in before} == before
    assert contents(path / "arms" / added / "seed_0" / "checkpoints") == trained
    rows = table(path)
    assert [row["arm"] for row in rows] == [*ARMS, added]
    old = {(row["arm"], row["seed"]): row for row in table(finished[0])}
    for row in rows[:2]:  # these scores do not depend on the other arms
        for name in ("bits_per_dim", "L_0", "config_hash", "training_loss", "quality"):
            assert row[name] == old[row["arm"], row["seed"]][name]
    assert added in (path / "report.html").read_text()


def wait_for(started, path, least):
    """Wait until one of the jobs has a checkpoint at step ``least`` or later."""
    while not any(int(p.name) >= least for p in path.glob("arms/*/*/checkpoints/[0-9]*[0-9]")):
        assert started.is_running(), started.wait().stderr
        time.sleep(0.01)


@pytest.mark.slow
def test_a_signal_saves_all_jobs_and_the_same_command_resumes(finished, small, workdir, tmp_path):
    started = Run(words(small, workdir), tmp_path / "log")
    wait_for(started, workdir, 10)
    started.kill(signal.SIGTERM)
    done = started.wait()
    assert done.code == 143, done.stderr
    assert "after saving the jobs under way" in done.stderr
    assert len(folders(workdir)) == 2
    steps = [int(checkpoint(of_job)["step"]) for of_job in folders(workdir)]
    assert steps[0] == steps[1]
    assert 10 <= steps[0] < 40
    assert not (workdir / "ablation.csv").exists()
    done = run(words(small, workdir), tmp_path / "log")
    assert done.code == 0, done.stderr
    assert done.stderr.count(f"resuming at step {steps[0]}\n") == 2
    assert_equals(workdir, finished[0])


@pytest.fixture(scope="module")
def mixed(small, classifier, tmp_path_factory):
    """The fields and the folder of an ablation with two values of T."""
    fields = small | {"ablate.grid": f"schedule.s=0.02 | {ADDED}"}
    path, _ = ablated(fields, classifier, tmp_path_factory.mktemp("mixed"))
    return fields, path


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_like_an_uninterrupted_one(mixed, workdir, tmp_path):
    chance, moments, codes = random.Random(), [], []
    while len(codes) < 6 and 0 not in codes:
        started = Run(words(mixed[0], workdir), tmp_path / "log")
        moments.append(chance.uniform(3, 14))
        time.sleep(moments[-1])
        with contextlib.suppress(ProcessLookupError):  # the last process may have ended by itself
            started.kill()
        killed = started.wait()
        assert killed.code in (-signal.SIGKILL, 0), (moments, killed.stderr)
        codes.append(killed.code)
    assert codes[0] == -signal.SIGKILL
    done = run(words(mixed[0], workdir), tmp_path / "log")
    assert done.code == 0, (moments, done.stderr)
    assert_equals(workdir, mixed[1])


@pytest.mark.slow
def test_shards_and_a_last_call_equal_one_ablation(mixed, workdir, tmp_path):
    shards = [
        Run(words(mixed[0], workdir, ablate__shard=f"{i}/2"), tmp_path / f"log{i}") for i in (1, 2)
    ]
    wait_for(shards[0], workdir, 10)
    refused = run(words(mixed[0], workdir), tmp_path / "log")
    assert any(shard.is_running() for shard in shards)
    assert refused.code == 2
    assert refused.stderr.splitlines()[-1] == f"--workdir={workdir}: in use by another run"
    for shard in shards:
        done = shard.wait()
        assert done.code == 0, done.stderr
        assert "this share is done" in done.stderr
    assert len(folders(workdir)) == 4
    assert not (workdir / "ablation.csv").exists()
    done = run(words(mixed[0], workdir), tmp_path / "log")
    assert done.code == 0, done.stderr
    assert "4 finished" in done.stderr
    assert "training" not in done.stderr
    assert_equals(workdir, mixed[1])


def test_auto_is_chosen_once_for_the_jobs_of_the_shard(small, tmp_path):
    """The choice counts one job, that of the shard, before CPU cores become devices.

    So the number of devices fits the batch of 15, which two devices could not share. The lock of
    the folder, which comes later, ends the run.
    """
    fields = small | {"ablate.grid": "schedule.s=0,0.01,0.02", "ablate.seeds": (0,)}
    fields |= {"ablate.parallel": "auto", "ablate.shard": "1/3", "train.batch_size": 15}
    del fields["num_devices"]
    with Workdir(tmp_path / "run").lock():
        done = run(words(fields, tmp_path / "run"), tmp_path / "log")
    assert done.code == 2
    assert done.stderr == f"--workdir={tmp_path}/run: in use by another run\n"


def test_jobs_whose_files_another_mode_has_changed_are_not_finished(finished, small, tmp_path):
    """So they are scored again, and samples of another chain are not compared with other arms."""
    path = shutil.copytree(finished[0], tmp_path / "run")
    ablation = grid.create_ablation(load(small))
    assert all(is_finished(job, path) for job in ablation.jobs)
    of_job = folder_of(ablation.jobs[0], path).path
    with np.load(of_job / "samples/samples.npz") as arrays:
        images = 255 - arrays["images"]
    np.savez(of_job / "samples/samples.npz", images=images)
    (folder_of(ablation.jobs[1], path).path / "finished.json").write_text("{")
    finished_jobs = [is_finished(job, path) for job in ablation.jobs]
    assert finished_jobs == [False, False, True, True]


@pytest.mark.parametrize("num_steps", [20, 80])
def test_arms_of_another_length_are_not_mixed_in(finished, small, num_steps, devices):
    """A run of another length has another decay of its learning rate."""
    ablation = grid.create_ablation(load(small | {"train.num_steps": num_steps}))
    message = rf"config\.train\.num_steps = {num_steps}: the run in .* has 40"
    with pytest.raises(ConfigError, match=message):
        ablate.check(ablation, Workdir(finished[0]), devices, Parallel("device", 1))


@pytest.mark.slow
def test_the_same_shard_twice_at_once_is_refused(mixed, workdir, tmp_path):
    fields = mixed[0] | {"train.num_steps": 100_000, "ablate.shard": "1/2"}
    first = Run(words(fields, workdir), tmp_path / "first")
    wait_for(first, workdir, 10)
    second = run(words(fields, workdir), tmp_path / "second")
    assert second.code == 2, second.stderr
    assert second.stderr.splitlines()[-1].endswith("in use by another run")
    assert first.is_running()
    first.kill()
    first.wait()
