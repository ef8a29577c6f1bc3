"""main.py as a user runs it: the files of a run, its samples, and one line for each mistake."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from runs import DIGITS, REPOSITORY, TOY2D, Run, arguments, run

GREY_LEVELS = 17  # of the digits data set


@pytest.fixture(scope="module")
def digits(data_dir, tmp_path_factory):
    """A run on the digits, started in a new Python: its fields, its folder and its result."""
    folder = tmp_path_factory.mktemp("digits")
    fields = DIGITS | {
        "dataset.data_dir": data_dir,
        "num_devices": 2,
        "train.num_steps": 25,
        "train.sample_every_steps": 20,
        "sampling.num_images": 6,
        "sampling.batch_size": 6,
        "sampling.num_frames": 5,
    }
    words = arguments(folder / "run", fields, "digits")
    done = subprocess.run(
        [sys.executable, REPOSITORY / "main.py", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    return fields, folder / "run", done


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def samples(workdir, name="images"):
    with np.load(workdir / "samples" / "samples.npz") as arrays:
        assert list(arrays) == [name]
        return arrays[name]


def test_help_answers_at_once_without_jax():
    words = [sys.executable, "-X", "importtime", REPOSITORY / "main.py", "--help"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0
    assert "--mode=sample" in done.stdout
    assert "jax" not in {line.split("|")[-1].strip() for line in done.stderr.splitlines()}


def test_a_run_leaves_all_its_files(digits):
    fields, workdir, done = digits
    assert done.returncode == 0, done.stderr
    config = json.loads((workdir / "config.json").read_text())
    for field, value in fields.items():
        node = config
        for name in field.split("."):
            node = node[name]
        value = list(value) if isinstance(value, tuple) else value
        assert node == value or node == str(value), field
    assert {"seed", "dataset", "schedule", "model", "loss", "optimizer", "ema"} < config.keys()
    assert [record["step"] for record in records(workdir)] == [10, 20, 25]
    for record in records(workdir):
        assert all(isinstance(value, int | float) for value in record.values())
        assert np.isfinite(record["loss"])
    assert list((workdir / "tensorboard").glob("events*"))
    for picture in ("schedule.png", "samples/step_00000020.png", "samples/grid.png"):
        with Image.open(workdir / picture) as image:
            image.load()
    for animation in ("denoising.gif", "noising.gif"):
        with Image.open(workdir / "samples" / animation) as image:
            assert image.is_animated
    assert {path.name for path in (workdir / "checkpoints").iterdir()} >= {"20", "25"}
    for label in ("sqrt(beta_1)", "alpha_bar_T", "SNR", "clipped"):
        assert label in done.stdout


def test_samples_are_the_grey_levels_of_the_set(digits):
    images = samples(digits[1])
    assert images.shape == (6, 8, 8, 1)
    assert images.dtype == np.uint8
    levels = np.round(np.arange(GREY_LEVELS) * 255 / (GREY_LEVELS - 1)).astype(np.uint8)
    assert np.isin(images, levels).all()


def test_image_i_depends_on_the_seed_and_i_alone(digits, tmp_path):
    """The batch size, the devices and the number of images do not change it; the seed does."""
    fields, workdir, _ = digits
    expected = samples(workdir).astype(int)
    for name, changes in {
        "same": {},
        "batches": {"sampling.batch_size": 4, "num_devices": 1},
        "devices": {"sampling.num_images": 3, "num_devices": 3, "train.batch_size": 18},
        "seed": {"seed": 1},
    }.items():
        copy = shutil.copytree(workdir, tmp_path / name)
        done = run(arguments(copy, fields | changes, "digits", "sample"), tmp_path / f"{name}.log")
        assert done.code == 0, done.stderr
        images = samples(copy).astype(int)
        difference = np.abs(images - expected[: len(images)]).max()
        # Before rounding to 17 levels they differ by less than 1/255: a pixel may change its level
        assert (difference <= 255 / (GREY_LEVELS - 1) + 1) == (name != "seed")
        if name != "seed":
            assert (images != expected[: len(images)]).mean() < 0.01


def test_points_are_sampled_as_points(tmp_path):
    done = run(arguments(tmp_path / "run", TOY2D), tmp_path / "log")
    assert done.code == 0, done.stderr
    points = samples(tmp_path / "run", "points")
    assert points.shape == (4, 2)
    assert np.isfinite(points).all()
    words = TOY2D | {"optimizer.name": "adam", "sampling.sampler": "ddim", "sampling.num_steps": 5}
    done = run(arguments(tmp_path / "run", words, mode="sample"), tmp_path / "log")
    assert done.code == 0, done.stderr  # the optimizer does not matter to sampling
    assert not np.allclose(samples(tmp_path / "run", "points"), points)


def field(name, value, named=None):
    """An override of one field, and what the message must name: by default that field."""
    return [f"--config.{name}={value}"], named or f"config.{name}"


# The words that are added to a correct command line, and what the message must name.
MISTAKES = {
    "mode": (["--mode=trian"], "did you mean 'train'"),
    "flag": (["--workdr=x"], "--workdr"),
    "no dashes": (["train"], "train"),
    "config file": (["--config=configs/toy3d.py"], "--config=configs/toy3d.py"),
    "field": field("schedule.offset", 0.1),
    "section": field("scedule.s", 0.1, "config.scedule"),
    "whole section": field("schedule", "cosine"),
    "type": field("train.batch_size", "many"),
    "type float": field("train.batch_size", 1.5),
    "type bool": field("ema.warmup", 1),
    "not finite": field("optimizer.learning_rate", "nan"),
    "seed": field("seed", -1),
    "schedule name": field("schedule.name", "cosin", "did you mean 'cosine'"),
    "s": field("schedule.s", -0.1),
    "T": field("schedule.num_timesteps", 0),
    "max_beta": field("schedule.max_beta", 1.5),
    "rescale": (
        ["--config.schedule.name=linear", "--config.schedule.rescale=true"],
        "config.schedule.",
    ),
    "eps": field("schedule.zero_terminal_snr", "true", "config.loss.prediction"),
    "jsd": field("schedule.name", "jsd", "config.loss.prediction"),
    "score": (
        ["--config.schedule.zero_terminal_snr=true", "--config.loss.prediction=score"],
        "config.loss.prediction",
    ),
    "other's field": field("schedule.beta_start", 0.1),
    "no betas": field("schedule.name", "from_betas", "config.schedule.betas"),
    "betas file": (
        ["--config.schedule.name=from_betas", "--config.schedule.betas=none.npy"],
        "config.schedule.betas",
    ),
    "betas": field("schedule.betas", "betas.npy"),
    "resolution": field("schedule.base_resolution", 32),
    "prediction": field("loss.prediction", "epsilon"),
    "weighting": field("loss.weighting", "snrs"),
    "other weighting's field": field("loss.gamma", 5.0),
    "gamma": (
        ["--config.loss.weighting=min_snr", "--config.loss.gamma=0"],
        "config.loss.gamma",
    ),
    "scale of no bound": field("loss.vlb_scale", 0.1),
    "every label dropped": field("loss.label_dropout", 1.0),
    "labels dropped that are not told": field("loss.label_dropout", 0.1),
    "ends of no learned schedule": field("schedule.log_snr_start", 5.0),
    "variance": field("loss.variance", "fixed"),
    "timesteps": field("loss.timesteps", "uniformly"),
    "optimizer": field("optimizer.name", "sgd"),
    "decay": field("optimizer.decay", "linear"),
    "rate": field("optimizer.learning_rate", -1e-3),
    "warmup": field("optimizer.warmup_steps", -1),
    "b1": field("optimizer.b1", 1.0),
    "clip": field("optimizer.clip_norm", 0.0),
    "weight decay": field("optimizer.weight_decay", -0.1),
    "ema": field("ema.decay", 1.0),
    "batch": field("train.batch_size", 0),
    "batch share": field("num_devices", 3, "config.train.batch_size"),
    "devices": field("num_devices", 0),
    "steps": field("train.num_steps", 0),
    "steps per call": field("train.steps_per_call", 3),
    "log": field("train.log_every_steps", 0),
    "checkpoint": field("checkpoint.every_steps", 0),
    "keep": field("checkpoint.keep_last", 0),
    "sampling steps": field("sampling.num_steps", 11),
    "spacing": field("sampling.spacing", "even"),
    "eta": (["--config.sampling.sampler=ddim", "--config.sampling.eta=2.0"], "config.sampling.eta"),
    "eta of ancestral": field("sampling.eta", 0.5),
    "variance of ddim": (
        ["--config.sampling.sampler=ddim", "--config.sampling.variance=beta"],
        "config.sampling.variance",
    ),
    "steps compared of mu": (
        ["--config.loss.prediction=mu", "--config.sampling.compared_steps=(5,10)"],
        "config.sampling.compared_steps",
    ),
    "no noise level": (
        [
            "--config.loss.prediction=v",
            "--config.schedule.zero_terminal_snr=true",
            "--config.sampling.sampler=heun",
        ],
        "config.sampling.sampler",
    ),
    "steps left out of mu": (
        ["--config.loss.prediction=mu", "--config.sampling.num_steps=5"],
        "config.sampling.num_steps",
    ),
    "steps left out of a learned variance": (
        ["--config.loss.variance=learned", "--config.sampling.num_steps=5"],
        "config.sampling.num_steps",
    ),
    "flow of mu": (
        ["--config.loss.prediction=mu", "--config.evaluate.flow_examples=1"],
        "config.evaluate.flow_examples",
    ),
    "solver of no flow": field("evaluate.flow_solver", "euler"),
    "damaged record": (["--workdir=damaged"], "--workdir=damaged"),
    "sampler": field("sampling.sampler", "dpm"),
    "sampling variance": field("sampling.variance", "fixed"),
    "variance that was not learned": field("sampling.variance", "learned"),
    "evaluated timesteps": field("evaluate.num_timesteps", 11),
    "evaluated images": field("evaluate.num_examples", 0),
    "flow": (
        ["--config.evaluate.flow_examples=1", "--config.evaluate.flow_steps=0"],
        "config.evaluate.flow_steps",
    ),
    "frames": field("sampling.num_frames", 1),
    "images": field("sampling.num_images", 0),
    "sampling batch": field("sampling.batch_size", 0),
    "data set": field("dataset.name", "minst"),
    "flip": field("dataset.flip", "true"),
    "archives": field("dataset.archives", "nowhere"),
    "model": field("model.name", "mpl"),
    "points in a unet": field("model.name", "unet", "config.model"),
    "model field": field("model.dropout", 0.1),
    "width": field("model.width", 0),
    "layers": field("model.num_layers", 0),
    "ends of a schedule that is yet to be learned": (
        [
            "--config.schedule.name=learned",
            "--config.loss.weighting=vlb",
            "--config.sampling.spacing=karras",
            "--config.sampling.sigma_max=10.0",
        ],
        "config.sampling.sigma_max = 10.0: must be unset in training",
    ),
    "guided by no checkpoint": (
        ["--config.guidance.weight=2.0", "--config.guidance.weak_step=7"],
        "config.guidance.weak_step = 7: must be one of the checkpoints []",
    ),
    "guided by a run in a file": (
        ["--config.guidance.weight=2.0", "--config.guidance.weak_workdir=file"],
        "config.guidance.weak_workdir=file: is a file",
    ),
    "workdir of a pattern": (["--workdir=run[1]"], "--workdir=run[1]: must have no ["),
    "weak workdir of a pattern": (
        ["--config.guidance.weight=2.0", "--config.guidance.weak_workdir=run[1]"],
        "config.guidance.weak_workdir=run[1]: must have no [",
    ),
    "workdir is a file": (["--workdir=file"], "--workdir=file"),
    "workdir in a file": (["--workdir=file/run"], "--workdir=file/run"),
    "nothing to sample": (["--mode=sample"], "--workdir="),
    "nothing to evaluate": (["--mode=evaluate"], "--workdir="),
}
OF_IMAGES = {
    "attention": field("model.attention_resolutions", (5,)),
    "strides": field("model.channel_multipliers", (1, 1, 1, 1, 1)),
    "dtype": field("model.dtype", "float16"),
    "dropout": field("model.dropout", 1.0),
    "images in an mlp": field("model.name", "mlp", "config.model"),
    "no archives": field("dataset.archives", "empty"),
}


@pytest.fixture(scope="module")
def refusals(tmp_path_factory):
    """For each mistake: its run in a new folder, and the files there before and after the run."""
    runs = {}
    cases = [(name, "toy2d", TOY2D, words) for name, (words, _) in MISTAKES.items()]
    cases += [(name, "digits", DIGITS, words) for name, (words, _) in OF_IMAGES.items()]
    waiting = []
    for name, config, fields, words in cases:
        folder = tmp_path_factory.mktemp("refused")
        (folder / "file").touch()
        (folder / "empty").mkdir()
        (folder / "damaged").mkdir()
        (folder / "damaged" / "config.json").write_text('{"seed": 0')
        np.save(folder / "betas.npy", np.full(10, 0.1))
        if name == "no archives":
            fields = {**fields, "dataset.name": "mnist", "dataset.data_dir": "data"}
        flags = {word.partition("=")[0] for word in words}
        good = [
            word
            for word in arguments("run", fields | {"compilation_cache": "cache"}, config)
            if word.partition("=")[0] not in flags
        ]
        before = sorted(folder.rglob("*"))
        log = tmp_path_factory.mktemp("log") / "log"
        waiting.append((name, folder, before, Run(good + words, log, PWD=str(folder))))
        if len(waiting) == 6 or name == cases[-1][0]:
            for name, folder, before, started in waiting:
                runs[name] = started.wait(), before, sorted(folder.rglob("*"))
            waiting = []
    return runs


@pytest.mark.parametrize("name", MISTAKES | OF_IMAGES)
def test_a_mistake_is_one_line_and_writes_nothing(refusals, name):
    done, before, after = refusals[name]
    assert done.code == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert (MISTAKES | OF_IMAGES)[name][1] in done.stderr
    assert done.stdout == ""
    assert after == before


@pytest.mark.parametrize(
    "changes",
    [
        {"model.width": 8},
        {"schedule.s": 0.02},
        {"loss.prediction": "v"},
        {"loss.timesteps": "uniform"},
        {"optimizer.learning_rate": 1.0},
        {"seed": 1},
        {"train.batch_size": 32},
    ],
    ids=str,
)
def test_a_run_does_not_resume_with_another_value_of_these_fields(trained, tmp_path, changes):
    workdir = shutil.copytree(trained, tmp_path / "run")
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    done = run(arguments(workdir, TOY2D | changes), tmp_path / "log")
    assert done.code == 2
    assert len(done.stderr.splitlines()) == 1
    assert f"config.{next(iter(changes))}" in done.stderr
    assert before == {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a finished run on toy2d."""
    folder = tmp_path_factory.mktemp("trained")
    assert run(arguments(folder / "run", TOY2D), folder / "log").code == 0
    return folder / "run"
