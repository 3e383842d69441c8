"""Scores images in chunks; threads read the next images while the devices compute."""

import collections
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from imagereward_jax.data.errors import ImageError
from imagereward_jax.data.groups import encoded

CHUNKS_AHEAD = 2  # chunks read ahead, so that one slow image does not stall the devices


class Scorer(Protocol):
    """Anything that scores images in bulk: a `Reward`, a `RuleReward` or the random baseline."""

    batch_size: int

    def prepare(self, image: Any, name: str = "") -> np.ndarray: ...

    def score_prepared(self, prompts: Sequence[str], pixels: Sequence[np.ndarray]) -> jax.Array | np.ndarray: ...

    def inference_rank(self, prompt: str, images: Any) -> tuple[list[int], list[float]]: ...


class Item(NamedTuple):
    """One image to score; `where` names its row in errors.

    `image` is a path, the bytes of a file, an array, or a `RowImage`.
    """

    prompt: str
    image: Any
    where: str


class Unusable(str):
    """Takes the place of a missing image; the text gives the reason."""


class Scored(NamedTuple):
    """Results of a chunk: `scores` [n] floats, None for a broken image; `errors` {index: reason}."""

    scores: list[float | None]
    errors: dict[int, str]


class ScoringError(RuntimeError):
    """The scorer returned NaN or Inf."""

    exit_status = 1


def default_workers() -> int:
    """Number of threads that read images: one per core, at most 16."""
    return min(16, os.cpu_count() or 1)


def score_chunks(
    scorer: Scorer, chunks: Iterable[list[Item]], *, workers: int | None = None, skip_errors: bool = False
) -> Iterator[Scored]:
    """Scores chunks of images in order.

    Args:
        scorer: a `Scorer`.
        chunks: iterable of lists of `Item`, each of at most the scorer's `batch_size`.
        workers: number of threads that read.
        skip_errors: gives a broken image None and an entry in `errors`, instead of raising.

    Yields:
        A `Scored` per chunk.

    Raises:
        ImageError: an image cannot be used (unless `skip_errors`); the message names row and file.
        ScoringError: a score is not a finite number.
    """
    workers = workers or default_workers()
    with ThreadPoolExecutor(workers, thread_name_prefix="read") as pool:
        reading, running = collections.deque(), collections.deque()
        try:
            for chunk in chunks:
                reading.append((chunk, [pool.submit(_prepare, scorer, item) for item in chunk]))
                if len(reading) > CHUNKS_AHEAD:
                    running.append(_start(scorer, *reading.popleft(), skip_errors))
                if len(running) > 1:  # computes one chunk while the scores of the previous one are fetched
                    yield _finish(*running.popleft())
            while reading or running:
                if reading:
                    running.append(_start(scorer, *reading.popleft(), skip_errors))
                if len(running) > 1 or not reading:
                    yield _finish(*running.popleft())
        except ImageError:
            while running:  # what was scored before the broken image counts
                yield _finish(*running.popleft())
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def score_items(
    scorer: Scorer, items: Sequence[Item], *, workers: int | None = None, progress: Callable[[int], Any] | None = None
) -> list[float]:
    """Scores a list of `Item`s, in order. `progress` is called with the number of images since the last call."""
    size, scores = scorer.batch_size, []
    chunks = (items[start : start + size] for start in range(0, len(items), size))
    for scored in score_chunks(scorer, chunks, workers=workers):
        scores += scored.scores
        if progress is not None:
            progress(len(scored.scores))
    return scores


def _prepare(scorer, item):
    if isinstance(item.image, Unusable):
        raise ImageError(item.image)
    return scorer.prepare(encoded(item.image, item.where), item.where)


def _start(scorer, chunk, futures, skip_errors):
    """Starts to score the readable images of a chunk."""
    prepared, errors = {}, {}
    for index, future in enumerate(futures):
        try:
            prepared[index] = future.result()
        except ImageError as error:
            if not skip_errors:
                raise
            errors[index] = str(error)
    scores = None
    if prepared:
        scores = scorer.score_prepared([chunk[index].prompt for index in prepared], list(prepared.values()))
    return chunk, list(prepared), scores, errors


def _finish(chunk, indices, scores, errors):
    """Waits for the scores of a chunk."""
    result = [None] * len(chunk)
    for index, score in zip(indices, [] if scores is None else scores.tolist()):
        check_score(chunk[index].where, score)
        result[index] = score
    return Scored(result, errors)


def check_score(where: str, score: float) -> None:
    """Raises ScoringError unless a score is a finite number; `where` names the image."""
    if not abs(score) < float("inf"):  # NaN too
        raise ScoringError(
            f"{where}: the score is {score}, not a finite number; the weights may be broken, or a function has no "
            "verdict"
        )
