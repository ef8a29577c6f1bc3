"""Runs on machines that lack a device, a home directory or a dependency of tfds."""

import os
import shutil
import subprocess
import sys

import pytest
from runs import DIGITS, REPOSITORY, TOY2D, arguments


def start(words, *, before=(), **environment):
    """Run main.py as a user does; a variable set to None is removed from the environment."""
    variables = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
    return subprocess.run(
        [*before, sys.executable, REPOSITORY / "main.py", *words],
        env={name: value for name, value in variables.items() if value is not None},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("platforms", ["cuda", "nonsense"])
def test_a_platform_that_is_not_there_is_one_line(tmp_path, platforms):
    done = start(arguments(tmp_path / "run", TOY2D), JAX_PLATFORMS=platforms)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"JAX_PLATFORMS = '{platforms}': ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("missing", ["six", "termcolor"])
def test_a_package_that_tfds_lacks_is_named(tmp_path, missing):
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / f"{missing}.py").write_text(f"raise ImportError('no {missing}')\n")
    fields = DIGITS | {"dataset.data_dir": tmp_path / "data"}
    path = os.pathsep.join([str(tmp_path / "path"), os.environ.get("PYTHONPATH", "")])
    done = start(arguments(tmp_path / "run", fields, "digits"), PYTHONPATH=path)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("tensorflow_datasets cannot be ")
    assert last.endswith(f": no {missing}")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


NOBODY = ("unshare", "--user", "--map-user=54321")  # a user without an entry in /etc/passwd
CAN_BE_NOBODY = (
    shutil.which("unshare")
    and not subprocess.run([*NOBODY, "true"], capture_output=True).returncode
)


@pytest.mark.skipif(not CAN_BE_NOBODY, reason="needs user namespaces")
def test_no_home_directory_is_one_line_where_one_is_needed(tmp_path):
    fields = {**TOY2D, "dataset.name": "digits", "model.name": "unet"}
    del fields["model.width"], fields["model.num_layers"]
    done = start(arguments(tmp_path / "run", fields, "digits"), before=NOBODY, HOME=None)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "config.dataset.data_dir = None: must be a folder: Could not determine home directory."
    ]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.skipif(not CAN_BE_NOBODY, reason="needs user namespaces")
def test_points_need_no_home_directory(tmp_path):
    words = arguments(tmp_path / "run", TOY2D | {"compilation_cache": None})
    done = start(words, before=NOBODY, HOME=None)
    assert done.returncode == 0, done.stderr
    assert "config.compilation_cache = None: no compiled program is kept" in done.stderr
