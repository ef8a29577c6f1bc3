import contextlib
import itertools
import logging
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from runs import assert_same

from diffusion_jax.errors import WorkdirError
from diffusion_jax.runtime import checkpoint
from diffusion_jax.runtime.checkpoint import (
    Checkpoints,
    NoIntactCheckpointError,
    OtherModelError,
    SaveError,
    digest,
    flatten,
    saved_steps,
)


def state_at(step):
    weights = np.random.default_rng(step).normal(size=(64, 33)).astype(np.float32)
    return {"step": np.int32(step), "params": {"kernel": weights, "bias": weights[0] * 2}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of the steps 10 and 20."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    checkpoints = Checkpoints(directory, 2, 0)
    for step in (10, 20):
        checkpoints.save(step, state_at(step), 1.0)
    checkpoints.close()
    return directory


@pytest.fixture
def directory(saved, tmp_path):
    """A copy of them to do harm to."""
    return shutil.copytree(saved, tmp_path / "checkpoints")


def restore(directory, template=None):
    checkpoints = Checkpoints(directory, 2, 0)
    try:
        return checkpoints.restore(state_at(0) if template is None else template)
    finally:
        checkpoints.close()


def files_of(directory, step):
    return sorted(path for path in (directory / str(step)).rglob("*") if path.is_file())


def delete(path):
    path.unlink()


def truncate(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def flip(place):
    def flip_a_bit(path):
        content = bytearray(path.read_bytes())
        if content:
            content[int(place * (len(content) - 1))] ^= 16
        path.write_bytes(content)

    return flip_a_bit


DAMAGES = {"delete": delete, "truncate": truncate} | {
    f"flip {p}": flip(p) for p in (0, 0.37, 0.9, 1)
}


def test_the_newest_state_comes_back_bit_for_bit(saved):
    restored = restore(saved)
    assert restored.step == 20
    assert_same(flatten(restored.state), flatten(state_at(20)))


def test_nothing_saved_is_none(tmp_path):
    assert restore(tmp_path / "checkpoints") is None


@pytest.mark.parametrize("damage", DAMAGES)
def test_whatever_is_damaged_the_state_is_intact(saved, tmp_path, damage, caplog, monkeypatch):
    """Every file of the newest step in turn: it falls back with a warning, or nothing was lost."""
    monkeypatch.setattr(logging.getLogger("diffusion_jax"), "propagate", True)
    fell_back = 0
    for number, file in enumerate(files_of(saved, 20)):
        directory = shutil.copytree(saved, tmp_path / str(number))
        DAMAGES[damage](directory / file.relative_to(saved))
        caplog.clear()
        restored = restore(directory)
        assert restored.step in (10, 20), file
        assert_same(flatten(restored.state), flatten(state_at(restored.step)))
        # a step that orbax holds for half-written needs no warning
        warned = "checkpoint 20 is damaged" in caplog.text
        assert not warned or restored.step == 10, file
        fell_back += warned
    assert fell_back


def test_the_digest_sees_the_flipped_bits_that_orbax_restores(saved, tmp_path):
    """Why there is a digest: orbax alone hands out the changed arrays without a word."""
    silent = 0
    data_files = [
        f for f in files_of(saved, 20) if f.parent.name == "d" and f.stat().st_size > 5000
    ]
    assert data_files
    for number, place in enumerate(np.linspace(0.2, 0.8, 5)):
        directory = shutil.copytree(saved, tmp_path / str(number))
        flip(place)(directory / data_files[0].relative_to(saved))
        with ocp.training.Checkpointer(directory) as plain:
            try:
                arrays = plain.load(20)
            except Exception:  # where the flip breaks the file's structure, orbax does see it
                continue
        if digest(flatten(arrays)) != digest(flatten(state_at(20))):
            silent += 1
            assert restore(directory).step == 10
    assert silent


def test_every_step_damaged_is_an_error(directory):
    for step in (10, 20):
        for file in files_of(directory, step):
            if file.parent.name == "d":
                truncate(file)
    with pytest.raises(NoIntactCheckpointError, match=r"\[10, 20\]"):
        restore(directory)


def test_a_half_written_step_is_ignored(directory):
    shutil.copytree(directory / "20", directory / "30.orbax-checkpoint-tmp")
    (directory / "40").mkdir()
    assert restore(directory).step == 20


def test_a_run_that_fell_back_keeps_what_it_saves_then(directory):
    """A damaged step is newer than what is saved next: it must not push that out."""
    for file in files_of(directory, 20):
        if file.parent.name == "d":
            truncate(file)
    for step in (15, 20):  # before the damaged step, and at its number
        checkpoints = Checkpoints(directory, 1, 0)
        assert checkpoints.restore(state_at(0)).step == step - 5
        checkpoints.save(step, state_at(step), 1.0)
        checkpoints.close()
        restored = restore(directory)
        assert restored.step == step
        assert_same(flatten(restored.state), flatten(state_at(step)))
    assert (directory / "20.damaged").is_dir()  # for whoever wants to look at it


@pytest.mark.parametrize(
    ("keep_last", "keep_best", "kept"),
    [(1, 0, [6]), (2, 0, [5, 6]), (1, 1, [2, 6]), (2, 2, [2, 4, 5, 6]), (6, 6, [1, 2, 3, 4, 5, 6])],
)
def test_the_last_and_the_best_are_kept(tmp_path, keep_last, keep_best, kept):
    checkpoints = Checkpoints(tmp_path, keep_last, keep_best)
    for step, loss in enumerate([0.9, 0.1, 0.8, 0.2, 0.7, 0.6], start=1):
        checkpoints.save(step, {"x": np.float32(step)}, loss)
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path, keep_last, keep_best)
    assert checkpoints.steps == kept
    checkpoints.close()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: s["params"].pop("bias"), "params/bias"),
        (lambda s: s["params"].update(extra=np.zeros(2, np.float32)), "params/extra"),
        (lambda s: s["params"].update(bias=np.zeros(34, np.float32)), "params/bias"),
        (lambda s: s["params"].update(bias=np.zeros(33, np.float16)), "params/bias"),
        (lambda s: s.update(ema=np.zeros(2, np.float32)), "ema"),
    ],
)
def test_a_state_of_another_structure_is_an_error(saved, change, named):
    template = state_at(0)
    change(template)
    with pytest.raises(OtherModelError, match=named):
        restore(saved, template)


def test_a_part_can_be_restored_by_its_shapes(saved):
    template = jax.eval_shape(lambda: {"params": jax.tree.map(jnp.asarray, state_at(0)["params"])})
    state = restore(saved, template).state
    assert_same(flatten(state), flatten({"params": state_at(20)["params"]}))


def test_the_digest_depends_on_names_types_shapes_and_every_bit():
    arrays = {"a": np.zeros((2, 3), np.float32), "b": np.ones(4, np.float32)}
    others = [
        {"a": arrays["b"], "b": arrays["a"]},
        arrays | {"a": np.zeros((3, 2), np.float32)},
        arrays | {"a": np.zeros((2, 3), np.int32)},
        arrays | {"a": -arrays["a"]},
        {"a": arrays["a"]},
    ]
    assert digest(dict(reversed(arrays.items()))) == digest(arrays)
    assert len({digest(other) for other in [arrays, *others]}) == 1 + len(others)


def test_a_damaged_older_step_hinders_nothing(directory):
    """A flipped bit in the metadata of any step would stop orbax from starting at all."""
    flip(0.37)(directory / "10" / "_CHECKPOINT_METADATA")
    checkpoints = Checkpoints(directory, 2, 1)
    assert checkpoints.restore(state_at(0)).step == 20
    checkpoints.save(30, state_at(30), 1.0)
    checkpoints.close()
    assert restore(directory).step == 30


def test_can_be_lost_older_steps_while_a_save_is_not_confirmed(saved, tmp_path):
    """Orbax takes the path for a pattern, and leaves out the arrays without an error."""
    directory = shutil.copytree(saved, tmp_path / "x[1]" / "checkpoints")
    checkpoints = Checkpoints(directory, 1, 0)
    checkpoints.save(30, state_at(30), 1.0)
    with pytest.raises(
        SaveError, match=r"^checkpoint 30 could not be saved, earlier checkpoints stay"
    ):
        checkpoints.close()
    assert saved_steps(directory) == [10, 20, 30]
    restored = restore(shutil.copytree(directory, tmp_path / "elsewhere"), state_at(0))
    assert restored.step == 20
    assert_same(flatten(restored.state), flatten(state_at(20)))


def test_can_be_lost_a_save_that_failed_is_reported_by_the_next(saved, tmp_path):
    directory = shutil.copytree(saved, tmp_path / "x[1]" / "checkpoints")
    with contextlib.closing(Checkpoints(directory, 1, 0)) as checkpoints:
        checkpoints.save(30, state_at(30), 1.0)
        with pytest.raises(SaveError, match="checkpoint 30"):
            checkpoints.save(40, state_at(40), 1.0)
    assert saved_steps(directory) == [10, 20, 30]


def snapshot(folder):
    """Every path below a folder, with its contents and the time of its last change."""
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in [folder, *folder.rglob("*")]
    }


def test_can_be_lost_what_another_run_is_writing_a_reader_changes_nothing(directory):
    shutil.copytree(directory / "20", directory / "30.orbax-checkpoint-tmp")
    before = snapshot(directory.parent)
    template = {"kernel": state_at(0)["params"]["kernel"]}
    template = {"ema": template, "step": np.int32(0)}
    with pytest.raises(OtherModelError):
        checkpoint.restore(directory, template)
    assert checkpoint.restore(directory, state_at(0)).step == 20
    assert checkpoint.restore(directory, state_at(0), step=7) is None
    assert snapshot(directory.parent) == before
    assert checkpoint.restore(directory.parent / "nothing", state_at(0)) is None
    with pytest.raises(WorkdirError, match="has no checkpoint yet"):
        checkpoint.restore_average(state_at(0), directory.parent / "nothing", None)
    assert snapshot(directory.parent) == before


READER = """
import logging, pathlib, sys
import numpy as np
from diffusion_jax.runtime import checkpoint

logging.basicConfig(stream=sys.stdout)
steps = set()
while len(steps) < 10:
    template = {"step": np.int32(0), "x": np.zeros(50_000, np.float32)}
    restored = checkpoint.restore(pathlib.Path(sys.argv[1]), template)
    if restored is not None:
        assert (restored.state["x"] == restored.state["step"]).all()
        assert restored.step == restored.state["step"] >= max(steps, default=0)
        steps.add(restored.step)
"""


def test_can_be_lost_nothing_where_a_live_run_is_read(tmp_path):
    """It saves and removes steps all the time; each that is read is whole, and none is damaged."""

    def state(step):
        return {"step": np.int32(step), "x": np.full(50_000, step, np.float32)}

    words = [sys.executable, "-c", READER, str(tmp_path)]
    reader = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    numbers = itertools.count(1)
    with contextlib.closing(Checkpoints(tmp_path, 1, 0)) as checkpoints:
        while reader.poll() is None:
            last = next(numbers)
            checkpoints.save(last, state(last), 1.0)
    assert reader.communicate()[0] == ""  # no warning either
    assert reader.returncode == 0
    assert saved_steps(tmp_path) == [last]
    assert_same(flatten(checkpoint.restore(tmp_path, state(0)).state), flatten(state(last)))


def test_the_step_that_guides_is_kept(tmp_path):
    with contextlib.closing(Checkpoints(tmp_path, 1, 0, keep_step=2)) as checkpoints:
        for step in range(1, 5):
            checkpoints.save(step, {"x": np.float32(step)}, 1.0)
    assert saved_steps(tmp_path) == [2, 4]


def test_what_a_killed_run_left_is_removed_by_the_next_that_writes(directory):
    for name in ("30.orbax-checkpoint-tmp", "5.removed"):
        shutil.copytree(directory / "20", directory / name)
    Checkpoints(directory, 2, 0).close()
    assert sorted(path.name for path in directory.iterdir()) == ["10", "20"]
