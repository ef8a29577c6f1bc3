"""The folder of a run: its allowed paths, its lock, and the record of its config."""

import json

import pytest

from diffusion_jax.errors import WorkdirError
from diffusion_jax.runtime.workdir import Workdir


@pytest.mark.parametrize("name", ["x[1]", "x*", "x?", "x\\y"])
@pytest.mark.parametrize("inside", ["", "/run"])
def test_a_path_that_orbax_takes_for_a_pattern_is_refused(tmp_path, name, inside):
    """Orbax could not read the checkpoints that it writes there."""
    with pytest.raises(WorkdirError, match=r"^workdir=.*: must have no .* could not be read back$"):
        Workdir(tmp_path / f"{name}{inside}")


@pytest.mark.parametrize("name", ["x 1", "x]", "é%41#", "~x", "a:b", "{x}"])
def test_any_other_path_is_fine(tmp_path, name):
    assert Workdir(tmp_path / name).path == tmp_path / name


def test_a_lock_ends_with_its_block_whatever_refers_to_it(tmp_path):
    """A stored traceback, as a notebook keeps it, does not keep the folder locked."""
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


def test_the_record_has_the_options_of_jax(tmp_path):
    workdir = Workdir(tmp_path)
    workdir.record({"seed": 3})
    options = json.loads((tmp_path / "config.json").read_text())["jax"]
    assert options["jax_default_prng_impl"] == "threefry2x32"
    assert options["jax_enable_x64"] is False
    assert workdir.read_record() == {"seed": 3}  # these options are not fields of the config


def test_a_run_that_began_between_check_and_lock_is_an_error(tmp_path):
    """The record at the lock must be the record that was checked before."""
    workdir = Workdir(tmp_path)
    for checked in (None, {"seed": 2}):
        workdir.record({"seed": 3})
        with pytest.raises(WorkdirError, match="another run has just changed config"):
            workdir.require_record(checked)
    workdir.require_record({"seed": 3})


def test_a_record_with_other_options_of_jax_is_refused(tmp_path):
    workdir = Workdir(tmp_path)
    workdir.record({"seed": 3})
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"jax_enable_x64": false', '"jax_enable_x64": true'))
    with pytest.raises(WorkdirError, match="holds a run with other options of jax"):
        workdir.read_record()
