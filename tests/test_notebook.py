"""The Colab notebook runs from top to bottom, resumes a run, and shows its pictures."""

import os
import sys

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
    # the kernel and main.py must be those of this environment, so nothing is installed
    (install,) = (c for c in notebook.cells if '"pip", "install"' in c.source)
    assert "tensorflow" not in install.source
    lines = [line for line in install.source.splitlines() if '"pip", "install"' not in line]
    install.source = "\n".join(lines)
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
