"""The benchmarks of a GPU, all of them rehearsed on a CPU, and of compilations."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from benchmarks import compile as compile_benchmark
from benchmarks import gpu, ours, programs, run, same, tables
from benchmarks.cases import CASES
from benchmarks.parts import PARTS
from diffusion_jax.runtime.checkpoint import Checkpoints

REPOSITORY = pathlib.Path(__file__).parent.parent
ARCHIVES = pathlib.Path(
    os.environ.get("DIFFUSION_JAX_ARCHIVES", pathlib.Path(__file__).parents[2] / "shared" / "data")
)
DATA = CASES["data"]._replace(options={"batch_size": 128, "num_batches": 4}, peers=("DataLoader",))


def test_a_contender_over_its_limit_is_left_out_in_words(tmp_path):
    case = DATA._replace(peers=())
    row = run.add(tmp_path / "B", "data", case, 2, run.Limits(to_be_ready=0.1))
    reasons = {name: figures["left_out"] for name, figures in row["contenders"].items()}
    assert reasons == {"ours": "not ready within 0 s"}
    page = (tmp_path / "B.md").read_text()
    assert f"| {DATA.title} | ours | left out: not ready within 0 s |" in page


def test_no_contender_starts_after_the_last_start(tmp_path):
    row = run.add(tmp_path / "B", "data", DATA, 2, run.Limits(last_start=0.0))
    for figures in row["contenders"].values():
        assert figures["left_out"] == "not started: no time was left"


def test_rounds_end_with_their_time_and_the_row_has_the_seconds_of_the_compilation(tmp_path):
    case = DATA._replace(peers=())
    row = run.add(tmp_path / "B", "data", case, 1_000_000, run.Limits(end=0.0))
    ours = row["contenders"]["ours"]
    assert len(ours["seconds"]) == 1
    assert ours["ready_seconds"] > 0
    assert f"| {ours['ready_seconds']:.1f} |" in (tmp_path / "B.md").read_text()


def test_ours_that_fails_other_than_by_a_limit_writes_no_row(tmp_path):
    case = DATA._replace(options={"batch_size": 128}, peers=())
    with pytest.raises(RuntimeError, match="num_batches"):
        run.add(tmp_path / "B", "data", case, 1, run.Limits())
    assert not (tmp_path / "B.md").exists()


def test_peers_are_shown_without_a_ratio_if_ours_is_left_out():
    late = tables.Figures([], left_out="not ready within 120 s")
    found = {"ours": late, "peer": tables.Figures([0.2, 0.4])}
    row = DATA._asdict() | {"unit": "step", "per_second": False, "amount": 1, "target": 0.8}
    row |= tables.summarise(found) | {"environment": tables.environment("GPU")}
    row["contenders"] = {name: figures._asdict() for name, figures in found.items()}
    line = tables.markdown({"case": row}).splitlines()[2]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[2:4] == ["left out: not ready within 120 s", "300 [250, 350], peer"]
    assert cells[6] == "at most 0.8: not measured"


def test_all_parts_fit_into_ten_minutes():
    assert sum(part.seconds for part in PARTS.values()) <= gpu.SECONDS < 600
    names, left = list(PARTS), gpu.SECONDS
    for number in range(len(names)):  # each part takes all that it may
        left -= gpu.share(names[number:], left)
    assert left == pytest.approx(0)


def finished(path, value, loss=0.5):
    """A folder of a run that has ended, with one array of this value."""
    checkpoints = Checkpoints(path / "checkpoints", 1, 0)
    checkpoints.save(3, {"weights": np.full(4, value, np.float32)}, 0.0)
    checkpoints.close()
    record = {"step": 3, "loss": loss, "images_per_second": np.random.default_rng().random()}
    (path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    (path / "samples").mkdir()
    np.savez(path / "samples" / "samples.npz", images=np.zeros((1, 2, 2, 1), np.uint8))
    return path


def test_runs_are_compared_bit_for_bit(tmp_path):
    one = finished(tmp_path / "one", 1.0)
    assert list(same.differences(one, finished(tmp_path / "again", 1.0))) == []
    (line,) = same.differences(one, finished(tmp_path / "next", np.nextafter(np.float32(1), 2)))
    assert line == "checkpoint 3: 1 of 1 arrays differ, by at most 1.2e-07"
    (line,) = same.differences(one, finished(tmp_path / "loss", 1.0, loss=0.25))
    assert line.startswith("metrics.jsonl: first in the record {'step': 3, 'loss': 0.5}")


@pytest.mark.slow
def test_every_part_runs_on_a_cpu(tmp_path):
    words = ["-m", "benchmarks.gpu", f"--into={tmp_path}/B", "--platform=cpu", "--rounds=2"]
    words += [f"--archives={ARCHIVES}/mnist", "--seconds=900", "--limit=120"]
    environment = os.environ | {"TFDS_DATA_DIR": str(tmp_path / "data")}
    done = subprocess.run(
        [sys.executable, *words], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    parts = json.loads((tmp_path / "B_GPU.json").read_text())
    assert list(parts) == list(PARTS)
    results = {name: part["results"] for name, part in parts.items()}
    if not ARCHIVES.is_dir():
        assert f"{ARCHIVES}/mnist" in results.pop("mnist")["failed"]
    assert [name for name, of_part in results.items() if "failed" in of_part] == [], done.stderr
    assert done.returncode == int("mnist" not in results)
    assert results["resume"]["last checkpoint, records, samples"] == "every bit is equal"
    bits = {value for what, value in results["precision"].items() if what.startswith("bits/dim")}
    assert len(bits) == 1  # a CPU computes in float32 always
    rows = json.loads((tmp_path / "B.json").read_text())
    assert all(row["contenders"]["ours"]["ready_seconds"] > 0 for row in rows.values())
    page = (tmp_path / "B.md").read_text()
    assert "| compile | train step, tiny, bfloat16, batch 16, as it is |" in page


def test_a_program_is_measured_in_its_three_stages():
    square = jax.jit(lambda x: x @ x)
    measured = compile_benchmark.measure(square, jax.ShapeDtypeStruct((8, 8), np.float32))
    assert min(measured.trace, measured.lower, measured.compile) > 0
    assert measured.lines > 3


@pytest.fixture
def started(monkeypatch):
    """The benchmarks take the devices of the tests, which have started."""
    monkeypatch.setattr(ours.devices, "start", lambda *_, **__: None)


def test_the_parts_of_a_step_are_programs_of_their_own(started):
    named = programs.of_training("tiny", 8, "float32", jax.devices()[:2])
    lines = {
        name: function.lower(*arguments).as_text().count("\n")
        for name, (function, *arguments) in named.items()
    }
    assert lines["network"] < lines["loss"] < lines["gradient"] < lines["step"]
    assert lines["clipping"] < lines["optimizer"] < lines["step"]
    assert {"averages", "exchange"} < set(lines)


def test_the_programs_of_an_evaluation_lower(started):
    named = programs.of_evaluation("tiny", 2, "float32", jax.devices()[:2])
    assert set(named) == {"bound", "flow"}
    for function, *arguments in named.values():
        assert function.lower(*arguments).as_text()


def test_the_chain_is_compiled_and_is_a_row_of_a_table():
    words = "--what=sample", "--size=tiny", "--batch-size=2"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.compile", *words],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    (row,) = [line for line in done.stdout.splitlines() if line.startswith("| chain |")]
    assert all(float(cell.replace(",", "")) >= 0 for cell in row.split("|")[2:-1])


def test_an_unknown_part_is_refused_in_words():
    words = "--what=sample", "--size=tiny", "--batch-size=2", "--parts", "step"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.compile", *words],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("--parts: step: must be in chain")
