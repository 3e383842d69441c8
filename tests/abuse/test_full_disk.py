"""A disk that is full at any moment of a run: exit status 1, file and way out named, and the run ends equal later."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("grain")

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from toy import assemble_toy, toy_config, train

from imagereward_jax.command import explain
from imagereward_jax.storage.files import save_image, write_text
from imagereward_jax.training.metric_writers import read_rows

TIMES = ("time", "images_per_second")
SIZES = [4 * round(4 + 2.2 * step**1.6) for step in range(30)]  # KiB: from 16 to what the run needs, and beyond


def numbers(workdir):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_rows(workdir / "metrics.jsonl")]


def mount(place, size, *more):
    options = ",".join([f"size={size}k", *more])
    return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True).returncode == 0


@pytest.fixture
def small(tmp_path):
    if os.geteuid() or not mount(tmp_path, 64):
        pytest.skip("no small disk can be mounted here")
    subprocess.run(["umount", tmp_path], check=True)
    yield tmp_path
    while subprocess.run(["umount", "-l", tmp_path], capture_output=True).returncode == 0:
        pass


def attempt(workdir):
    """(exit status, what a command would say) of a run."""
    try:
        train(toy_config(steps=12), assemble_toy, workdir)
    except Exception as error:
        return explain(error)
    return 0, ""


@pytest.mark.slow
def test_a_disk_that_is_full_at_thirty_sizes(small, tmp_path_factory, capfd):
    clean = tmp_path_factory.mktemp("clean") / "run"
    assert attempt(clean) == (0, "")
    statuses = []
    for size in SIZES:
        assert mount(small, size)
        capfd.readouterr()
        status, said = attempt(small / "run")
        printed = capfd.readouterr()
        statuses.append(status)
        assert status in (0, 1), (size, said)
        assert "Traceback" not in printed.out + printed.err, (size, printed.err[-3000:])
        if status:
            assert str(small / "run") in said and "free some room and run the same command again" in said, (size, said)
            assert mount(small, 100_000, "remount")
            assert attempt(small / "run") == (0, ""), size
        assert numbers(small / "run") == numbers(clean), size
        ours, theirs = (np.load(one / "export/w.npy") for one in (small / "run", clean))
        np.testing.assert_array_equal(ours, theirs)
        subprocess.run(["umount", "-l", small], check=True)
    assert statuses[0] == 1 and statuses[-1] == 0 and sum(statuses) >= 10, statuses


def save_sheet(path):
    save_image(path, Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)))


@pytest.mark.parametrize("write", [lambda path: write_text(path, "x" * 100_000), save_sheet])
def test_a_file_that_does_not_fit_leaves_the_old_one(write, small):
    assert mount(small, 16)
    (small / "file").write_text("old")
    message = r"file: could not be written \(No space left on device\); free some room"
    with pytest.raises(ValueError, match=message) as error:
        write(small / "file")
    assert explain(error.value)[0] == 1
    assert os.listdir(small) == ["file"] and (small / "file").read_text() == "old"
