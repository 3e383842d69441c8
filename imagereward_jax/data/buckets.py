"""Aspect-ratio buckets: images keep their shape, rounded to one of a few sizes of about the same area.

A batch holds images of one size. The sizes are those of NovelAI's training of Stable Diffusion (2022): every width that
is a multiple of a step, with the largest height that keeps to the area.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from imagereward_jax.data.batches import BatchIterator
from imagereward_jax.data.errors import DataError
from imagereward_jax.data.pairs import Pairs

READERS = 8  # threads that look up the sizes of image files

Size = tuple[int, int]  # height and width


def bucket_sizes(image_size: int, step: int, max_ratio: float) -> list[Size]:
    """Sizes of at most image_size^2 pixels whose sides are multiples of `step`, wide ones last.

    Args:
        image_size: a multiple of `step`; the square is among the sizes. max_ratio: of the longer side to the shorter.
    """
    found = {(image_size, image_size)}
    for width in range(image_size, image_size * image_size // step + 1, step):
        height = image_size * image_size // width // step * step
        if height and width <= max_ratio * height:
            found |= {(height, width), (width, height)}
    return sorted(found, key=lambda size: size[1] / size[0])


def nearest_size(height: int, width: int, sizes: Sequence[Size]) -> Size:
    """The size whose shape is nearest to an image's, by the ratio of the two shapes."""
    return min(sizes, key=lambda size: abs(np.log(size[0] * width / (size[1] * height))))


class Bucket:
    """Those of the pairs whose images are brought to one size; random access as `Pairs`.

    Args:
        pairs: all of them. rows: numbers of those in this bucket. size: of their images.
    """

    def __init__(self, pairs: Pairs, rows: Sequence[int], size: Size):
        self.pairs, self.rows = copy.copy(pairs), list(rows)
        self.pairs.image_size = size
        self.prompts = [pairs.prompts[row] for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """See `Pairs`."""
        return self.pairs[self.rows[index]]

    def fetch(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """See `Pairs.fetch`."""
        return self.pairs.fetch(self.rows[index], rng)

    def state_of(self, rows: Iterable[int]) -> str:
        """See `Pairs.state_of`."""
        return self.pairs.state_of([self.rows[row] for row in rows])


def make_buckets(pairs: Any, sizes: Sequence[Size]) -> dict[Size, Bucket]:
    """Sorts pairs into the sizes nearest to their images, which are looked up in the files' headers.

    Returns:
        {size: bucket} of the sizes that any image has.

    Raises:
        DataError: the images are drawn to one size (shapes:train). ImageError: a file is no image.
    """
    if not isinstance(pairs, Pairs):
        raise DataError("the images of the shapes world are drawn as squares and have no buckets")
    with ThreadPoolExecutor(READERS) as pool:
        nearest = list(pool.map(lambda row: nearest_size(*pairs.size_of(row), sizes), range(len(pairs))))
    rows: dict[Size, list[int]] = {}
    for row, size in enumerate(nearest):
        rows.setdefault(size, []).append(row)
    return {size: Bucket(pairs, rows[size], size) for size in sizes if size in rows}


class BucketBatches:
    """Batches of several iterators, each of one of them, drawn in proportion to their examples.

    All processes draw the same one. An example is seen once per epoch of its own bucket.

    Args:
        iterators: by name. counts: examples of each. seed: of the draws.
    """

    def __init__(self, iterators: Mapping[str, BatchIterator], counts: Mapping[str, int], seed: int):
        self._iterators, self._seed, self._taken = dict(iterators), seed, 0
        total = sum(counts.values())
        self._shares = [counts[name] / total for name in self._iterators]

    def __iter__(self):
        return self

    def __next__(self) -> dict[str, Any]:
        draw = np.random.default_rng((self._seed, self._taken)).choice(len(self._shares), p=self._shares)
        self._taken += 1
        return next(list(self._iterators.values())[draw])

    def get_state(self) -> dict[str, Any]:
        """See `BatchIterator.get_state`: the batches taken, and the position in every bucket."""
        return {
            "batches": self._taken,
            "buckets": {name: iterator.get_state() for name, iterator in self._iterators.items()},
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """See `BatchIterator.set_state`.

        Raises:
            DataError: the state is of other buckets.
        """
        there = state.get("buckets")
        if not isinstance(there, Mapping) or there.keys() != self._iterators.keys():
            was = f"sizes {', '.join(there)}" if isinstance(there, Mapping) else "none"
            raise DataError(
                f"cannot continue the data: the saved state has aspect-ratio buckets of {was}, but now the images are "
                f"of {', '.join(self._iterators)}; use the same data and settings, or start a new run"
            )
        self._taken = int(state["batches"])
        for name, iterator in self._iterators.items():
            iterator.set_state(there[name])

    def close(self) -> None:
        """See `BatchIterator.close`."""
        for iterator in self._iterators.values():
            iterator.close()
