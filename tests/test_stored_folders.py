"""Folders that commit 0a48fca wrote still work: a run resumes, an ablation writes its report.

tests/stored/make.sh shows how the folders were made. The tests compile with less optimization and
may run on another processor, so numbers round differently: they agree within the tolerances below.
"""

import csv
import hashlib
import json
import shutil
import tarfile

import conftest
import numpy as np
import pytest
from runs import REPOSITORY, run

STORED = REPOSITORY / "tests" / "stored"
ROUNDING = 1e-3  # relative, of losses and bits/dim after 20 more steps
GREY_LEVEL = 255 / 16  # the distance of two grey levels of the digits


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """All stored folders, unpacked."""
    folder = tmp_path_factory.mktemp("stored")
    for path in sorted(STORED.glob("*.tar.gz")):
        with tarfile.open(path) as archive:
            archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def main(data_dir):
    """A function that runs main.py with the config of the stored folders; the run must succeed."""

    def run_main(workdir, mode):
        words = [f"--config={STORED}/config.py", f"--workdir={workdir}", f"--mode={mode}"]
        words += [f"--config.compilation_cache={conftest.CACHE}"]
        words += [f"--config.dataset.data_dir={data_dir}"]
        done = run(words, workdir.with_name(f"{workdir.name}_{mode}"))
        assert done.code == 0, done.stderr
        return done

    return run_main


@pytest.fixture(scope="module")
def resumed(stored, main, tmp_path_factory):
    """The stored run, resumed to its end."""
    workdir = shutil.copytree(stored / "run", tmp_path_factory.mktemp("resumed") / "run")
    main(workdir, "train")
    return workdir


def records(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in lines]


def images(workdir):
    with np.load(workdir / "samples" / "samples.npz") as arrays:
        return arrays["images"]


def assert_alike(images, expected):
    """Assert that images are equal, except that a few pixels round to the next grey level."""
    assert (images.shape, images.dtype) == (expected.shape, expected.dtype)
    difference = np.abs(images.astype(int) - expected.astype(int))
    assert difference.max() <= GREY_LEVEL + 1
    assert (difference > 0).mean() < 0.02


def table(path):
    with (path / "ablation.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def contents(path):
    """Every file of a folder, with a hash of its bytes and the time of its last change."""
    return {
        p: (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns)
        for p in path.rglob("*")
        if p.is_file()
    }


def test_a_stored_run_resumes(stored, resumed):
    """The records of the first half stay; those of the second half are the old commit's."""
    before, found, expected = map(records, (stored / "run", resumed, stored / "finished"))
    assert [record["step"] for record in found] == [5, 10, 15, 20, 25, 30, 35, 40]
    assert found[: len(before)] == before
    for one, reference in zip(found, expected):
        assert one == pytest.approx(reference, rel=ROUNDING)
    assert (resumed / "checkpoints" / "40").is_dir()
    assert_alike(images(resumed), images(stored / "finished"))


def test_a_stored_run_samples_and_evaluates(stored, resumed, main, tmp_path):
    """Step 20 gives the old commit's samples, and step 40 its evaluation."""
    half = shutil.copytree(stored / "run", tmp_path / "run")
    main(half, "sample")
    assert_alike(images(half), images(stored / "run"))
    main(resumed, "evaluate")
    found, expected = (
        json.loads((workdir / "evaluation.json").read_text())
        for workdir in (resumed, stored / "finished")
    )
    assert found.keys() >= expected.keys()
    for name, value in expected.items():
        assert_near(found[name], value, name)


def assert_near(found, expected, name):
    """Assert that two JSON values are equal up to rounding."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), name
        for key, value in expected.items():
            assert_near(found[key], value, f"{name}.{key}")
    else:
        is_number = isinstance(expected, float)
        target = pytest.approx(expected, rel=10 * ROUNDING, abs=1e-6) if is_number else expected
        assert found == target, name


def test_a_stored_ablation_is_reported_without_training_or_scoring(stored, main, tmp_path):
    workdir = shutil.copytree(stored / "ablation", tmp_path / "ablation")
    expected = table(workdir)
    (workdir / "ablation.csv").unlink()
    before = contents(workdir)
    done = main(workdir, "ablate")
    assert "2 arms, 4 jobs, 4 finished" in done.stderr
    assert "training" not in done.stderr
    assert "scoring" not in done.stderr
    after = contents(workdir)
    assert after.items() >= before.items()  # the jobs and the classifier are as they were
    assert {path.name for path in after.keys() - before} == {"ablation.csv", "report.html", ".lock"}
    found = table(workdir)
    assert len(found) == len(expected) == 4
    for row, old_row in zip(found, expected):
        assert row.keys() == old_row.keys()
        for name, text in old_row.items():
            if name.startswith(
                "quality"
            ):  # the classifier measures it again; the rest is read from the jobs
                assert float(row[name]) == pytest.approx(float(text), rel=ROUNDING), name
            else:
                assert row[name] == text, name
