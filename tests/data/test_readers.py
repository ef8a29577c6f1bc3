"""Files of the user, intact and damaged: pictures, arrays, records of runs, and paths."""

import io
import json
import pathlib
import zipfile

import numpy as np
import PIL.Image
import pytest

from diffusion_jax.config.config import OF_THE_MODEL, load, require_same
from diffusion_jax.config.paths import expand
from diffusion_jax.data.arrays import read_array
from diffusion_jax.data.pictures import read_images, read_picture
from diffusion_jax.errors import ConfigError, WorkdirError
from diffusion_jax.experiment.schedule import create_schedule
from diffusion_jax.runtime.workdir import Workdir

REPOSITORY = pathlib.Path(__file__).parents[2]


def picture(pixels, mode=None, kind="PNG", **options):
    """The bytes of a picture."""
    file = io.BytesIO()
    PIL.Image.fromarray(np.asarray(pixels), mode).save(file, kind, **options)
    return file.getvalue()


GREY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
RGB = np.stack([GREY, GREY.T, 255 - GREY], axis=-1)
LUMA = np.asarray(PIL.Image.fromarray(RGB).convert("L"))


def opaque(pixels, alpha=255):
    """The pixels with an alpha channel of one value."""
    channels = np.atleast_3d(pixels)
    return np.concatenate([channels, np.full((8, 8, 1), alpha, np.uint8)], axis=-1)


WHOLE = {
    "grey": (picture(GREY), GREY),
    "rgb": (picture(RGB), RGB),
    "16 bits": (picture(GREY.astype(np.uint16) * 257), GREY),
    "32 bits that hold 16": (picture(GREY.astype(np.int32) * 257, kind="TIFF"), GREY),
    "opaque rgb": (picture(opaque(RGB)), RGB),
    "opaque grey": (picture(opaque(GREY)), GREY),
    "one bit": (picture(GREY > 99), np.where(GREY > 99, 255, 0).astype(np.uint8)),
    "bitmap": (picture(RGB, kind="BMP"), RGB),
    "webp": (picture(RGB, kind="WEBP", lossless=True), RGB),
    "gif": (picture(GREY, kind="GIF"), GREY),
    "palette": (picture(GREY > 99, kind="GIF"), np.where(GREY > 99, 255, 0).astype(np.uint8)),
}


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_is_read_as_what_it_shows(tmp_path, name, channels):
    content, shown = WHOLE[name]
    (tmp_path / "file").write_bytes(content)
    pixels = read_picture(tmp_path / "file", channels)
    if channels == 1:
        expected = (LUMA if shown.ndim == 3 else shown)[..., None]
    else:
        expected = shown if shown.ndim == 3 else np.repeat(shown[..., None], 3, axis=-1)
    np.testing.assert_array_equal(pixels, expected, strict=True)


PNG = picture(GREY)


def flipped(content, place, bit=4):
    content = bytearray(content)
    content[int(place * (len(content) - 1))] ^= 1 << bit
    return bytes(content)


NO_PICTURES = {
    "empty": b"",
    "text": b"a picture\n",
    "cut head": PNG[:10],
    "cut half": PNG[: len(PNG) // 2],
    "cut in the pixels": PNG[:-30],
    "flipped head": flipped(PNG, 0),
    "flipped size": flipped(PNG, 18 / len(PNG)),
    "flipped pixels": flipped(PNG, 0.6),
    "jpeg cut": picture(RGB, kind="JPEG")[:100],
    "gif cut": picture(GREY, kind="GIF")[:40],
    "a hole in grey": picture(opaque(GREY, 0)),
    "a hole in rgb": picture(opaque(RGB, 254)),
    "a transparent level": picture(GREY, transparency=0),
    "floating point": picture(GREY.astype(np.float32), kind="TIFF"),
    "32 bits": picture(GREY.astype(np.int32) * 2**20, kind="TIFF"),
    "below 0": picture(GREY.astype(np.int32) - 9, kind="TIFF"),
}


@pytest.mark.parametrize("name", NO_PICTURES)
def test_a_file_that_is_no_picture_is_one_line(tmp_path, name):
    (tmp_path / "file").write_bytes(NO_PICTURES[name])
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        read_picture(tmp_path / "file", 1)


@pytest.mark.parametrize("path", ["nothing", "", "."])
def test_a_picture_that_is_not_there_is_one_line(tmp_path, path):
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        read_picture(tmp_path / path, 1)


def array(value, name="x", compressed=False):
    """The bytes of an .npz file with an array, or of a .npy file if ``name`` is None."""
    file = io.BytesIO()
    if name is None:
        np.save(file, value)
    else:
        (np.savez_compressed if compressed else np.savez)(file, **{name: value})
    return file.getvalue()


BETAS = np.linspace(1e-4, 0.02, 50)


@pytest.mark.parametrize("content", [array(BETAS, None), array(BETAS), array(BETAS, "x", True)])
@pytest.mark.parametrize("end", ["", ".npy", ".npz"])
def test_an_array_is_read_whatever_the_ending_of_its_file_name(tmp_path, content, end):
    (tmp_path / f"file{end}").write_bytes(content)
    np.testing.assert_array_equal(read_array(tmp_path / f"file{end}", "x"), BETAS, strict=True)


def zipped(content):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x.npy", content)
    return file.getvalue()


NO_ARRAYS = {
    "empty": b"",
    "text": b"0.1 0.2\n",
    "json": b"[0.1, 0.2]",
    "npy cut in the head": array(BETAS, None)[:50],
    "npy cut in the numbers": array(BETAS, None)[:-9],
    "npy with a flipped head": flipped(array(BETAS, None), 0),
    "npy with a flipped description": flipped(array(BETAS, None), 0.03),
    "npz cut": array(BETAS)[:-30],
    "npz cut in half": array(BETAS)[:200],
    "npz with a flipped number": flipped(array(BETAS), 0.5),
    "compressed npz with a flipped bit": flipped(array(BETAS, "x", True), 0.5),
    "npz of another name": array(BETAS, "y"),
    "npz of text": zipped(b"not an array"),
    "npz of an empty file": zipped(b""),
    "npz of nothing": array(BETAS)[-22:],
    "objects": array(np.array([{}, "x"], dtype=object), None),
    "a picture": PNG,
}


@pytest.mark.parametrize("name", NO_ARRAYS)
def test_a_file_that_is_no_array_is_one_line(tmp_path, name):
    (tmp_path / "file").write_bytes(NO_ARRAYS[name])
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        read_array(tmp_path / "file", "x")


@pytest.mark.parametrize("path", ["nothing", "."])
def test_an_array_that_is_not_there_is_one_line(tmp_path, path):
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        read_array(tmp_path / path, "x")


@pytest.mark.parametrize("name", ["cut", "empty", "npy", "float", "shape", "none"])
def test_a_file_without_images_of_the_data_set_is_one_line(tmp_path, name):
    images = np.zeros((2, 8, 8, 1), np.uint8)
    content = {
        "cut": array(images, "images")[:-40],
        "empty": b"",
        "npy": array(images[..., 0], None)[:60],
        "float": array(images / 255, "images"),
        "shape": array(images[:, :7], "images"),
        "none": array(images[:0], "images"),
    }[name]
    (tmp_path / "file.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        read_images(str(tmp_path / "file.npz"), (8, 8, 1))


def config_of(**fields):
    overrides = [(name.replace("__", "."), str(value)) for name, value in fields.items()]
    return load(str(REPOSITORY / "configs" / "toy2d.py"), overrides)


BAD_BETAS = {
    **{name: content for name, content in NO_ARRAYS.items() if name != "npz of another name"},
    "complex": array(BETAS + 1j, None),
    "integers": array(np.ones(50, int), None),
    "booleans": array(np.ones(50, bool), None),
    "strings": array(np.array(["a"] * 50), None),
    "a matrix": array(np.full((5, 10), 0.1), None),
    "a number": array(np.float64(0.1), None),
    "no beta": array(np.zeros(0), None),
    "not a number": array(np.full(50, np.nan), None),
    "infinite": array(np.full(50, np.inf), None),
    "negative": array(-BETAS, None),
    "too many": array(np.full(51, 0.1), None),
}


@pytest.mark.parametrize("name", BAD_BETAS)
def test_a_file_without_valid_betas_is_named(tmp_path, name):
    (tmp_path / "betas").write_bytes(BAD_BETAS[name])
    config = config_of(
        schedule__name="from_betas",
        schedule__betas=tmp_path / "betas",
        schedule__num_timesteps=50,
    )
    with pytest.raises(ConfigError, match=r"^config\.schedule\.(betas|num_timesteps)[^\n]*$"):
        create_schedule(config, None)


RECORDS = ["", "{", "[]", "3", "null", '"config"', "[" * 100_000, "\x00", '{"seed": NaN']


@pytest.mark.parametrize("text", RECORDS, ids=range(len(RECORDS)))
def test_a_damaged_record_is_one_line(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(WorkdirError, match=r"^workdir=[^\n]*: config.json is damaged: [^\n]*$"):
        Workdir(tmp_path).read_record()


def test_a_record_that_is_not_utf_8_is_one_line(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(WorkdirError, match=r"^[^\n]*config.json is damaged: [^\n]*$"):
        Workdir(tmp_path).read_record()


@pytest.mark.parametrize(
    "change",
    [{"model": 3}, {"loss": []}, {"schedule": None}, {"seed": {}}, {"model": None}, {"train": "x"}],
    ids=str,
)
def test_a_record_without_its_sections_is_one_line(change):
    config = config_of()
    record = json.loads(config.to_json_best_effort()) | change
    with pytest.raises(ConfigError, match=r"^config\.\w+: damaged in the config.json[^\n]*$"):
        require_same(config, record, OF_THE_MODEL, "there")


def test_a_tilde_is_expanded_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = config_of(dataset__data_dir="~/sets", editing__mask="~", schedule__betas="b~.npy")
    assert config.dataset.data_dir == f"{tmp_path}/sets"
    assert config.editing.mask == str(tmp_path)
    assert config.schedule.betas == "b~.npy"
    assert expand("--workdir", "~/runs/x") == f"{tmp_path}/runs/x"


def test_the_home_directory_of_an_unknown_user_is_one_line():
    with pytest.raises(
        ConfigError, match=r"^--workdir = '~nosuchuser/x': must be without ~: [^\n]+$"
    ):
        expand("--workdir", "~nosuchuser/x")
