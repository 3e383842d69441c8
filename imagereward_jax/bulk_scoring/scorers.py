"""Scorers by name, for the commands."""

import hashlib
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from imagereward_jax.bulk_scoring.stream import Scorer
from imagereward_jax.rewards.base import ranks_of
from imagereward_jax.rewards.preprocess import as_image_list, host_pixels

RANDOM = "random"


class RandomScorer:
    """Random baseline: N(0, 1), a function of prompt, image and seed."""

    def __init__(self, seed: int = 0, batch_size: int = 16, image_rule: str = "shown") -> None:
        self.seed, self.batch_size, self.image_rule = seed, batch_size, image_rule

    def prepare(self, image: Any, name: str = "") -> np.ndarray:
        """Shrinks the image to float32 [16, 16, 3], which seeds its score."""
        return host_pixels(image, 16, name, self.image_rule)

    def score_prepared(self, prompts: Sequence[str], pixels: Sequence[np.ndarray]) -> np.ndarray:
        """Draws scores [B] float32."""
        return np.array([self._draw(prompt, image) for prompt, image in zip(prompts, pixels)], np.float32)

    def inference_rank(self, prompt: str, images: Any) -> tuple[list[int], list[float]]:
        """See `rewards.base.Reward.inference_rank`."""
        images = as_image_list(images)[0]
        pixels = [self.prepare(image, f"image {i}") for i, image in enumerate(images)]
        scores = self.score_prepared([prompt] * len(images), pixels).tolist()
        return ranks_of(scores), scores

    def _draw(self, prompt, image):
        digest = hashlib.sha256(f"{self.seed}\n{prompt}\n".encode("utf-8", "ignore") + image.tobytes()).digest()
        return np.random.default_rng(int.from_bytes(digest[:8], "little")).standard_normal()


def open_scorer(
    name: str,
    *,
    tokenizer: str | os.PathLike | None = None,
    dtype: str = "float32",
    batch_size: int = 16,
    image_rule: str = "shown",
    seed: int = 0,
) -> Scorer:
    """Opens a scorer by name: "random", or a name for `rewards.registry.open_reward`.

    Raises:
        FileNotFoundError, ValueError: as `open_reward`.
    """
    if name == RANDOM:
        return RandomScorer(seed, batch_size, image_rule)
    from imagereward_jax.rewards.registry import check_name, open_reward

    check_name(name, also=[RANDOM])
    return open_reward(name, tokenizer=tokenizer, dtype=dtype, batch_size=batch_size, image_rule=image_rule)
