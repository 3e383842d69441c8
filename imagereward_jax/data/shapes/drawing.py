"""Captions of the shapes world and the images that they describe."""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Sequence

import numpy as np

SIZES = ("small", "large")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = ("top left", "top right", "bottom left", "bottom right", "center")
WORDS = {"size": SIZES, "colour": COLOURS, "shape": SHAPES, "place": PLACES}

# Lengths are in units of the image's side.
RADIUS = {"small": 0.125, "large": 0.22}
CORNER = 0.27
POSITION = {  # (row, column) of the middle of the shape's bounding box
    "top left": (CORNER, CORNER),
    "top right": (CORNER, 1 - CORNER),
    "bottom left": (1 - CORNER, CORNER),
    "bottom right": (1 - CORNER, 1 - CORNER),
    "center": (0.5, 0.5),
}
RGB = {
    "red": (0.86, 0.12, 0.14),
    "green": (0.15, 0.65, 0.25),
    "blue": (0.15, 0.30, 0.88),
    "yellow": (0.96, 0.86, 0.12),
    "purple": (0.55, 0.18, 0.75),
    "orange": (0.97, 0.51, 0.07),
}
BACKGROUND = 0.93

# Proportions of the shapes, in units of their radius, chosen so that all cover about the same area.
SQUARE_HALF = 0.9
TRIANGLE_CIRCUMRADIUS = 1.25
CROSS_LENGTH, CROSS_WIDTH = 1.1, 0.38

WAYS_BETWEEN = ("blend", "union", "overlap", "halves")  # to make one outline of two: see `draw_between`


@dataclasses.dataclass(frozen=True, order=True)
class Caption:
    """The content of an image, as one word of each list in `WORDS`."""

    size: str
    colour: str
    shape: str
    place: str

    def __post_init__(self):
        for field, allowed in WORDS.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} must be one of {', '.join(allowed)}; got {getattr(self, field)!r}")

    @property
    def text(self) -> str:
        """The caption in English: "a large red circle at the top left"."""
        where = "in the center" if self.place == "center" else f"at the {self.place}"
        return f"a {self.size} {self.colour} {self.shape} {where}"

    def replace(self, **words: str) -> "Caption":
        """Returns the caption with some words replaced."""
        return dataclasses.replace(self, **words)


@functools.cache
def all_captions() -> tuple[Caption, ...]:
    """Returns all 240 captions of the shapes world, in a fixed order."""
    return tuple(Caption(*words) for words in itertools.product(SIZES, COLOURS, SHAPES, PLACES))


@functools.cache
def _by_text():
    return {caption.text: caption for caption in all_captions()}


def parse(text: str) -> Caption:
    """Parses the text of a `Caption`.

    Raises:
        ValueError: the text is not a caption of the shapes world.
    """
    caption = _by_text().get(text)
    if caption is None:
        raise ValueError(
            f"{text!r} is not a caption of the shapes world; expected a text like {all_captions()[0].text!r}"
        )
    return caption


def split(seed: int = 0, held_out: int = 64) -> tuple[list[Caption], list[Caption]]:
    """Splits all captions into (train, held_out).

    The choice depends only on `seed`; it is a hash, so it is the same on every machine and version. Every word keeps at
    least half of its captions in training, so only combinations of words are held out.
    """
    order = sorted(all_captions(), key=lambda c: hashlib.sha256(f"{seed}:{c.text}".encode()).digest())
    limit = {
        word: sum(word in dataclasses.astuple(c) for c in order) // 2 for words in WORDS.values() for word in words
    }
    chosen = []
    for caption in order:
        words = dataclasses.astuple(caption)
        if len(chosen) < held_out and all(limit[word] > 0 for word in words):
            chosen.append(caption)
            for word in words:
                limit[word] -= 1
    if len(chosen) < held_out:
        raise ValueError(f"held_out must be at most about half of the {len(order)} captions; got {held_out}")
    return [caption for caption in order if caption not in set(chosen)], chosen


def coverage(shape: str, centre: Sequence[float] | np.ndarray, radius: float, image_size: int) -> np.ndarray:
    """Computes the covered fraction of each pixel: float32 [image_size, image_size] in [0, 1].

    Args:
        centre: (row, column) of the middle of the bounding box, in pixels.
        radius: in pixels.
    """
    return _coverage(functools.partial(_distance, shape), centre, radius, image_size)


def _coverage(distance, centre, radius, image_size):
    pixels = np.arange(image_size, dtype=np.float32) + np.float32(0.5)
    y, x = (pixels - np.float32(centre[0]))[:, None], (pixels - np.float32(centre[1]))[None, :]
    # Clipping the distance to the outline gives antialiasing: pixels on the outline are half covered.
    return np.clip(0.5 - distance(y, x, np.float32(radius)), 0, 1)


def _distance(shape, y, x, radius):
    """Signed distance to the outline in pixels, negative inside."""
    if shape == "circle":
        return np.sqrt(x * x + y * y) - radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - radius * SQUARE_HALF
    if shape == "triangle":
        circumradius = radius * TRIANGLE_CIRCUMRADIUS
        y = y - circumradius / 4  # the bounding box reaches 1 up and 1/2 down from the centroid
        slanted = np.abs(x) * np.float32(np.sqrt(3) / 2) - y / 2
        return np.maximum(slanted, y) - circumradius / 2
    if shape == "cross":
        x, y = np.abs(x), np.abs(y)
        length, width = radius * CROSS_LENGTH, radius * CROSS_WIDTH
        return np.minimum(np.maximum(x - length, y - width), np.maximum(x - width, y - length))
    raise ValueError(f"shape must be one of {', '.join(SHAPES)}; got {shape!r}")


def draw_float(caption: Caption, rng: np.random.Generator, image_size: int = 64) -> np.ndarray:
    """Draws like `draw`, without rounding: float32 [image_size, image_size, 3] in [0, 1]."""
    return _paint(_words_as_numbers(caption), functools.partial(_distance, caption.shape), rng, image_size)


def draw_between(
    captions: Sequence[Caption], share: float, way: str, rng: np.random.Generator, image_size: int = 64
) -> np.ndarray:
    """Draws an image between two captions, or past the first, somewhat turned and stretched.

    Args:
        captions: (first, second). share: of the second in place, size and colour; below 0 the first is exaggerated.
        way: how one outline is made of both: "blend" of their distances, in shares; "union", "overlap"; "halves", cut
            along a random line.

    Returns:
        float32 [image_size, image_size, 3] in [0, 1].
    """
    numbers = [a + share * (b - a) for a, b in zip(*map(_words_as_numbers, captions), strict=True)]
    angle, turn = rng.uniform(0, 2 * np.pi), rng.normal(0, 0.15)
    stretch = np.exp(rng.normal(0, 0.12, 2)).astype(np.float32)

    def distance(y, x, radius):
        y, x = np.cos(turn) * y - np.sin(turn) * x, np.sin(turn) * y + np.cos(turn) * x
        y, x = y * stretch[0], x * stretch[1]
        first, second = (_distance(caption.shape, y, x, radius) for caption in captions)
        if way == "blend":
            return (1 - share) * first + share * second
        if way == "halves":
            offset = (2 * share - 1) * radius
            return np.where(np.cos(angle) * y + np.sin(angle) * x > offset, first, second)
        return {"union": np.minimum, "overlap": np.maximum}[way](first, second)

    return np.clip(_paint(numbers, distance, rng, image_size), 0, 1)


def _words_as_numbers(caption):
    """(centre, radius, colour), lengths in units of the image's side."""
    centre, colour = np.array(POSITION[caption.place], np.float32), np.array(RGB[caption.colour], np.float32)
    return centre, RADIUS[caption.size], colour


def _paint(numbers, distance, rng, image_size):
    """Draws a shape, `distance(y, x, radius)` in pixels, with jitter on all that `numbers` say of it."""
    middle, radius, colour = numbers
    jitter = rng.uniform(-1, 1, 10).astype(np.float32)
    centre = (middle + 0.025 * jitter[0:2]) * image_size
    radius = radius * (1 + 0.07 * jitter[2]) * image_size
    background = BACKGROUND + 0.03 * jitter[3:6]
    foreground = np.clip(colour * (1 + 0.05 * jitter[6]) + 0.03 * jitter[7:10], 0, 1)
    alpha = _coverage(distance, centre, radius, image_size)[..., None]
    return background + alpha * (foreground - background)


def draw(caption: Caption, rng: np.random.Generator, image_size: int = 64) -> np.ndarray:
    """Draws an image of the caption: uint8 [image_size, image_size, 3].

    Place, size, shade and the tint of the background vary a little with `rng` (np.random.Generator).
    """
    return to_uint8(draw_float(caption, rng, image_size))


def to_uint8(image: np.ndarray) -> np.ndarray:
    """Converts float in [0, 1] (clipped) to uint8, rounded."""
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def to_float(image: np.ndarray) -> np.ndarray:
    """Converts uint8 to float32 in [0, 1]."""
    return image.astype(np.float32) / np.float32(255)
