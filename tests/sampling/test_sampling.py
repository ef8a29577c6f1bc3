"""--mode=sample as a process: guidance, editing of given images, long jobs that are killed."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from runs import DIGITS, TOY2D, Run, arguments, run
from sklearn.datasets import load_digits

from diffusion_jax.diffusion import schedules
from diffusion_jax.runtime.shards import Shards
from diffusion_jax.sampling.generator import noising

NUM_IMAGES = 6


@pytest.fixture(scope="module")
def trained(data_dir, tmp_path_factory):
    """A conditional model of digits, trained with label dropout: its fields and its folder."""
    folder = tmp_path_factory.mktemp("conditional")
    fields = DIGITS | {
        "dataset.data_dir": data_dir,
        "model.class_conditional": True,
        "loss.label_dropout": 0.2,
        "train.num_steps": 20,
        "num_devices": 1,
        "sampling.num_images": NUM_IMAGES,
        "sampling.batch_size": NUM_IMAGES,
        "sampling.num_steps": 5,
    }
    done = run(arguments(folder / "run", fields, "digits"), folder / "log")
    assert done.code == 0, done.stderr
    return fields, folder / "run"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two real digits, and a mask whose right half is to be made anew."""
    folder = tmp_path_factory.mktemp("given")
    digits = np.round(load_digits().images[[3, 4]] * 255 / 16).astype(np.uint8)
    np.savez(folder / "two.npz", images=digits[..., None])
    Image.fromarray(digits[0]).save(folder / "one.png")
    mask = np.zeros((8, 8), np.uint8)
    mask[:, 4:] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    Image.fromarray(mask[:4]).save(folder / "small.png")
    Image.fromarray(mask // 2).save(folder / "grey.png")
    return folder


def start(trained, tmp_path, **changes):
    fields, source = trained
    workdir = tmp_path / "run"
    if not workdir.exists():
        shutil.copytree(source, workdir)
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    return Run(arguments(workdir, fields | changes, "digits", "sample"), tmp_path / "log")


def sampled(trained, tmp_path, **changes):
    done = start(trained, tmp_path, **changes).wait()
    assert done.code == 0, done.stderr
    with np.load(tmp_path / "run" / "samples" / "samples.npz") as arrays:
        return arrays["images"], done


EDIT = {"sampling__label": 3}  # of the given images


def test_inpainting_keeps_what_is_known(trained, files, tmp_path):
    images, done = sampled(
        trained,
        tmp_path,
        **EDIT,
        editing__task="inpaint",
        editing__images=files / "two.npz",
        editing__mask=files / "mask.png",
        editing__num_resamples=2,
        editing__jump_length=1,
    )
    with np.load(files / "two.npz") as arrays:
        given = arrays["images"]
    assert len(images) == NUM_IMAGES
    for i, image in enumerate(images):
        np.testing.assert_array_equal(image[:, :4], given[i % 2][:, :4])
    assert len(np.unique(images[:, :, 4:], axis=0)) == NUM_IMAGES
    # 5 steps down and 4 times one more, for a jump back from each of the states 1 to 4
    assert "5 steps, 9 network evaluations per image" in done.stderr


def test_image_to_image_begins_at_its_timestep(trained, files, tmp_path):
    """Hardly noised an image hardly changes."""
    edit = EDIT | {
        "editing__task": "image_to_image",
        "editing__images": files / "one.png",
        "sampling__num_steps": None,
        "sampling__sampler": "ddim",
    }
    images, done = sampled(trained, tmp_path, editing__timestep=1, **edit)
    assert "1 steps, 1 network evaluations per image" in done.stderr
    with Image.open(files / "one.png") as picture:
        given = np.asarray(picture).astype(int)
    assert np.abs(images[..., 0] - given).mean() < 40
    images, done = sampled(trained, tmp_path, editing__timestep=9, **edit)
    assert "9 steps, 9 network" in done.stderr
    assert np.abs(images[..., 0] - given).mean() > 60


@pytest.mark.slow
def test_interpolation_and_variations_come_back_to_the_images(trained, files, tmp_path):
    inverted = EDIT | {
        "editing__images": files / "two.npz",
        "sampling__sampler": "ddim",
        "sampling__clip_x_0": False,
        "editing__timestep": 5,
    }
    with np.load(files / "two.npz") as arrays:
        given = arrays["images"].astype(int)
    between, done = sampled(trained, tmp_path, editing__task="interpolate", **inverted)
    evaluations = "5 steps, 5 network evaluations per image, and 25 for each given image, once"
    assert evaluations in done.stderr
    for end in (0, -1):
        assert np.abs(between[end] - given[end]).mean() < 20
    assert np.abs(between[2] - given[0]).mean() > np.abs(between[0] - given[0]).mean()
    same, _ = sampled(
        trained, tmp_path, editing__task="variations", editing__strength=0.0, **inverted
    )
    assert max(np.abs(image - given[i % 2]).mean() for i, image in enumerate(same)) < 20
    other, _ = sampled(
        trained, tmp_path, editing__task="variations", editing__strength=1.0, **inverted
    )
    assert np.abs(other.astype(int) - same).mean() > 10


def test_guidance_steps_side_by_side_and_grids_between_the_timesteps(trained, tmp_path):
    chain = {
        "sampling__sampler": "dpmpp_2m",
        "sampling__spacing": "karras",
        "sampling__sigma_max": 20.0,
        "sampling__num_steps": 25,  # of 10 timesteps
        "sampling__num_frames": 3,
        "sampling__compared_steps": "(2,4)",
    }
    plain, _ = sampled(trained, tmp_path, **chain)
    samples = tmp_path / "run" / "samples"
    with Image.open(samples / "steps.png") as picture:
        assert picture.height > 2 * 64
    for name in ("denoising.gif", "noising.gif"):
        with Image.open(samples / name) as animation:
            assert animation.is_animated
    assert not (samples / "shards").exists()
    del chain["sampling__num_frames"], chain["sampling__compared_steps"]
    strong, _ = sampled(trained, tmp_path, **chain, guidance__weight=4.0, guidance__rescale=0.5)
    assert (strong != plain).any()
    weak = {"guidance__weak_workdir": tmp_path / "run", "guidance__weak_step": 10}
    again, done = sampled(trained, tmp_path, **chain, guidance__weight=1.0, **weak)
    assert f"guided away from step 10 of {tmp_path}/run" in done.stderr
    np.testing.assert_array_equal(again, plain)  # which weight 1 leaves as it is


@pytest.mark.parametrize("num_frames", [2, 5, 11, 21, 22, 51])
def test_wrong_row_is_none_of_the_frames_of_real_data(num_frames):
    """However many frames there are: the image first, then ever less of it, noise last."""
    schedule, x_0 = schedules.cosine(10), jnp.ones((3, 2))
    frames = noising(schedule, jax.random.key(0), x_0, num_frames)
    assert frames.shape == (num_frames, 3, 2)
    np.testing.assert_array_equal(frames[0], x_0)
    eps = np.asarray(jax.random.normal(jax.random.key(0), x_0.shape))
    timesteps = np.linspace(0, 10, num_frames).round().astype(int)
    signal = np.append(1.0, schedule.alpha_bar)[timesteps][:, None, None]
    expected = np.sqrt(signal) + np.sqrt(1 - signal) * eps
    np.testing.assert_allclose(frames, expected, rtol=1e-5, atol=1e-5)


def test_a_killed_job_goes_on_and_neither_repeats_nor_loses_an_image(trained, tmp_path):
    """kill -9 after the first shards; the rest with another batch size."""
    job = {"sampling__num_images": 40, "sampling__num_steps": 10, "num_devices": 2}
    whole, _ = sampled(trained, tmp_path / "whole", sampling__batch_size=40, **job)
    begun = start(trained, tmp_path, sampling__batch_size=2, **job)
    shards = tmp_path / "run" / "samples" / "shards"
    begun.wait_for(shards / "000000002-000000003.npz")
    begun.kill()
    begun.wait()
    kept = len(list(shards.glob("*.npz")))
    assert 2 <= kept < 20
    other = {"sampling__batch_size": 7, "sampling__num_frames": 3, "sampling__evaluator_npz": True}
    images, done = sampled(trained, tmp_path, **job, **other)
    assert f"going on after {2 * kept} of 40 samples" in done.stderr
    with Image.open(tmp_path / "run/samples/denoising.gif") as animation:  # begun without frames
        assert animation.is_animated
    with np.load(tmp_path / "run/samples/evaluator.npz") as arrays:
        np.testing.assert_array_equal(arrays["arr_0"], np.repeat(images, 3, axis=-1))
        np.testing.assert_array_equal(arrays["arr_1"], np.arange(40) % 10)
    assert images.shape == whole.shape
    # another batch size rounds the last float otherwise, which may be the next grey level
    assert (images != whole).mean() < 0.01
    assert not shards.exists()


def test_shards_of_another_job_are_not_mixed_in(trained, tmp_path):
    folder = tmp_path / "run" / "samples" / "shards"
    start_folder = shutil.copytree(trained[1], tmp_path / "run") / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.json").write_text(json.dumps({"seed": 1}))
    np.savez(folder / "000000000-000000005.npz", images=np.zeros((6, 8, 8, 1), np.uint8))
    images, done = sampled(trained, tmp_path)
    assert "removed the samples of another job; starting again" in done.stderr
    assert images.any()
    assert start_folder.exists()


def test_shards_survive_a_kill_at_any_moment(tmp_path):
    """Of a job that was killed while it joined its shards nothing is left to be mixed in."""
    images = np.arange(12, dtype=np.uint8).reshape(12, 1, 1, 1)
    shards = Shards(tmp_path / "shards", "images", {"seed": 0})
    for start in range(0, 12, 5):
        shards.add(images[start : start + 5])
    assert len(Shards(tmp_path / "shards", "images", {"seed": 0})) == 12
    np.testing.assert_array_equal(shards.first(7), images[:7])
    shards.join(tmp_path / "samples.npz")
    with np.load(tmp_path / "samples.npz") as arrays:
        np.testing.assert_array_equal(arrays["images"], images)
    left = tmp_path / "shards.joined"  # killed while they were removed
    left.mkdir()
    np.savez(left / "000000005-000000009.npz", images=images[5:10])
    again = Shards(tmp_path / "shards", "images", {"seed": 0})
    assert len(again) == 0
    assert not left.exists()


REFUSED = {
    "more steps than T": ({"sampling__num_steps": 11}, "config.sampling.num_steps"),
    "compared": ({"sampling__compared_steps": "(5,11)"}, "config.sampling.compared_steps"),
    "rho": ({"sampling__rho": 5.0}, "config.sampling.rho"),
    "sigma": (
        {"sampling__spacing": "log_snr", "sampling__sigma_max": 1e9},
        "config.sampling.sigma_max",
    ),
    "eta": ({"sampling__sampler": "ddim", "sampling__eta": -0.1}, "config.sampling.eta"),
    "churn": ({"sampling__sampler": "edm", "sampling__churn": -1.0}, "config.sampling.churn"),
    "interval": (
        {"guidance__weight": 2.0, "guidance__interval_end": 11.0},
        "config.guidance.interval_end",
    ),
    "empty interval": (
        {
            "guidance__weight": 2.0,
            "guidance__interval_start": 5.0,
            "guidance__interval_end": 4.0,
        },
        "config.guidance.interval_end",
    ),
    "weight": ({"guidance__weight": -1.0}, "config.guidance.weight"),
    "rescale": ({"guidance__weight": 2.0, "guidance__rescale": 2.0}, "config.guidance.rescale"),
    "guidance of nothing": ({"guidance__rescale": 0.5}, "config.guidance.rescale"),
    "weak step": (
        {"guidance__weight": 2.0, "guidance__weak_step": 3},
        "config.guidance.weak_step = 3",
    ),
    "weak run": (
        {"guidance__weight": 2.0, "guidance__weak_workdir": "nowhere"},
        "config.guidance.weak_workdir",
    ),
    "label": ({"sampling__label": 10}, "config.sampling.label"),
    "threshold": ({"sampling__dynamic_threshold": 1.5}, "config.sampling.dynamic_threshold"),
    "task": ({"editing__task": "inpant"}, "did you mean 'inpaint'"),
    "no images": (
        {"editing__task": "image_to_image", "editing__timestep": 5},
        "config.editing.images",
    ),
    "no label": (
        {"editing__task": "variations", "editing__images": "two.npz"},
        "config.sampling.label",
    ),
    "compared edits": (
        {"editing__task": "interpolate", "editing__images": "two.npz"}
        | {"sampling__compared_steps": "(2,3)"},
        "config.sampling.compared_steps",
    ),
    "spacing": ({"sampling__spacing": "kerras"}, "did you mean 'karras'"),
    "no timestep": (
        {"editing__task": "image_to_image", "editing__images": "two.npz"},
        "config.editing.timestep",
    ),
    "timestep beyond": (
        {
            "editing__task": "image_to_image",
            "editing__images": "two.npz",
            "editing__timestep": 11,
        },
        "config.editing.timestep",
    ),
    "mask of another task": (
        {
            "editing__task": "image_to_image",
            "editing__images": "two.npz",
            "editing__mask": "mask.png",
            "editing__timestep": 5,
        },
        "config.editing.mask",
    ),
    "mask of the wrong shape": (
        {
            "editing__task": "inpaint",
            "editing__images": "two.npz",
            "editing__mask": "small.png",
            "editing__jump_length": 1,
        },
        "config.editing.mask",
    ),
    "grey mask": (
        {
            "editing__task": "inpaint",
            "editing__images": "two.npz",
            "editing__mask": "grey.png",
            "editing__jump_length": 1,
        },
        "config.editing.mask",
    ),
    "no such images": (
        {"editing__task": "image_to_image", "editing__images": "x.png", "editing__timestep": 5},
        "config.editing.images",
    ),
    "one image": (
        {
            "editing__task": "interpolate",
            "editing__images": "one.png",
            "sampling__sampler": "ddim",
        },
        "config.editing.images",
    ),
    "noisy inversion": (
        {"editing__task": "variations", "editing__images": "one.png"},
        "config.sampling.sampler",
    ),
    "memory": (
        {
            "editing__task": "inpaint",
            "editing__images": "two.npz",
            "editing__mask": "mask.png",
            "sampling__sampler": "unipc",
        },
        "config.sampling.sampler",
    ),
    "jump": (
        {
            "editing__task": "inpaint",
            "editing__images": "two.npz",
            "editing__mask": "mask.png",
            "editing__jump_length": 5,
        },
        "config.editing.jump_length",
    ),
}


@pytest.fixture(scope="module")
def refusals(trained, files, tmp_path_factory):
    """Each request, in the one workdir, which stays as it was."""
    folder = tmp_path_factory.mktemp("refused")
    workdir = shutil.copytree(trained[1], folder / "run")
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()}
    runs, waiting = {}, []
    for name, (changes, _) in REFUSED.items():
        changes = {
            field.replace("__", "."): files / value if (files / str(value)).exists() else value
            for field, value in changes.items()
        }
        if "editing.task" in changes and name != "no label":
            changes["sampling.label"] = 3
        words = arguments(workdir, trained[0] | changes, "digits", "sample")
        waiting.append((name, Run(words, folder / f"log_{len(runs)}_{len(waiting)}")))
        if len(waiting) == 4 or name == [*REFUSED][-1]:
            runs |= {name: started.wait() for name, started in waiting}
            waiting = []
    after = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()}
    assert {p: t for p, t in after.items() if p.name != ".lock"} == {
        p: t for p, t in before.items() if p.name != ".lock"
    }
    return runs


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_request_is_one_line(refusals, name):
    done = refusals[name]
    assert done.code == 2, done.stderr
    said = [line for line in done.stderr.splitlines() if not line.startswith("I")]
    assert len(said) == 1, done.stderr
    assert REFUSED[name][1] in said[0]


def test_grids_of_training_are_not_guided(tmp_path):
    """The weak network is read when training is over: its step may not be there before."""
    fields = TOY2D | {
        "guidance.weight": 2.0,
        "guidance.weak_step": 30,
        "train.sample_every_steps": 20,
        "sampling.num_steps": 3,
    }
    done = run(arguments(tmp_path / "run", fields), tmp_path / "log")
    assert done.code == 0, done.stderr
    assert (tmp_path / "run" / "samples" / "step_00000020.png").exists()
    assert "guided away from step 30" in done.stderr


def test_guidance_of_an_unconditional_model_is_refused(tmp_path):
    fields = DIGITS | {"guidance.weight": 2.0, "dataset.data_dir": tmp_path / "data"}
    done = run(arguments(tmp_path / "run", fields, "digits", "sample"), tmp_path / "log")
    assert done.code == 2
    assert done.stderr.startswith(
        "config.guidance.weight = 2.0: must be unset: the network has no labels"
    )
    assert len(done.stderr.splitlines()) == 1
