"""A run's folder: what may hold one, who holds it, and what its record says."""

import json

import pytest

from diffusion_jax.errors import WorkdirError
from diffusion_jax.runtime.workdir import Workdir


@pytest.mark.parametrize("name", ["x[1]", "x*", "x?", "x\\y"])
@pytest.mark.parametrize("inside", ["", "/run"])
def test_can_be_lost_a_path_that_orbax_takes_for_a_pattern(tmp_path, name, inside):
    """It would write checkpoints there which nobody can read."""
    with pytest.raises(WorkdirError, match=r"^workdir=.*: must have no .* could not be read back$"):
        Workdir(tmp_path / f"{name}{inside}")


@pytest.mark.parametrize("name", ["x 1", "x]", "é%41#", "~x", "a:b", "{x}"])
def test_any_other_path_is_fine(tmp_path, name):
    assert Workdir(tmp_path / name).path == tmp_path / name


def test_can_be_lost_a_lock_ends_with_its_block_whatever_refers_to_it(tmp_path):
    """A traceback that somebody keeps, as a notebook does, holds no folder."""
    workdir, lingering = Workdir(tmp_path), []

    def fail():
        held = workdir.lock()  # noqa: F841 (the frame of the traceback refers to it)
        with workdir.lock():
            raise RuntimeError

    try:
        fail()
    except RuntimeError as error:
        lingering.append(error)
    with Workdir(tmp_path).lock():
        assert lingering


def test_means_two_things_the_record_has_the_options_of_jax(tmp_path):
    workdir = Workdir(tmp_path)
    workdir.record({"seed": 3})
    options = json.loads((tmp_path / "config.json").read_text())["jax"]
    assert options["jax_default_prng_impl"] == "threefry2x32"
    assert options["jax_enable_x64"] is False
    assert workdir.read_record() == {"seed": 3}  # they are no fields of the config


def test_can_be_lost_the_record_of_a_run_that_began_meanwhile(tmp_path):
    """Between the check of a folder and its lock."""
    workdir = Workdir(tmp_path)
    for checked in (None, {"seed": 2}):
        workdir.record({"seed": 3})
        with pytest.raises(WorkdirError, match="another run has just changed config"):
            workdir.require_record(checked)
    workdir.require_record({"seed": 3})


def test_means_two_things_a_run_under_other_options_of_jax(tmp_path):
    workdir = Workdir(tmp_path)
    workdir.record({"seed": 3})
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"jax_enable_x64": false', '"jax_enable_x64": true'))
    with pytest.raises(WorkdirError, match="holds a run with other options of jax"):
        workdir.read_record()
