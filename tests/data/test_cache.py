"""The cache of computed rows: filled by several processes at once, and what it refuses."""

import json
import subprocess
import sys

import numpy as np
import pytest

from imagereward_jax.data import cache as cache_module
from imagereward_jax.data.cache import Cache, CacheError, open_cache
from imagereward_jax.storage.lock import LockedError

FILES = ["cache.json", "empty.safetensors", *(f"shard_0000{i}.safetensors" for i in range(4))]
# Two of these fill the same folders, with random pauses wherever the file system is asked.
PROGRAM = """
import random, sys, time
from pathlib import Path
import numpy as np
from imagereward_jax.data import cache

root, index, rounds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
cache.ROWS_PER_SHARD, pauses = 2, random.Random(index)

def paused(function):
    def call(*arguments, **options):
        time.sleep(pauses.choice((0, 0, 0.002, 0.01)))
        return function(*arguments, **options)
    return call

cache.write_safetensors = paused(cache.write_safetensors)
for name in ("is_file", "mkdir", "iterdir", "write_text"):
    setattr(cache.Path, name, paused(getattr(Path, name)))

def meet(name):
    (root / f"{name}.{index}").touch()
    while not all((root / f"{name}.{other}").exists() for other in (0, 1)):
        time.sleep(0.001)

for number in range(rounds):
    computed = []
    def encode_rows(rows):
        computed.extend(rows)
        return {"square": np.array([row**2 for row in rows])}
    meet(f"start{number}")
    opened = cache.open_cache(root / f"cache{number}", {"seed": 3}, 7)
    opened.fill(encode_rows, lambda: {"square": np.array(-1)}, process_index=index, process_count=2,
                wait=lambda: meet(f"filled{number}"))
    assert [int(opened[row]["square"]) for row in range(7)] == [row**2 for row in range(7)]
    assert computed == [[0, 1, 4, 5], [2, 3, 6]][index], computed
    meet(f"end{number}")
"""


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(cache_module, "ROWS_PER_SHARD", 2)


def squares(rows):
    return {"square": np.array([row**2 for row in rows])}


def empty():
    return {"square": np.array(-1)}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_two_processes_fill_one_cache(tmp_path):
    """Twelve times: neither refuses the other's folder, each computes its own shards once, and nothing is missing."""
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    started = [subprocess.Popen([*command, str(i), "12"], stderr=subprocess.PIPE, text=True) for i in range(2)]
    try:
        for process in started:
            _, errors = process.communicate(timeout=20)
            assert process.returncode == 0, errors
    finally:
        for process in started:
            process.kill()
    assert all(names(tmp_path / f"cache{number}") == FILES for number in range(12))


def test_only_missing_shards_are_computed_again(tmp_path):
    open_cache(tmp_path / "c", {"seed": 3}, 7).fill(squares, empty)
    (tmp_path / "c" / FILES[3]).unlink()
    computed = []
    again = open_cache(tmp_path / "c", {"seed": 3}, 7)
    again.fill(lambda rows: computed.append(rows) or squares(rows), None)
    assert computed == [range(2, 4)] and names(tmp_path / "c") == FILES
    assert int(again.empty()["square"]) == -1


def test_a_shard_that_no_process_wrote_is_named(tmp_path):
    """As if the other process wrote into a folder of its own."""
    cache = open_cache(tmp_path / "c", {}, 7)
    with pytest.raises(CacheError, match=r"shard_00001.safetensors, shard_00003.safetensors missing .* one folder"):
        cache.fill(squares, empty, process_index=0, process_count=2, wait=lambda: None)
    with pytest.raises(ValueError, match="wait"):
        cache.fill(squares, empty, process_index=0, process_count=2)


def test_what_a_killed_run_left_is_no_obstacle_and_is_removed(tmp_path):
    (tmp_path / ".cache.json.partial").write_text("{")
    (tmp_path / ".shard_00002.safetensors.77.partial").write_bytes(b"half")
    (tmp_path / ".tmpaE8BSA").write_bytes(b"half")  # as safetensors leaves it
    open_cache(tmp_path, {}, 7).fill(squares, empty)
    assert names(tmp_path) == FILES


def test_the_lock_of_a_run_that_was_killed_when_all_was_written_is_removed(tmp_path):
    open_cache(tmp_path, {}, 7).fill(squares, empty)
    (tmp_path / ".lock").touch()
    open_cache(tmp_path, {}, 7).fill(None, None)
    assert names(tmp_path) == FILES


def test_the_files_behind_a_complete_cache_are_looked_at_once(tmp_path):
    open_cache(tmp_path, {}, 7, lambda rows: "a").fill(squares, empty)
    looked_at = []
    open_cache(tmp_path, {}, 7, lambda rows: looked_at.append(rows) or "a").fill(None, None)
    assert [rows.start for rows in looked_at] == [0, 2, 4, 6]


def test_rows_whose_files_changed_are_computed_again(tmp_path):
    """Those of their shard alone; a cache that says nothing of its files stays as it is, a damaged shard does not."""
    computed, states = [], {0: "a", 2: "a", 4: "a", 6: "a"}

    def encode(rows):
        computed.extend(rows)
        return squares(rows)

    def fill():
        computed.clear()
        cache = open_cache(tmp_path, {}, 7, lambda rows: states[rows.start])
        cache.fill(encode, empty)
        assert [int(cache[row]["square"]) for row in range(7)] == [row**2 for row in range(7)]
        return list(computed)

    assert fill() == list(range(7)) and fill() == []
    states[2] = "b"
    assert fill() == [2, 3] and fill() == []
    (tmp_path / FILES[2]).write_bytes(b"\0" * 9)
    assert fill() == [0, 1]


def test_a_second_run_that_fills_a_cache_is_told_who_does(tmp_path):
    def encode(rows):
        if not told:
            with pytest.raises(LockedError, match=r"config.data.cache=.* process \d+ on .* is at work there") as error:
                open_cache(tmp_path, {}, 7).fill(squares, empty)
            told.append(error)
        return squares(rows)

    told = []
    open_cache(tmp_path, {}, 7).fill(encode, empty)
    assert told and names(tmp_path) == FILES
    open_cache(tmp_path, {}, 7).fill(None, None)  # a complete one needs no lock and computes nothing


def test_a_file_system_without_hard_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(cache_module.os, "link", refuse)
    open_cache(tmp_path, {"seed": 3}, 7)
    assert names(tmp_path) == ["cache.json"]
    assert json.loads((tmp_path / "cache.json").read_text())["made_by"] == {"seed": 3, "rows": 7}


def test_who_loses_the_race_compares(tmp_path, monkeypatch):
    """Another process with another seed writes cache.json in the moment before this one does."""
    link = cache_module.os.link

    def late(source, target):
        monkeypatch.setattr(cache_module.os, "link", link)
        open_cache(tmp_path, {"seed": 4}, 7)
        link(source, target)

    monkeypatch.setattr(cache_module.os, "link", late)
    with pytest.raises(CacheError, match="seed: 4 there, 3 now"):
        open_cache(tmp_path, {"seed": 3}, 7)
    assert names(tmp_path) == ["cache.json"]


def test_other_files_and_damaged_shards_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is no cache"):
        open_cache(tmp_path, {}, 7)
    with pytest.raises(FileExistsError, match="is a file"):
        open_cache(tmp_path / "notes.txt", {}, 7)
    assert names(tmp_path) == ["notes.txt"]
    open_cache(tmp_path / "c", {}, 7).fill(lambda rows: squares(rows[:1]), empty)
    with pytest.raises(CacheError, match=r"shard_00000\.safetensors: expected 2 rows"):
        Cache(tmp_path / "c", 7)[0]
