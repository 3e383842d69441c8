"""A disk that is full at any moment of a run or a scoring: exit status 1, file and way out named, and the end equal."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("grain")

import full_disk

from imagereward_jax.command import explain
from imagereward_jax.storage.files import save_image, write_text


@pytest.fixture(autouse=True)
def disks(tmp_path):
    if os.geteuid() or not full_disk.mount(tmp_path, 64):
        pytest.skip("no small disk can be mounted here")
    full_disk.unmount(tmp_path)


def check(tried):
    assert not [one for one in tried if not one.as_promised]
    assert tried[0].status == 1 and tried[-1].status == 0


@pytest.mark.parametrize("name", full_disk.WORK)
def test_a_disk_that_is_full_at_a_few_sizes(name, tmp_path):
    check(full_disk.try_all(tmp_path, name, every=15))


@pytest.mark.slow
@pytest.mark.parametrize("name", full_disk.WORK)
def test_a_disk_that_is_full_at_thirty_sizes(name, tmp_path):
    tried = full_disk.try_all(tmp_path, name)
    check(tried)
    assert len(tried) == 30 and sum(one.status for one in tried) >= 10


def save_sheet(path: Path):
    save_image(path, Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)))


@pytest.mark.parametrize("write", [lambda path: write_text(path, "x" * 100_000), save_sheet])
def test_a_file_that_does_not_fit_leaves_the_old_one(write, tmp_path):
    full_disk.mount(tmp_path, 16)
    try:
        (tmp_path / "file").write_text("old")
        message = r"file: could not be written \(No space left on device\); free some room"
        with pytest.raises(ValueError, match=message) as error:
            write(tmp_path / "file")
        assert explain(error.value)[0] == 1
        assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "old"
    finally:
        full_disk.unmount(tmp_path)
