"""The metrics of a run: metrics.jsonl, TensorBoard's event files, and the progress on screen."""

import io
import json
import logging
import struct
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from diffusion_jax.runtime import files
from diffusion_jax.training.metrics import DamagedRecordError, MetricsWriter, Progress


def read_records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").open()]


def read_events(workdir):
    """The events of every file under tensorboard/, in the order in which TensorBoard reads them."""
    for path in sorted((workdir / "tensorboard").iterdir()):
        content = path.read_bytes()
        while content:
            # A TFRecord is the length, its checksum, the data and their checksum
            (length,) = struct.unpack("<Q", content[:8])
            data = content[12 : 12 + length]
            (checksum,) = struct.unpack("<I", content[12 + length : 16 + length])
            assert checksum == masked_crc32c(data)
            content = content[16 + length :]
            yield Event.FromString(data)


def read_tensorboard(workdir):
    """What TensorBoard shows: {(name, step): value}; a resumed run replaces later steps."""
    shown = {}
    for event in read_events(workdir):
        if event.session_log.status == SessionLog.START:
            shown = {place: v for place, v in shown.items() if place[1] < event.step}
        for value in event.summary.value:
            shown[value.tag, event.step] = value
    return shown


def train(workdir, steps, resume_step=0):
    """Write metrics for some steps, as a run does that resumes at a step."""
    workdir.mkdir(exist_ok=True)
    with MetricsWriter(workdir, resume_step) as writer:
        for step in steps:
            writer.write(step, loss=1 / step, learning_rate=step / 7)


# metrics.jsonl ---------------------------------------------------------------------------------


def test_records_are_flat_and_floats_survive_exactly(tmp_path):
    train(tmp_path, [1, 2, 3])
    assert read_records(tmp_path) == [
        {"step": step, "loss": 1 / step, "learning_rate": step / 7} for step in (1, 2, 3)
    ]


def test_a_record_is_in_the_file_at_once(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in (1, 2):
            writer.write(step, loss=0.5)
            assert len(read_records(tmp_path)) == step


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_becomes_null(tmp_path, value):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, loss=value, gradient_norm=2)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (tmp_path / "metrics.jsonl").read_text()
    record = json.loads(text, parse_constant=refuse)
    assert record == {"step": 1, "loss": None, "gradient_norm": 2.0}


def test_a_resumed_run_leaves_the_same_file_as_a_run_that_was_never_killed(tmp_path):
    train(tmp_path / "whole", range(1, 11))
    train(tmp_path / "killed", range(1, 8))  # a checkpoint at 4, killed at 7
    train(tmp_path / "killed", range(5, 11), resume_step=4)
    whole, killed = (tmp_path / name / "metrics.jsonl" for name in ("whole", "killed"))
    assert killed.read_bytes() == whole.read_bytes()
    assert [path.name for path in (tmp_path / "killed").glob("metrics*")] == ["metrics.jsonl"]


def test_a_kill_at_any_byte_of_the_last_record(tmp_path):
    path = tmp_path / "metrics.jsonl"
    train(tmp_path, [10, 20, 30])
    whole = path.read_bytes()
    last = whole[:-1].rindex(b"\n") + 1
    for end in range(last, len(whole) + 1):
        for resume_step in (20, 30):
            path.write_bytes(whole[:end])
            MetricsWriter(path.parent, resume_step).close()
            # A record that lacks only its newline is not lost
            complete = end >= len(whole) - 1 and resume_step == 30
            assert path.read_bytes() == (whole if complete else whole[:last])


@pytest.mark.parametrize("junk", [b"\0\0\0\0", b"\xff\xfe", b'{"step": 2, "lo', b"3", b"null"])
def test_junk_without_a_newline_at_the_end_is_dropped(tmp_path, junk):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + junk)
    train(tmp_path, [2], resume_step=1)
    assert [record["step"] for record in read_records(tmp_path)] == [1, 2]


@pytest.mark.parametrize(
    "junk", [b"\0\0\0\0", b"\xff\xfe", b'{"step": 2, "lo', b"", b"3", b"[]", b'{"step": null}']
)
def test_a_bad_line_in_the_middle_is_named_and_nothing_is_changed(tmp_path, junk):
    path = tmp_path / "metrics.jsonl"
    content = b'{"step": 1}\n' + junk + b'\n{"step": 3}\n'
    path.write_bytes(content)
    with pytest.raises(
        DamagedRecordError, match=r"metrics\.jsonl, line 2: not a record with a step"
    ):
        MetricsWriter(tmp_path, resume_step=1)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_a_fresh_start_drops_the_records_of_an_earlier_start(tmp_path):
    train(tmp_path, [1, 2])
    train(tmp_path, [1])
    assert [record["step"] for record in read_records(tmp_path)] == [1]


def test_a_kill_while_old_records_are_dropped_keeps_the_old_file(tmp_path, monkeypatch):
    train(tmp_path, [1, 2, 3])
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        MetricsWriter(tmp_path, resume_step=1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    monkeypatch.undo()
    train(tmp_path, [2], resume_step=1)  # the temporary file that was left does not matter
    assert [record["step"] for record in read_records(tmp_path)] == [1, 2]


def test_a_file_that_needs_no_change_is_not_rewritten(tmp_path, monkeypatch):
    train(tmp_path, [1, 2])
    monkeypatch.setattr(files.os, "replace", None)
    train(tmp_path, [3], resume_step=2)
    assert [record["step"] for record in read_records(tmp_path)] == [1, 2, 3]


# TensorBoard -----------------------------------------------------------------------------------


def test_scalars_read_back_from_the_event_file(tmp_path):
    train(tmp_path, [1, 2, 3])
    shown = read_tensorboard(tmp_path)
    assert len(shown) == 6
    for step in (1, 2, 3):
        assert shown["loss", step].simple_value == np.float32(1 / step)
        assert shown["learning_rate", step].simple_value == np.float32(step / 7)


def test_tensorboard_forgets_what_a_killed_run_wrote_after_its_checkpoint(tmp_path):
    train(tmp_path, range(1, 8))
    # In the same second: event files are named after the second
    with MetricsWriter(tmp_path, resume_step=4) as writer:
        writer.write(6, loss=100.0)
    shown = read_tensorboard(tmp_path)
    losses = {step: v.simple_value for (name, step), v in shown.items() if name == "loss"}
    assert losses == {step: np.float32(1 / step) for step in (1, 2, 3, 4)} | {6: 100.0}


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_reads_back_from_the_event_file(tmp_path, channels):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, channels), dtype=np.uint8)
    with MetricsWriter(tmp_path) as writer:
        writer.write_image(3, "samples", image)
    encoded = read_tensorboard(tmp_path)["samples", 3].image.encoded_image_string
    with Image.open(io.BytesIO(encoded)) as read:
        np.testing.assert_array_equal(
            np.asarray(read.convert("RGB")), image.repeat(3 // channels, 2)
        )


# progress --------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_without_a_terminal_each_report_is_a_line(monkeypatch, caplog):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with caplog.at_level(logging.INFO, logger="diffusion_jax"), Progress(2000) as progress:
        for step in range(1, 201):
            progress.advance(step)
        progress.report(200, 0.0523, 1234.0)
    assert caplog.messages == ["step 200/2000 loss 0.0523 1234 images/s"]
    assert "it/s" not in stream.getvalue()
    assert "%|" not in stream.getvalue()


def test_in_a_terminal_progress_is_a_bar_with_loss_and_speed(monkeypatch, caplog):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with caplog.at_level(logging.INFO, logger="diffusion_jax"), Progress(20, 10) as progress:
        for step in range(11, 16):
            progress.advance(step)
        progress.report(15, 0.0523, 1234.0)
    last = stream.getvalue().rstrip("\n").split("\r")[-1]
    assert "15/20" in last
    assert "loss 0.0523, 1234 images/s" in last
    assert not caplog.messages


def test_metrics_does_not_import_jax():
    # jaxtyping is imported for annotations only
    code = "import sys; from diffusion_jax.training import metrics; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
