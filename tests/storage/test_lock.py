"""A lock is held by one process at a time, and by no dead one, on one host and across hosts."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from imagereward_jax.storage import lock as module
from imagereward_jax.storage.folders import new_folder
from imagereward_jax.storage.lock import Lock, LockedError

HOLD = """
import sys, time
from imagereward_jax.storage.lock import Lock
lock = Lock(sys.argv[1], "the folder")
lock.acquire()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / ".lock"


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(module, "BEAT", 0.05)
    monkeypatch.setattr(module, "PATIENCE", 0.5)


def elsewhere(path, beat=3):
    """A lock file as a process of another host has it."""
    path.write_text(
        json.dumps({"host": "node7", "boot": "other", "process": 42, "id": "x", "beat": beat, "since": "t"})
    )


def test_another_process_is_named_and_a_killed_one_holds_nothing(path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(LockedError, match=rf"the folder: process {holder.pid} on .* is at work there: wait for it"):
            Lock(path, "the folder").acquire()
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert path.exists()
    begin = time.monotonic()
    with Lock(path, "the folder") as lock:
        assert lock.held
    assert time.monotonic() - begin < 1 and not path.exists()


def test_a_file_of_another_host_is_watched_and_a_silent_one_taken(path, quick):
    elsewhere(path)
    begin = time.monotonic()
    with Lock(path, "x"):
        assert time.monotonic() - begin >= 0.5
        assert json.loads(path.read_text())["process"] == os.getpid()


def test_a_beating_host_is_named(path, quick, monkeypatch):
    elsewhere(path)
    sleep = time.sleep

    def beat(seconds):
        sleep(seconds)
        elsewhere(path, beat=4)

    monkeypatch.setattr(module.time, "sleep", beat)
    with pytest.raises(LockedError, match="process 42 on node7"):
        Lock(path, "x").acquire()
    assert path.exists()


def test_a_file_system_without_the_kernels_locks_has_the_beat_alone(path, quick, monkeypatch):
    def unsupported(*_):
        raise OSError(module.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(module.fcntl, "flock", unsupported)
    with Lock(path, "x"), pytest.raises(LockedError, match=f"process {os.getpid()}"):
        Lock(path, "x").acquire()


def test_who_was_suspended_hears_that_another_took_over(path, quick):
    with Lock(path, "x") as lock:
        lock.check()
        elsewhere(path)
        with pytest.raises(LockedError, match="node7"):
            lock.check()
    assert path.exists()


def test_of_two_that_write_one_folder_one_is_told(tmp_path):
    """It appears whole; a partial folder that a kill left is swept by the next."""
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial/half").touch()
    with new_folder(tmp_path / "out", marker="m") as folder:
        (folder / "m").touch()
        with pytest.raises(LockedError, match="out: process"), new_folder(tmp_path / "out", marker="m"):
            pass
        assert os.listdir(folder) == ["m"]
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["m"]


def test_a_folder_whose_replacement_was_killed_comes_back(tmp_path):
    """Between the two renames the old one has another name."""
    (tmp_path / ".out.old").mkdir()
    (tmp_path / ".out.old/m").touch()
    with pytest.raises(RuntimeError), new_folder(tmp_path / "out", overwrite=True, marker="m"):
        raise RuntimeError
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["m"]
