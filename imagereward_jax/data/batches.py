"""Batches from a random-access source: shuffled, repeated, split over processes, and resumable exactly.

The order is a grain pipeline of global positions 0, 1, 2, ...; each process takes every `process_count`-th of
them. The number of positions used is the whole state. It is valid for any number of workers, and for another number
of processes or another batch size.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from imagereward_jax.data.errors import DataError

THREADS = 2
BUFFERED_BATCHES = 4


def make_iterator(
    source: Any,
    *,
    batch_size: int,
    seed: int,
    shuffle: bool = True,
    num_workers: int = 0,
    item_transform: Callable[[dict, np.random.Generator], dict] | None = None,
    transform: Callable[[dict], dict] | None = None,
    process_index: int = 0,
    process_count: int = 1,
    drop_remainder: bool = True,
    num_epochs: int | None = None,
    growing: bool = False,
) -> "BatchIterator":
    """Makes an iterator of batches over a source.

    Args:
        source: has len() and [i], which gives a dict of arrays, numbers and strings, or a string (a prompt, which
            becomes {"prompt": string}). A source with a method `fetch(i, rng)` is read by it instead: that is
            the generator for random crops comes from.
        batch_size: examples per batch in this process. May be larger than the source, which is repeated.
        seed: 0 to 2**32 - 1; fixes the order and all randomness.
        shuffle: draws a new order for each epoch. Every example comes once per epoch.
        num_workers: worker processes; 0 reads ahead in threads. The batches are the same.
        item_transform: called as (item, rng) -> item before batching; rng depends on the global position.
        transform: called as (batch) -> batch where the batch is made; tokenises prompts, for example.
        process_index, process_count: this process's share. The examples of a global batch, and their order, do
            not depend on `process_count` while batch_size * process_count stays the same.
        drop_remainder: with `num_epochs`, leave out what does not fill a (global) batch at the very end.
        num_epochs: epochs before StopIteration; None repeats for ever.
        growing: whether a later run may find more examples at the end of the source, which is then not shuffled.

    Raises:
        ValueError: an argument is out of range, or (DataError) the source is empty or too small for one batch.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index must be in 0..{process_count - 1}; got {process_index}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in 0..2**32 - 1; got {seed}")
    if num_workers < 0:
        raise ValueError(f"num_workers must not be negative; got {num_workers}")
    if num_epochs is not None and num_epochs < 1:
        raise ValueError(f"num_epochs must be at least 1, or None; got {num_epochs}")
    if process_count > 1 and not drop_remainder:
        raise ValueError("drop_remainder must be true with several processes: all need the same number of batches")
    if len(source) == 0:
        raise DataError("the data source is empty: there is nothing to make batches of")
    shuffle = bool(shuffle) and not growing
    order = _positions(source, seed, shuffle, num_epochs, item_transform)
    if num_epochs is not None and drop_remainder and len(order) < batch_size * process_count:
        raise DataError(
            f"{num_epochs} epoch(s) of {len(source)} examples do not fill one batch of {batch_size * process_count}; "
            "use a smaller batch, more epochs, or num_epochs=None"
        )
    return BatchIterator(
        order,
        fingerprint={"source_length": None if growing else len(source), "seed": int(seed), "shuffle": shuffle},
        batch_size=batch_size,
        process_index=process_index,
        process_count=process_count,
        drop_remainder=drop_remainder,
        num_workers=num_workers,
        transform=transform,
    )


class BatchIterator:
    """Iterates over batches, endlessly or not: dicts of stacked numpy arrays, and lists of str.

    Made by `make_iterator`. `get_state` may be called between any two batches; batches read ahead are not counted.
    """

    def __init__(
        self,
        order,
        *,
        fingerprint,
        batch_size,
        process_index,
        process_count,
        drop_remainder,
        num_workers,
        transform,
    ):
        self._order = order
        self._fingerprint = fingerprint
        self._batch_size = batch_size
        self._process_index, self._process_count = process_index, process_count
        self._drop_remainder = drop_remainder
        self._num_workers = num_workers
        self._make_batch = _MakeBatch(transform)
        self._examples = 0
        self._batches = None

    def __iter__(self):
        return self

    def __next__(self) -> dict[str, Any]:
        if self._batches is None:
            self._batches = iter(self._dataset())
        batch = next(self._batches)
        self._examples += self._batch_size * self._process_count
        return batch

    def get_state(self) -> dict[str, Any]:
        """Returns the position, for `set_state` and for JSON: the examples that all processes took, and of what."""
        return {"examples": self._examples, **self._fingerprint}

    def set_state(self, state: dict[str, Any]) -> None:
        """Resumes from `get_state`: the next batches are the same bit for bit.

        Raises:
            DataError: the state belongs to a source of another length, or to another seed or order.
        """
        for key, value in self._fingerprint.items():
            if state.get(key) != value:
                raise DataError(
                    f"cannot continue the data: the saved state has {key} {state.get(key)!r}, but now it is {value!r}; "
                    "use the same data and settings, or start a new run"
                )
        self.close()
        self._examples = int(state["examples"])

    def close(self) -> None:
        """Stops reading ahead (threads, worker processes). Iterating again resumes at the same position."""
        if self._batches is not None and hasattr(self._batches, "close"):
            self._batches.close()
        self._batches = None

    def _dataset(self):
        import grain

        examples = self._order
        if self._drop_remainder:
            global_batch = self._batch_size * self._process_count
            left = len(examples) - self._examples
            examples = examples.slice(slice(0, self._examples + left // global_batch * global_batch))
        examples = examples.slice(slice(self._examples + self._process_index, None, self._process_count))
        batches = examples.batch(self._batch_size, drop_remainder=self._drop_remainder, batch_fn=self._make_batch)
        batches = batches.to_iter_dataset(
            grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=BUFFERED_BATCHES), allow_nones=True
        )
        if self._num_workers:
            _allow_absl_flags()
            options = grain.MultiprocessingOptions(num_workers=self._num_workers, per_worker_buffer_size=2)
            batches = batches.mp_prefetch(options, worker_init_fn=_start_worker)
        return batches


def _allow_absl_flags():
    """Grain's workers read absl flags, which programs that don't use `absl.app` never parse: take the defaults."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def _start_worker(*_):
    """A terminal sends Ctrl-C to worker processes too; whether they end is the run's to decide. If the run is killed,
    they would wait for it for good."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_run, daemon=True).start()


def _end_with_the_run():
    if (run := multiprocessing.parent_process()) is not None:
        run.join()
        os._exit(1)


def _positions(source, seed, shuffle, num_epochs, item_transform):
    """Makes the grain dataset that maps a global position to its example."""
    import grain

    positions = grain.MapDataset.range(len(source)).seed(int(seed))
    if shuffle:
        positions = positions.shuffle()
    return positions.repeat(num_epochs).random_map(_Fetch(source, item_transform))


class _Fetch:
    """Reads an example as a dict. A class, so that it can be sent to worker processes."""

    def __init__(self, source, item_transform):
        self.source, self.item_transform = source, item_transform

    def __call__(self, index, rng):
        index = int(index)
        item = self.source.fetch(index, rng) if hasattr(self.source, "fetch") else self.source[index]
        item = {"prompt": item} if isinstance(item, str) else item
        return item if self.item_transform is None else self.item_transform(item, rng)


class _MakeBatch:
    """Stacks the examples of a batch key by key: strings into a list, all else into an array."""

    def __init__(self, transform):
        self.transform = transform

    def __call__(self, items):
        batch = {key: _stack(key, [item[key] for item in items]) for key in items[0]}
        return batch if self.transform is None else self.transform(batch)


def _stack(key, values):
    if isinstance(values[0], str | dict):
        return values
    shapes = {np.shape(value) for value in values}
    if len(shapes) > 1:
        raise DataError(f"{key!r} has different shapes in one batch: {sorted(shapes)}; bring all to one size first")
    return np.stack([np.asarray(value) for value in values])
