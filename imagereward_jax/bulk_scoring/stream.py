"""Images are read by threads while the devices compute the scores of those before."""

import collections
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from PIL import Image

from imagereward_jax.rewards.preprocess import ImageError

CHUNKS_AHEAD = 2  # read before they are needed, so that one slow image does not stall the devices


class Scorer(Protocol):
    """Anything that scores images in bulk: a `Reward`, a `RuleReward` or the random baseline."""

    batch_size: int

    def prepare(self, image: Any, name: str = "image") -> np.ndarray: ...

    def score_prepared(self, prompts: Sequence[str], pixels: Sequence[np.ndarray]) -> jax.Array | np.ndarray: ...

    def inference_rank(self, prompt: str, images: Any) -> tuple[list[int], list[float]]: ...


class Item(NamedTuple):
    """One image to score: `image` is a path, the bytes of a file, or an array; `where` names its row in errors."""

    prompt: str
    image: Any
    where: str


class Unusable(str):
    """In place of an image: why there is none."""


class Scored(NamedTuple):
    """What became of a chunk: `scores` [n] floats, None for an image that could not be used; `errors` {index: why}."""

    scores: list[float | None]
    errors: dict[int, str]


class ScoringError(RuntimeError):
    """The scorer gave something that is no number."""


def default_workers() -> int:
    """Threads that read images: one a core, 16 at most."""
    return min(16, os.cpu_count() or 1)


def score_chunks(
    scorer: Scorer, chunks: Iterable[list[Item]], *, workers: int | None = None, skip_errors: bool = False
) -> Iterator[Scored]:
    """Scores chunks of images in order.

    Args:
        scorer: has `prepare(image, name)` and `score_prepared(prompts, prepared)`.
        chunks: iterable of lists of `Item`, each of at most the scorer's `batch_size`.
        workers: threads that read.
        skip_errors: an image that cannot be read gets None and a line in `errors`, instead of ending everything.

    Yields:
        A `Scored` for each chunk.

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
                if len(running) > 1:  # one is computed while the scores of the last are fetched
                    yield _finish(*running.popleft())
            while reading or running:
                if reading:
                    running.append(_start(scorer, *reading.popleft(), skip_errors))
                if len(running) > 1 or not reading:
                    yield _finish(*running.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def score_items(
    scorer: Scorer, items: Sequence[Item], *, workers: int | None = None, progress: Callable[[int], Any] | None = None
) -> list[float]:
    """The scores of a list of `Item`s, floats in their order. `progress` is called with how many more are done."""
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
    image = _decode(item) if isinstance(item.image, bytes) else item.image
    try:
        return scorer.prepare(image, item.where)
    except ImageError as error:
        text = str(error)
        raise ImageError(text if text.startswith(item.where) else f"{item.where}: {text}") from error


def _decode(item):
    try:
        return Image.open(io.BytesIO(item.image))
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, ... for broken files
        raise ImageError(f"{item.where}: the image in this row cannot be read ({error})") from error


def _start(scorer, chunk, futures, skip_errors):
    """Hands the images of a chunk that could be read to the devices."""
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
        if not abs(score) < float("inf"):  # NaN too
            raise ScoringError(f"{chunk[index].where}: the score is {score}; the weights may be broken")
        result[index] = score
    return Scored(result, errors)
