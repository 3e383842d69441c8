"""What the metric writers leave on disk, after a kill too, and what they import."""

import io
import json
import subprocess
import sys
import types

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("tensorboard")

from imagereward_jax.training.metric_writers import JsonlWriter, Meter, make_writers, read_rows

PROGRAM = """
import sys
import numpy as np
from imagereward_jax.training.metric_writers import make_writers

workdir, last_step, steps = sys.argv[1], eval(sys.argv[2]), eval(sys.argv[3])
writers = make_writers(("jsonl", "log", "tensorboard"), workdir, last_step=last_step)
for step in steps:
    for writer in writers.values():
        writer.write(step, {"loss": 0.25 * step, "nothing": np.float32("nan")})
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
    assert "[3] loss=0.75, nothing=nan" in said and "[3] samples: image [4, 6, 3]" in said
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
