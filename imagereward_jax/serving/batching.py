"""Batches across clients: a queue of items, taken in order and scored together."""

import collections
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from imagereward_jax.bulk_scoring.stream import default_workers
from imagereward_jax.serving.protocol import Item, Result
from imagereward_jax.serving.scoring import ItemScorer


class QueueFull(Exception):
    """There is no room for so many items now."""


class Batcher:
    """Scores items in batches of at most the scorer's batch size, first come, first served.

    Two threads take turns: while one scores a batch, the other waits until the next is full, and reads its images. The
    scorer is never called twice at a time.

    Args:
        max_queue: items that may wait.
        max_wait: seconds that an idle scorer waits for more items than it has.
    """

    def __init__(self, scorer: ItemScorer, *, max_queue: int, max_wait: float = 0.002) -> None:
        self.scorer, self.max_queue, self.max_wait = scorer, max_queue, max_wait
        self.served = self.failed = 0
        self._waiting: collections.deque[tuple[Item, Future]] = collections.deque()
        self._changed = threading.Condition()
        self._turn = threading.Lock()
        self._in_hand, self._closed = 0, False  # batches that are being scored
        self._readers = ThreadPoolExecutor(default_workers(), thread_name_prefix="read")
        self._threads = [threading.Thread(target=self._work, name=f"score-{i}", daemon=True) for i in range(2)]
        for thread in self._threads:
            thread.start()

    @property
    def queued(self) -> int:
        """Items that wait."""
        return len(self._waiting)

    def submit(self, items: Sequence[Item]) -> list[Future[Result]]:
        """Queues the items of a request, next to each other; a future that is cancelled in time costs nothing.

        Raises:
            QueueFull: with them more than `max_queue` would wait.
        """
        futures = [Future() for _ in items]
        with self._changed:
            if len(self._waiting) + len(items) > self.max_queue:
                raise QueueFull
            self._waiting.extend(zip(items, futures))
            self._changed.notify_all()
        return futures

    def close(self) -> None:
        """Scores what waits, then ends the threads. Nothing may be submitted any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._readers.shutdown()

    def _work(self):
        while batch := self._take():
            items, futures = zip(*batch)
            try:
                prepared = list(self._readers.map(self.scorer.prepare, items))
                with self._turn:
                    results = self.scorer.score(items, prepared)
            except Exception as error:  # a fault of this package: its clients are told, and the next batch is scored
                results = [Result({}, f"internal error: {type(error).__name__}: {error}")] * len(items)
            with self._changed:
                self._in_hand -= 1
                self.served += len(items)
                self.failed += sum(result.error is not None for result in results)
                self._changed.notify_all()
            for future, result in zip(futures, results):
                future.set_result(result)

    def _take(self):
        """The next batch; [] at the end."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return []
                self._wait_to_fill()
                batch = []
                while self._waiting and len(batch) < self.scorer.batch_size:
                    item, future = self._waiting.popleft()
                    if future.set_running_or_notify_cancel():
                        batch.append((item, future))
                if batch:  # else the other thread was quicker, or the clients are gone
                    self._in_hand += 1
                    return batch

    def _wait_to_fill(self):
        """Waits until a batch is full, or the scorer has been idle for `max_wait`."""
        deadline = time.monotonic() + self.max_wait
        while 0 < len(self._waiting) < self.scorer.batch_size and not self._closed:
            left = deadline - time.monotonic()
            if not self._in_hand and left <= 0:
                return
            self._changed.wait(None if self._in_hand else left)
