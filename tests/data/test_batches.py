"""The pipeline: exact resume everywhere, shares of processes, order, and what it refuses."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import child
import numpy as np
import pytest

pytest.importorskip("grain")

from imagereward_jax.data.batches import make_iterator
from imagereward_jax.data.errors import DataError
from imagereward_jax.data.shapes import ShapesPairs


class Numbers:
    """Items that show their index, and the generator they were given."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def fetch(self, index, rng):
        return {"index": index, "noise": rng.random(2), "prompt": f"number {index}"}


class Broken:
    def __len__(self):
        return 3

    def __getitem__(self, index):
        raise DataError("file.json, row 3: bad")


def iterator(length=10, **options):
    return make_iterator(Numbers(length), **{"batch_size": 4, "seed": 3, **options})


def take(batches, count):
    return [next(batches) for _ in range(count)]


def same(a, b):
    """Bit for bit."""
    return a.keys() == b.keys() and all(
        a[k] == b[k] if isinstance(a[k], list) else a[k].tobytes() == b[k].tobytes() for k in a
    )


def test_closing_stops_reading_ahead_and_loses_nothing():
    expected, batches = take(iterator(), 4), iterator()
    take(batches, 2)
    batches.close()
    batches.close()
    assert all(same(next(batches), batch) for batch in expected[2:])


def test_batches_hold_arrays_and_lists_of_strings():
    batch = next(iterator())
    assert batch["index"].shape == (4,) and batch["noise"].shape == (4, 2)
    assert batch["prompt"] == [f"number {i}" for i in batch["index"]]
    batch = next(make_iterator(ShapesPairs(5), batch_size=3, seed=0))
    assert batch["image"].shape == (3, 64, 64, 3) and len(batch["prompt"]) == 3
    assert next(make_iterator(["a", "b"], batch_size=2, seed=0, shuffle=False)) == {"prompt": ["a", "b"]}


def test_every_epoch_holds_everything_once_in_a_new_order():
    batches = take(iterator(batch_size=5), 8)
    epochs = [np.concatenate([batches[i]["index"], batches[i + 1]["index"]]).tolist() for i in range(0, 8, 2)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert len({noise.tobytes() for batch in batches for noise in batch["noise"]}) == 40
    plain = take(iterator(batch_size=5, shuffle=False), 4)
    assert [batch["index"].tolist() for batch in plain] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]] * 2


def test_a_batch_may_be_larger_than_the_source():
    batch = next(iterator(length=3, batch_size=12))
    assert np.bincount(batch["index"]).tolist() == [4, 4, 4]


def test_seed_decides():
    assert same(next(iterator()), next(iterator()))
    assert not same(next(iterator()), next(iterator(seed=4)))


def test_resume_is_exact_at_every_position_across_epochs():
    """10 items in batches of 4: epochs end inside batches."""
    one = iterator()
    states, batches = [one.get_state()], []
    for _ in range(9):
        batches.append(next(one))
        states.append(one.get_state())
    for position, state in enumerate(states):
        other = iterator()
        take(other, 2)
        other.set_state(json.loads(json.dumps(state)))
        assert other.get_state() == state
        assert all(same(next(other), batch) for batch in batches[position:])


def test_worker_processes_give_the_same_batches_and_resume():
    """Ctrl-C, which a terminal sends to them too, does not end them: the run saves first."""
    expected = take(iterator(), 8)
    workers = iterator(num_workers=2)
    assert all(same(next(workers), batch) for batch in expected[:2])
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGINT)
    assert all(same(next(workers), batch) for batch in expected[2:5])
    workers.set_state({**workers.get_state(), "examples": 12})
    assert all(same(next(workers), batch) for batch in expected[3:5])
    workers.close()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_errors_of_the_source_come_through(num_workers):
    with pytest.raises(DataError, match="row 3: bad"):
        next(make_iterator(Broken(), batch_size=2, seed=0, num_workers=num_workers))


def test_processes_share_each_batch_without_overlap():
    """The global batch is that of one process alone, items and generators alike, in interleaved order."""
    alone = take(iterator(batch_size=4), 6)
    shares = [take(iterator(batch_size=2, process_index=i, process_count=2), 6) for i in range(2)]
    for whole, first, second in zip(alone, *shares):
        for key in ("index", "noise"):
            assert np.array_equal(np.stack([first[key], second[key]], 1).reshape(whole[key].shape), whole[key])
    epoch = np.concatenate([batch["index"] for share in shares for batch in share[:5]])
    assert np.bincount(epoch).tolist() == [2] * 10


def test_resume_with_another_number_of_processes():
    alone = iterator(batch_size=4)
    take(alone, 3)
    state, expected = alone.get_state(), next(alone)
    shares = [iterator(batch_size=1, process_index=i, process_count=4) for i in range(4)]
    for share in shares:
        share.set_state(state)
    assert np.concatenate([next(share)["index"] for share in shares]).tolist() == expected["index"].tolist()


def test_finite_epochs_end_alike_on_all_processes():
    assert [len(b["index"]) for b in iterator(num_epochs=1, drop_remainder=False)] == [4, 4, 2]
    assert [len(b["index"]) for b in iterator(num_epochs=1)] == [4, 4]
    assert [len(b["index"]) for b in iterator(num_epochs=2)] == [4] * 5
    counts = [len(list(iterator(batch_size=3, num_epochs=1, process_index=i, process_count=2))) for i in range(2)]
    assert counts == [1, 1]
    ended = iterator(num_epochs=1)
    state = [ended.get_state() for _ in ended][-1]
    ended.set_state(state)
    with pytest.raises(StopIteration):
        next(ended)


def test_transforms():
    def shift(item, rng):
        return {"x": item["index"] + rng.random()}

    def double(batch):
        return {"x": 2 * batch["x"]}

    batch = next(iterator(item_transform=shift, transform=double))
    assert batch.keys() == {"x"} and np.array_equal(np.sort(batch["x"] // 2), np.sort(next(iterator())["index"]))
    assert same(batch, next(iterator(item_transform=shift, transform=double)))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"process_index": 2, "process_count": 2}, r"process_index must be in 0..1"),
        ({"seed": -1}, "seed must be in"),
        ({"num_workers": -1}, "num_workers must not be negative"),
        ({"process_count": 2, "drop_remainder": False}, "drop_remainder must be true"),
        ({"num_epochs": 0}, "num_epochs must be at least 1"),
        ({"num_epochs": 1, "batch_size": 11}, r"1 epoch\(s\) of 10 examples do not fill one batch of 11"),
        ({"length": 0}, "the data source is empty"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        iterator(**options)


def test_a_state_of_other_data_is_refused():
    state = iterator().get_state()
    with pytest.raises(DataError, match="the saved state has source_length 10, but now it is 11"):
        iterator(length=11).set_state(state)
    with pytest.raises(DataError, match="the saved state has seed 3, but now it is 5"):
        iterator(seed=5).set_state(state)


def test_items_of_different_sizes_are_told():
    source = [{"image": np.zeros((4, 4, 3))}, {"image": np.zeros((4, 5, 3))}]
    with pytest.raises(DataError, match=r"'image' has different shapes in one batch: \[\(4, 4, 3\), \(4, 5, 3\)\]"):
        next(make_iterator(source, batch_size=2, seed=0))


def test_a_growing_source_is_read_in_order_and_continued_when_it_has_grown():
    """Not shuffled, nothing twice; the position of a source of 8 continues in one of 16."""
    short, long = (iterator(length, growing=True) for length in (8, 16))
    taken = take(short, 2)
    long.set_state(json.loads(json.dumps(short.get_state())))
    taken += take(long, 2)
    np.testing.assert_array_equal(np.concatenate([batch["index"] for batch in taken]), np.arange(16))
    with pytest.raises(DataError, match="source_length 8, but now it is 16"):
        iterator(16).set_state({**iterator(8).get_state()})


KILLED = """
import multiprocessing, os, signal
from imagereward_jax.data.batches import make_iterator

if __name__ == "__main__":
    batches = make_iterator(list("abcdefgh"), batch_size=2, seed=0, num_workers=2)
    next(batches)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_a_run_that_is_killed(tmp_path):
    """Else each kill would leave as many processes that wait for good, and hold the pipes of whoever started them."""
    (tmp_path / "killed.py").write_text(KILLED)
    done = subprocess.run(
        [sys.executable, tmp_path / "killed.py"], env=child.environment(), capture_output=True, text=True, timeout=100
    )
    workers = [int(word) for word in done.stdout.split()]
    assert done.returncode == -signal.SIGKILL and len(workers) == 2, done.stderr

    def alive(pid):
        try:
            return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return False

    deadline = time.monotonic() + 30
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, workers))
