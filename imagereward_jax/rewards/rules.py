"""Rewards computed by rules, without gradient: for methods that learn from scores alone.

Each has `score`, `inference_rank` and `score_arrays`, and `differentiable` is false.
"""

import importlib
import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from imagereward_jax.data.images import open_image
from imagereward_jax.rewards import preprocess
from imagereward_jax.rewards.base import pair_prompts, ranks_of

_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


class RuleReward:
    """Base of rules; a subclass implements `score_arrays`."""

    differentiable = False
    batch_size = 16
    image_rule = "shown"

    def score_arrays(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """Scores a batch.

        Args:
            images: [B, H, W, 3] uint8, or floating point in [0, 1], NumPy.
            prompts: list of B texts.

        Returns:
            [B] float32.
        """
        raise NotImplementedError

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

    def score_arrays(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """See `RuleReward.score_arrays`."""
        return np.array([self.sign * self._kilobytes(image) for image in _as_uint8(images)], np.float32)

    def _kilobytes(self, image):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=self.quality)
        return file.tell() / 1000


class PythonReward(RuleReward):
    """A user's function (images uint8 [B, H, W, 3], prompts) -> B numbers.

    Args:
        name: "module:function"; the module is imported.
        function: the function itself; `name` is then only how errors call it.

    Raises:
        ValueError: the module or function does not exist, or is not callable.
    """

    def __init__(self, name: str, function: Callable[..., Any] | None = None) -> None:
        self.name = name
        self.function = self._imported(name) if function is None else function
        if not callable(self.function):
            raise ValueError(f"reward {name!r}: expected a function, not {type(self.function).__name__}")

    @staticmethod
    def _imported(name):
        module, _, function = name.partition(":")
        try:
            return getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"reward {name!r}: {error}; expected module:function that Python can import") from error

    def score_arrays(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """See `RuleReward.score_arrays`.

        Raises:
            ValueError: the function did not return a finite number for each image.
        """
        scores = np.asarray(self.function(_as_uint8(images), list(prompts)))
        if scores.shape != (len(prompts),) or scores.dtype.kind not in "buif" or not np.isfinite(scores).all():
            raise ValueError(
                f"reward {self.name!r} must return {len(prompts)} finite numbers, one per image; it returned an array "
                f"of shape {scores.shape} and type {scores.dtype}: {scores.ravel()[:4]}"
            )
        return scores.astype(np.float32)


RULES = {
    "jpeg-compressibility": lambda: JPEGSize(-1),
    "jpeg-incompressibility": lambda: JPEGSize(1),
}


def is_rule(name: str) -> bool:
    """Whether `name` is a rule or module:function."""
    return name in RULES or _FUNCTION.fullmatch(str(name)) is not None


def open_rule(name: str, image_rule: str = "shown") -> RuleReward:
    """Opens a rule by name, or a Python function by module:function; it reads images by `image_rule`."""
    rule = RULES[name]() if name in RULES else PythonReward(name)
    rule.image_rule = image_rule
    return rule


def _as_uint8(images):
    """Converts images [B, H, W, 3], uint8 or floating point in [0, 1], to uint8."""
    images = np.asarray(images)
    if images.dtype == np.uint8:
        return images
    return np.round(np.clip(images.astype(np.float32), 0, 1) * 255).astype(np.uint8)
