"""The package outside its checkout: as a module, from another folder, with a copied config."""

import os
import shutil
import subprocess
import sys

import pytest
from runs import TOY2D

import diffusion_jax

SMALL = [f"--config.{name}={value}" for name, value in (TOY2D | {"train.num_steps": 5}).items()]


def python(*words, folder, repository):
    """Run Python in another folder, with the package on its path as if it were installed."""
    environment = os.environ | {"PYTHONPATH": str(repository), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True
    )


def imported_by(code, folder, repository):
    """The names of the modules that a piece of code imports."""
    done = python("-X", "importtime", "-c", code, folder=folder, repository=repository)
    assert done.returncode == 0, done.stderr
    return {line.split("|")[-1].strip() for line in done.stderr.splitlines()}


def test_importing_the_package_imports_nothing_else(tmp_path, repository):
    names = imported_by("import diffusion_jax", tmp_path, repository)
    assert not names & {"jax", "numpy", "flax", "ml_collections", "absl"}


def test_importing_the_library_does_not_import_the_application(tmp_path, repository):
    code = "from diffusion_jax import schedules, samplers, process, losses, guidance, editing"
    names = imported_by(code, tmp_path, repository)
    assert "jax" in names
    others = {"flax", "optax", "orbax", "ml_collections", "absl", "grain", "matplotlib", "scipy"}
    assert not names & (others - {"scipy"})  # jax itself imports parts of scipy
    application = ("config", "data", "experiment", "models", "runtime", "training")
    assert not names & {f"diffusion_jax.{name}" for name in application}


@pytest.mark.parametrize("name", diffusion_jax.__all__)
def test_a_lazy_name_is_a_module_of_the_library(name):
    assert name in dir(diffusion_jax)
    assert getattr(diffusion_jax, name).__name__ == f"diffusion_jax.diffusion.{name}"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'schedule'"):
        diffusion_jax.schedule  # noqa: B018


def test_a_copied_config_alone_in_a_folder_trains(tmp_path, repository):
    folder = tmp_path / "empty"
    folder.mkdir()
    shutil.copy(repository / "configs" / "toy2d.py", folder)
    words = ["-m", "diffusion_jax", "--config=toy2d.py", "--workdir=run", *SMALL]
    done = python(*words, folder=folder, repository=repository)
    assert done.returncode == 0, done.stderr
    assert (folder / "run" / "samples" / "samples.npz").exists()


def test_a_config_may_import_others_of_its_folder(tmp_path, repository):
    """`from configs import default` works, as in configs that were copied with their folder."""
    folder = tmp_path / "mine" / "configs"
    folder.mkdir(parents=True)
    shutil.copy(repository / "configs" / "default.py", folder)
    (folder / "point.py").write_text(
        "from configs import default\n"
        "def get_config():\n"
        "    config = default.get_config()\n"
        "    config.dataset.name = 'toy2d'\n"
        "    config.schedule.s = -1.0\n"
        "    return config\n"
    )
    words = ["-m", "diffusion_jax", f"--config={folder}/point.py", "--workdir=run"]
    done = python(*words, folder=tmp_path, repository=repository)
    assert done.returncode == 2
    assert done.stderr == "config.schedule.s = -1.0: must be in [0, 1e100]\n"
    assert not (tmp_path / "run").exists()


def test_the_package_is_typed(repository):
    assert (repository / "diffusion_jax" / "py.typed").exists()
