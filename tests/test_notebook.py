"""The Colab notebook runs from top to bottom, resumes a run, and shows its pictures.

It installs the project beside the packages that Colab has, and changes none of those.
"""

import configparser
import importlib.metadata
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import nbformat
import pytest
from nbclient import NotebookClient

TINY = [
    "--config.train.num_steps=6",
    "--config.train.batch_size=8",
    "--config.train.log_every_steps=2",
    "--config.train.sample_every_steps=0",
    "--config.model.width=8",
    "--config.model.channel_multipliers=(1,)",
    "--config.model.num_blocks=1",
    "--config.model.attention_resolutions=()",
    "--config.model.head_channels=8",
    "--config.schedule.num_timesteps=10",
    "--config.optimizer.warmup_steps=2",
    "--config.sampling.num_images=4",
    "--config.sampling.num_frames=4",
    "--config.num_devices=1",
]
PIP = '"pip", "install"'


@pytest.fixture(scope="module")
def executed(repository, data_dir, tmp_path_factory):
    """The notebook after a run with small parameters, and the folder of that run."""
    notebook = nbformat.read(repository / "notebooks" / "colab_tpu.ipynb", as_version=4)
    folder = tmp_path_factory.mktemp("mounted")
    (parameters,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", ()))
    parameters.source = "\n".join(
        [
            'REPOSITORY = ""',
            'CONFIG = "configs/digits.py"',
            "MINUTES = 5.0",
            f"FOLDER = {str(folder)!r}",
            f"OVERRIDES = {[*TINY, f'--config.dataset.data_dir={data_dir}']!r}",
        ]
    )
    # the kernel and main.py must be those of this environment, so pip only prints its version
    (install,) = (c for c in notebook.cells if PIP in c.source)
    install.source = install.source.replace(PIP, '"pip", "--version", "install"')
    notebook.metadata.kernelspec.name = "python3"
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    client = NotebookClient(
        notebook, timeout=240, resources={"metadata": {"path": repository / "notebooks"}}
    )
    return client.execute(env=os.environ | {"PATH": path, "JAX_PLATFORMS": "cpu"}), folder


def _output(cell):
    return "".join(
        o.get("text", "") + o.get("data", {}).get("text/plain", "") for o in cell.outputs
    )


def test_trains_and_a_second_call_finds_the_run_done(executed):
    notebook, folder = executed
    first, again = (c for c in notebook.cells if c.source.endswith('run("train", MINUTES)'))
    assert "step 6/6" in _output(first)
    assert "'done'" in _output(first)
    assert "resuming at step 6" in _output(again)
    assert (folder / "samples" / "samples.npz").exists()


def test_shows_the_card_the_grid_and_the_animation(executed):
    notebook, _ = executed
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    kinds = [kind for output in outputs for kind in output.get("data", ())]
    assert kinds.count("image/png") == 2
    assert kinds.count("image/gif") == 1


def test_needs_no_tensorflow(repository):
    assert "tensorflow" not in (repository / "notebooks" / "colab_tpu.ipynb").read_text()


@pytest.fixture
def install(repository, monkeypatch):
    """The source of the cell that installs the project from the current folder."""
    monkeypatch.chdir(repository)
    notebook = nbformat.read(repository / "notebooks" / "colab_tpu.ipynb", as_version=4)
    (cell,) = (c for c in notebook.cells if PIP in c.source)
    return cell.source


def _run_with(install, monkeypatch, pip):
    """Run the cell in this process; ``pip`` stands for the child process that installs."""
    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setattr(subprocess, "check_output", lambda *_, **__: "")
    exec(install, {})


def test_a_changed_package_stops_the_installation(install, monkeypatch):
    versions = {"jax": "0.7.1", "flax": "0.12.0"}

    def version(name):
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    def pip(*_, **__):
        versions.update(jax="0.10.2", jaxlib="0.10.2")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(SystemExit, match=r"changed jax 0\.7\.1 to 0\.10\.2: start"):
        _run_with(install, monkeypatch, pip)


def test_an_error_of_pip_is_the_reason(install, monkeypatch):
    output = "Collecting x\nERROR: No matching distribution found for x\n[notice] a new pip\n"
    pip = SimpleNamespace(returncode=1, stdout=output)
    with pytest.raises(SystemExit, match=r"keep \[.*'flax==.*: ERROR: No matching.* for x$"):
        _run_with(install, monkeypatch, lambda *_, **__: pip)


def _install_beside(packages, install, repository, folder):
    """Run the cell in a new environment that holds ``packages``; also its versions afterwards."""
    python = folder / "environment" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", folder / "environment"], check=True)
    pip = [python, "-m", "pip"]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", *packages], check=True)
    checkout = folder / "checkout"
    shutil.copytree(repository / "diffusion_jax", checkout / "diffusion_jax")
    for name in ("main.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repository / name, checkout)
    ended = subprocess.run(
        [python, "-c", install],
        cwd=checkout,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    frozen = subprocess.check_output([*pip, "freeze"], text=True).splitlines()
    return ended, set(frozen)


def _oldest(repository, *names):
    """The oldest versions that setup.cfg allows, as requirements of pip."""
    setup = configparser.ConfigParser()
    setup.read(repository / "setup.cfg")
    lines = setup["options"]["install_requires"].splitlines()
    bounds = dict(line.split(">=") for line in lines if line)
    return [f"{name}=={bounds[name]}" for name in names]


@pytest.mark.slow
def test_old_packages_stay(install, repository, tmp_path):
    old = _oldest(repository, "jax", "flax", "orbax-checkpoint")
    old.append(old[0].replace("jax", "jaxlib"))
    ended, frozen = _install_beside(old, install, repository, tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "CpuDevice" in ended.stdout
    assert {*old} <= frozen


@pytest.mark.slow
def test_a_package_that_is_too_old_stops_the_installation(install, repository, tmp_path):
    ended, frozen = _install_beside(["flax==0.11.2"], install, repository, tmp_path)
    assert ended.returncode == 1
    (bound,) = _oldest(repository, "flax")
    (sentence,) = ended.stderr.splitlines()
    assert sentence.startswith("pip could not install the project and keep ['flax==0.11.2']: ")
    assert f"depends on {bound.replace('==', '>=')}" in sentence
    assert frozen == {"flax==0.11.2"}
