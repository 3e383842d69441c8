"""Scores items of many clients by one scorer; what is wrong with an item costs that item alone."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from imagereward_jax.bulk_scoring.stream import Scorer
from imagereward_jax.data.errors import ImageError
from imagereward_jax.data.images import open_bounded
from imagereward_jax.rewards.errors import RewardError
from imagereward_jax.rewards.rules import RuleReward
from imagereward_jax.serving.protocol import Item, Result


class ItemScorer:
    """Scores items with any scorer of the package.

    Batches of compiled scorers are padded to a power of two, or to the scorer's batch size, so that few programs serve
    every number of images.

    Args:
        scorer: what `bulk_scoring.scorers.open_scorer` opens.
        max_pixels: larger images are refused before they are decoded.
    """

    def __init__(self, scorer: Scorer, max_pixels: int) -> None:
        self.scorer, self.max_pixels = scorer, max_pixels
        self.batch_size = scorer.batch_size
        self._compiled = getattr(scorer, "differentiable", False)

    def warm_up(self) -> None:
        """Compiles a network's program of every batch size, before the first client waits for it."""
        if self._compiled and not isinstance(self.scorer, RuleReward):
            pixels = self.scorer.prepare(np.zeros((64, 64, 3), np.uint8))
            for size in self._sizes():
                np.asarray(self.scorer.score_prepared([""] * size, [pixels] * size))

    def device(self) -> str:
        """Where scores are computed: the kind of jax's devices, or "host" for Python functions."""
        if not self._compiled:
            return "host"
        import jax

        return jax.local_devices()[0].device_kind

    def prepare(self, item: Item) -> np.ndarray | ImageError:
        """Reads and preprocesses an item's image, or returns what is wrong with it; thread-safe."""
        try:
            if item.image is None:
                raise ImageError("the image is not base64")
            return self.scorer.prepare(open_bounded(item.image, self.max_pixels))
        except ImageError as error:
            return error
        except Exception as error:  # of a scorer's own preprocessing
            return ImageError(f"the image cannot be preprocessed: {type(error).__name__}: {error}")

    def score(self, items: Sequence[Item], prepared: Sequence[np.ndarray | ImageError]) -> list[Result]:
        """Scores a batch: a result per item, in order.

        Args:
            prepared: from `prepare`.
        """
        results = [Result({}, str(one)) if isinstance(one, ImageError) else None for one in prepared]
        usable = [index for index, result in enumerate(results) if result is None]
        # Of images in their own sizes, those of a size are scored together.
        usable.sort(key=lambda index: prepared[index].shape)
        for _, group in itertools.groupby(usable, key=lambda index: prepared[index].shape):
            rows = list(group)
            found = self._score_rows([items[row] for row in rows], [prepared[row] for row in rows])
            for row, result in zip(rows, found):
                results[row] = result
        return results

    def _score_rows(self, items, pixels):
        """Scores images of one shape; after an error one by one, so that only the item that caused it has none."""
        try:
            scores = self._call(items, pixels)
        except Exception as error:
            if len(items) > 1:
                return [self._score_rows([item], [one])[0] for item, one in zip(items, pixels)]
            text = error.reason if isinstance(error, RewardError) else f"{type(error).__name__}: {error}"
            return [Result({}, f"the reward failed: {text}".replace("the reward failed: the reward", "the reward"))]
        return [_result({name: values[row] for name, values in scores.items()}) for row in range(len(items))]

    def _call(self, items, pixels):
        """{name: scores [N]} of N items."""
        count = len(items)
        if self._compiled:
            size = next((size for size in self._sizes() if size >= count), count)
            items, pixels = ([*rows, *[rows[-1]] * (size - count)] for rows in (items, pixels))
        prompts = [item.prompt for item in items]
        if isinstance(self.scorer, RuleReward):
            found = self.scorer.named_scores(np.stack(pixels), prompts, [dict(item.metadata) for item in items])
        else:
            found = {"": self.scorer.score_prepared(prompts, pixels)}
        scores = {name: np.asarray(values, np.float64) for name, values in found.items()}
        for name, values in scores.items():
            if values.shape != (len(items),):
                raise RewardError(name, f"the reward returned scores of shape {values.shape} for {len(items)} images")
        return {name: values[:count].tolist() for name, values in scores.items()}

    def _sizes(self) -> list[int]:
        """The batch sizes that are compiled."""
        powers = [1 << power for power in range(self.batch_size.bit_length())]
        return sorted({*powers, self.batch_size})


def _result(scores: dict[str, Any]) -> Result:
    infinite = [value for value in scores.values() if math.isinf(value)]
    if infinite:
        return Result({}, f"the score is {infinite[0]}, not a finite number")
    return Result({name: None if math.isnan(value) else value for name, value in scores.items()})
