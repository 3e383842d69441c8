"""Random-access sources over the shapes world: captioned images, and ranked groups of images.

An item depends only on (seed, index), so that any worker on any host makes the same one.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import ndimage

from imagereward_jax.data.shapes.checker import words_right
from imagereward_jax.data.shapes.degrade import degrade
from imagereward_jax.data.shapes.drawing import (
    WAYS_BETWEEN,
    WORDS,
    Caption,
    all_captions,
    draw,
    draw_between,
    draw_float,
    to_float,
    to_uint8,
)

MAX_IMAGES = 9
MAX_CLEAN_IMAGES = 1 + len(WORDS)  # of one group: no wrong word, or one to four
# One wrong word costs 1; a degradation costs this times its severity, so that at 1/4 it is as bad as a wrong word.
SEVERITY_COST = 4.0
MIN_SEVERITY = 0.12
MIN_COST_GAP = 0.2  # closer images would be ranked by a coin
MODES = {"words": 0.6, "quality": 0.15, "mixed": 0.25}


def with_wrong_words(caption: Caption, count: int, rng: np.random.Generator) -> Caption:
    """Returns the caption with `count` of its four words replaced by random other ones."""
    fields = rng.choice(list(WORDS), size=count, replace=False)
    return caption.replace(**{f: str(rng.choice([w for w in WORDS[f] if w != getattr(caption, f)])) for f in fields})


def _check_source(size, captions):
    captions = all_captions() if captions is None else list(captions)
    if size < 1:
        raise ValueError(f"size must be at least 1; got {size}")
    if not captions:
        raise ValueError("captions must not be empty")
    return captions


def _check_index(index, size):
    if not 0 <= index < size:
        raise IndexError(f"index {index} is outside a source of {size} items")


class ShapesPairs:
    """Captioned images: item i is {"image": float32 [S, S, 3] in [0, 1], "prompt": str} and, as other pairs have it,
    "original_size" (S, S) and "crop_top_left" (0, 0).

    Args:
        size: number of items.
        seed: chooses captions and jitter.
        captions: list of `Caption` to draw from (default: all).
        caption_noise: probability that one of the caption's four words is wrong, as in captions from the web.
        image_size: side in pixels.
    """

    def __init__(
        self,
        size: int,
        seed: int = 0,
        captions: Sequence[Caption] | None = None,
        caption_noise: float = 0.0,
        image_size: int = 64,
    ):
        self.captions = _check_source(size, captions)
        if not 0 <= caption_noise <= 1:
            raise ValueError(f"caption_noise must be in [0, 1]; got {caption_noise}")
        self.size, self.seed, self.caption_noise, self.image_size = size, seed, caption_noise, image_size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        _check_index(index, self.size)
        rng = np.random.default_rng((self.seed, int(index)))
        caption = self.captions[rng.integers(len(self.captions))]
        image = draw(caption, rng, self.image_size)
        if rng.random() < self.caption_noise:
            caption = with_wrong_words(caption, 1, rng)
        size, corner = np.full(2, self.image_size, np.int32), np.zeros(2, np.int32)
        return {"image": to_float(image), "prompt": caption.text, "original_size": size, "crop_top_left": corner}


class ShapesGroups:
    """Ranked groups: item i is {"prompt": str, "images": float32 [K, S, S, 3], "ranking": int32 [K], 1 is best}.

    Images of a group differ in how many words are wrong (0 to 4), in how badly they are spoilt (`degrade`), or in both,
    without ties. In a group of unclear ones they lie between words or exaggerate one (`draw_between`), and are ranked
    by how many words the checker finds, with ties.

    Args:
        size: number of groups.
        seed: chooses everything.
        captions: list of `Caption` to draw from (default: all).
        images_per_prompt: K, 2 to 9.
        image_size: side in pixels.
        spoilt: whether two groups in five hold spoilt images too; without them images differ in their words alone.
        unclear: share of the groups that hold unclear images.

    Raises:
        ValueError: an argument is out of range: without spoilt images K is at most 5, as no two have the same rank.
    """

    def __init__(
        self,
        size: int,
        seed: int = 0,
        captions: Sequence[Caption] | None = None,
        images_per_prompt: int = 4,
        image_size: int = 64,
        spoilt: bool = True,
        unclear: float = 0.0,
    ):
        self.captions = _check_source(size, captions)
        if not 2 <= images_per_prompt <= MAX_IMAGES:
            raise ValueError(f"images_per_prompt must be in 2..{MAX_IMAGES}; got {images_per_prompt}")
        if not spoilt and images_per_prompt > MAX_CLEAN_IMAGES:
            raise ValueError(
                f"images_per_prompt must be in 2..{MAX_CLEAN_IMAGES} without spoilt images, one for each number of "
                f"wrong words; got {images_per_prompt}"
            )
        self.size, self.seed, self.spoilt, self.unclear = size, seed, spoilt, unclear
        self.images_per_prompt, self.image_size = images_per_prompt, image_size
        self.largest = images_per_prompt

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        _check_index(index, self.size)
        rng = np.random.default_rng((self.seed, int(index), 1))  # 1: not the images of ShapesPairs
        caption = self.captions[rng.integers(len(self.captions))]
        if self.unclear and rng.random() < self.unclear:
            images = np.stack([self._draw_unclear(caption, rng) for _ in range(self.images_per_prompt)])
            wrong = [len(WORDS) - sum(words_right(caption.text, image).values()) for image in images]
            ranking = np.unique(wrong, return_inverse=True)[1].astype(np.int32) + 1
            return {"prompt": caption.text, "images": images, "ranking": ranking}
        plans = self._plan(rng)
        images = np.stack([self._draw(caption, wrong, severity, rng) for wrong, severity in plans])
        order = np.argsort([_cost(*plan) for plan in plans])
        ranking = np.empty(len(plans), np.int32)
        ranking[order] = np.arange(1, len(plans) + 1)
        return {"prompt": caption.text, "images": images, "ranking": ranking}

    def _plan(self, rng):
        """K tuples (wrong words, severity) whose costs lie apart."""
        mode = str(rng.choice(list(MODES), p=list(MODES.values()))) if self.spoilt else "words"
        if mode == "words" and self.images_per_prompt <= MAX_CLEAN_IMAGES:
            return [(int(wrong), 0.0) for wrong in rng.permutation(MAX_CLEAN_IMAGES)[: self.images_per_prompt]]
        base = int(rng.choice(3, p=(0.7, 0.2, 0.1)))
        plans = []
        while len(plans) < self.images_per_prompt:
            wrong = base if mode == "quality" else int(rng.integers(5))
            severity = float(rng.uniform(MIN_SEVERITY, 1)) if rng.random() < 0.7 else 0.0
            if all(abs(_cost(wrong, severity) - _cost(*plan)) >= MIN_COST_GAP for plan in plans):
                plans.append((wrong, severity))
        return plans

    def _draw(self, caption, wrong, severity, rng):
        image = draw_float(with_wrong_words(caption, wrong, rng), rng, self.image_size)
        image = _soften(image, rng)
        if severity:
            image = degrade(image, severity, rng, caption)
        return to_float(to_uint8(image))

    def _draw_unclear(self, caption, rng):
        """An image between the caption and one with a wrong word or two, or past the caption; half are about shapes."""
        other = with_wrong_words(caption, int(rng.integers(1, 3)), rng)
        if rng.random() < 0.5:
            other = caption.replace(shape=with_wrong_words(caption, len(WORDS), rng).shape)
        share, way = rng.uniform(-0.7, 1), str(rng.choice(WAYS_BETWEEN))
        image = draw_between((caption, other), share, "blend" if share < 0 else way, rng, self.image_size)
        return to_float(to_uint8(_soften(image, rng)))


def _soften(image, rng):
    """Softens as any autoencoder does, independently of the rank: up to a pixel of blur, a little noise."""
    sigma = rng.uniform(0, 1 / 64) * image.shape[0]
    soft = ndimage.gaussian_filter(image, (sigma, sigma, 0), mode="nearest")
    return soft + np.float32(rng.uniform(0, 0.02)) * rng.standard_normal(image.shape, np.float32)


def _cost(wrong, severity):
    return wrong + SEVERITY_COST * severity
