"""What the metric writers leave on disk, after a kill too, and what they import."""

import importlib
import io
import json
import struct
import subprocess
import sys
import time
import types

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("tensorboard")

from imagereward_jax.training.interruptions import RunError
from imagereward_jax.training.metric_writers import (
    WANDB_RUN,
    JsonlWriter,
    Meter,
    check_installed,
    make_writers,
    read_rows,
)

PROGRAM = """
import sys
import numpy as np
from imagereward_jax.training.metric_writers import make_writers

workdir, last_step, steps = sys.argv[1], eval(sys.argv[2]), eval(sys.argv[3])
writers = make_writers(("jsonl", "log", "tensorboard"), workdir, last_step=last_step)
for step in steps:
    for writer in writers.values():
        writer.write(step, {"loss": 0.25 * step, "nothing": np.float32("nan")})
    writers["log"].write(step, {"eval/reward_mean": 0.5})  # the run itself says evaluations
image = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
for writer in writers.values():
    writer.write_images(steps[-1], "samples", image)
    writer.close()
heavy = {"tensorflow", "torch", "datasets", "tensorflow_datasets"} & set(sys.modules)
assert not heavy, heavy
"""


def run(workdir, last_step, steps):
    command = [sys.executable, "-c", PROGRAM, str(workdir), repr(last_step), repr(steps)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture
def events(monkeypatch):
    """Reads a workdir as TensorBoard does, without TensorFlow."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setitem(sys.modules, "tensorboard.compat.notf", types.ModuleType("notf"))
    return lambda workdir: EventAccumulator(str(workdir)).Reload()


def test_writers_import_no_tensorflow_and_tensorboard_reads_what_they_write(tmp_path, events):
    """Scalars and an image, to the bit; then the rows past a checkpoint are dropped when a run continues from it."""
    said = run(tmp_path, None, [0, 1, 2, 3])
    assert said.splitlines()[-1] == "step 3: loss 0.75, nothing nan" and len(said.splitlines()) == 4
    board = events(tmp_path)
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [(0, 0), (1, 0.25), (2, 0.5), (3, 0.75)]
    (image,) = board.Images("samples")
    pixels = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))
    np.testing.assert_array_equal(pixels, np.arange(72, dtype=np.uint8).reshape(4, 6, 3))
    assert (image.step, image.width, image.height) == (3, 6, 4)

    run(tmp_path, 1, [2, 4])
    assert [event.step for event in events(tmp_path).Scalars("loss")] == [0, 1, 2, 4]
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 4] and all(row["nothing"] is None for row in rows)


def test_a_row_that_a_kill_cut_short_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "time": 0, "loss": 2.0}\n{"step": 2, "ti')
    assert [row["step"] for row in read_rows(path)] == [1]
    writer = JsonlWriter(path, last_step=1)
    writer.write(2, {"loss": 1.0})
    writer.close()
    assert [row["loss"] for row in read_rows(path)] == [2.0, 1.0]


def test_an_error_of_the_disk_comes_through(tmp_path):
    """As it was, from the thread that writes."""
    (writer,) = make_writers(("tensorboard",), tmp_path, last_step=None).values()
    writer._file.close()
    writer.write(1, {"loss": 1.0})
    with pytest.raises(ValueError, match="closed file"):
        writer.close()


def test_counters_are_logged_as_they_are_and_the_rest_as_means():
    """A step was skipped before this window and one in it: 2, not the mean of 1, 1, 2, 2."""
    meter = Meter()
    for loss, skipped in ((4.0, 1), (2.0, 1), (0.0, 2), (2.0, 2)):
        meter.add({"loss": loss, "skipped": skipped})
    assert meter.pop() == {"loss": 2.0, "skipped": 2}
    meter.add({"loss": 1.0, "skipped": 3})
    assert meter.pop() == {"loss": 1.0, "skipped": 3}


def test_the_state_of_a_meter_survives_json_and_that_of_earlier_versions_is_read():
    meter, resumed = Meter(), Meter()
    meter.add({"loss": 0.1, "skipped": 1})
    resumed.set_state(json.loads(json.dumps(meter.get_state())))
    earlier = Meter()
    earlier.set_state({"totals": {"loss": 0.1, "skipped": 1.0}, "count": 1})
    for one in (meter, resumed, earlier):
        one.add({"loss": 0.3, "skipped": 1})
    assert meter.pop() == resumed.pop() == earlier.pop() == {"loss": 0.2, "skipped": 1}


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    """W&B without a network, which keeps nothing in the user's home; and what it wrote, read from its files."""
    module = pytest.importorskip("wandb")
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    return module


def wandb_records(path):
    """The records of an offline run: LevelDB's log format after a head of 7 bytes."""
    messages = importlib.import_module("wandb.proto.wandb_internal_pb2")
    data, at, record = path.read_bytes(), 7, b""
    while at < len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        record, at = record + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield messages.Record.FromString(record)
            record = b""


def test_wandb_continues_its_run_offline(wandb, tmp_path):
    """Both parts have one id, every step's scalars, and the image to the bit."""
    workdir = tmp_path / "my_run"
    workdir.mkdir()
    (workdir / "config.json").write_text('{"steps": 4}')
    image = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    for steps, last in (((0, 1), None), ((2,), 1)):
        (writer,) = make_writers(("wandb",), workdir, last_step=last).values()
        for step in steps:
            writer.write_images(step, "samples", image)
            writer.write(step, {"loss": 0.25 * step})
        writer.close()
        time.sleep(1.1)  # W&B names the parts by the second that they began in
    number = json.loads((workdir / WANDB_RUN).read_text())["id"]
    files = sorted((workdir / "wandb").glob(f"offline-run-*-{number}/run-{number}.wandb"))
    records = [record for path in files for record in wandb_records(path)]
    runs = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert [(run.run_id, run.display_name) for run in runs] == [(number, "my_run")] * 2
    rows = [record.history.item for record in records if record.WhichOneof("record_type") == "history"]
    rows = [{".".join([*item.nested_key]) or item.key: json.loads(item.value_json) for item in row} for row in rows]
    assert [(row["_step"], row["loss"]) for row in rows] == [(0, 0.0), (1, 0.25), (2, 0.5)]
    (path,) = files[-1].parent.glob(f"files/{rows[-1]['samples.path']}")
    np.testing.assert_array_equal(np.asarray(Image.open(path)), image)


def test_wandb_that_does_not_start_says_what_to_do(wandb, tmp_path, monkeypatch):
    def refuse(**_):
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", refuse)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        RunError, match=r"config\.writers: W&B did not start \(No API key configured\.\): run `wandb login`"
    ):
        make_writers(("wandb",), tmp_path, last_step=None)


def test_an_absent_wandb_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"config.writers: 'wandb' needs wandb: pip install 'imagereward-jax\[wandb\]'"
    ):
        check_installed(("jsonl", "wandb"))
    check_installed(("jsonl",))
