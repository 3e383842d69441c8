"""Rewards computed by rules, without gradient: for methods that learn from scores alone."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from imagereward_jax.data.images import open_image
from imagereward_jax.rewards import preprocess
from imagereward_jax.rewards.base import pair_prompts, ranks_of
from imagereward_jax.storage.contact_sheet import to_uint8


class RuleReward:
    """Base of rules and of a user's functions; a subclass implements `score_arrays`."""

    differentiable = False
    batch_size = 16
    image_rule = "shown"

    def score_arrays(
        self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> np.ndarray:
        """Scores a batch.

        Args:
            images: [B, H, W, 3] uint8, or floating point in [0, 1], NumPy.
            prompts: list of B texts.
            metadata: list of B dicts, the other columns of the prompts' rows; None if there are none.

        Returns:
            [B] float32; NaN for no verdict.
        """
        raise NotImplementedError

    def named_scores(
        self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> dict[str, np.ndarray]:
        """Scores a batch: {"": [B] as `score_arrays`, and by name further scores [B] to be logged}."""
        return {"": self.score_arrays(images, prompts, metadata)}

    def score(self, prompt: str | Sequence[str], image: Any) -> float | list[float]:
        """See `rewards.base.Reward.score`; images keep their size."""
        images, single = preprocess.as_image_list(image)
        prompts = pair_prompts(prompt, images)
        opened = [self.prepare(one, f"image {i}") for i, one in enumerate(images)]
        opened = opened * len(prompts) if len(opened) == 1 else opened
        scores = self.score_prepared(prompts, opened).tolist()
        return scores[0] if single and isinstance(prompt, str) else scores

    def prepare(self, image: Any, name: str = "") -> np.ndarray:
        """See `rewards.base.Reward.prepare`: returns uint8 [H, W, 3] in the image's own size."""
        return np.asarray(open_image(image, name, self.image_rule))

    def score_prepared(self, prompts: Sequence[str], pixels: Sequence[np.ndarray]) -> np.ndarray:
        """See `rewards.base.Reward.score_prepared`: returns [B] float32, NumPy. Images may differ in size."""
        pairs = zip(pixels, prompts, strict=True)
        return np.concatenate([self.score_arrays(image[None], [prompt]) for image, prompt in pairs])

    def inference_rank(self, prompt: str, images: Any) -> tuple[list[int], list[float]]:
        """See `rewards.base.Reward.inference_rank`."""
        scores = self.score(prompt, preprocess.as_image_list(images)[0])
        return ranks_of(scores), scores


class JPEGSize(RuleReward):
    """Compressibility of an image (DDPO, arXiv 2305.13301): its size as a JPEG in kB (1,000 bytes).

    Args:
        sign: -1 rewards small files (compressibility), 1 large ones (incompressibility).
        quality: JPEG quality.
    """

    def __init__(self, sign: int, quality: int = 95) -> None:
        self.sign, self.quality = sign, quality

    def score_arrays(
        self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> np.ndarray:
        """See `RuleReward.score_arrays`."""
        return np.array([self.sign * self._kilobytes(image) for image in to_uint8(images)], np.float32)

    def _kilobytes(self, image):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=self.quality)
        return file.tell() / 1000


RULES = {
    "jpeg-compressibility": lambda: JPEGSize(-1),
    "jpeg-incompressibility": lambda: JPEGSize(1),
}
