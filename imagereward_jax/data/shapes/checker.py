"""Reads an image of the shapes world back into words, by rules: the ground truth of every shapes experiment.

The shape is what differs from the colour of the border. Its soft mask is compared with the four templates, its
area gives the size, its bounding box the place, and the median of its inner pixels the colour. A word is only
given if the image is clear about it, so that textures and blends that please a reward earn nothing here.
"""

import colorsys
import functools
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from imagereward_jax.data.shapes.drawing import CORNER, RADIUS, SHAPES, WORDS, coverage, parse

SMOOTHING = 0.012  # of the image's side; takes off pixel noise, and templates get the same
MIN_CONTRAST = 0.25  # between shape and background, Euclidean over RGB
MIN_BACKGROUND = 0.6
BORDER_TOLERANCE = 0.12
MIN_IOU = 0.80
MIN_IOU_MARGIN = 0.03
SIZE_TOLERANCE = 1.3  # radius may be off by this factor and still be called small or large
PLACE_TOLERANCE = 0.105  # of the side
HUES = {  # degrees
    "red": (335, 375),
    "orange": (16, 42),
    "yellow": (43, 70),
    "green": (90, 165),
    "blue": (200, 252),
    "purple": (262, 315),
}
MIN_SATURATION = 0.4
MIN_VALUE = 0.3
UNIFORM = 0.75  # share of the shape's inner pixels that must have its colour
UNIFORM_DISTANCE = 0.2


class Blob(NamedTuple):
    """The shape found in an image."""

    alpha: np.ndarray  # [S, S] in [0, 1]: soft mask
    mask: np.ndarray  # [S, S] bool
    area: float  # pixels


def check(image: np.ndarray) -> dict[str, str | None]:
    """Reads what the image shows: {"size", "colour", "shape", "place"} -> a word of `WORDS`, or None if unclear.

    Args:
        image: [S, S, 3], uint8, or float in [0, 1] (clipped; a NaN makes every answer None).
    Raises:
        ValueError: the array is not a square RGB image.
    """
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[2] != 3 or image.shape[0] != image.shape[1]:
        raise ValueError(f"image must be [S, S, 3]; got shape {image.shape}")
    image = image.astype(np.float32) / 255 if image.dtype == np.uint8 else image.astype(np.float32)
    nothing = dict.fromkeys(WORDS)
    if not np.isfinite(image).all():
        return nothing
    image = np.clip(image, 0, 1)
    blob = _find_blob(image)
    if blob is None:
        return nothing
    return {
        "size": _size(blob),
        "colour": _colour(image, blob.mask),
        "shape": _shape(blob),
        "place": _place(blob.mask),
    }


def words_right(text: str, image: np.ndarray) -> dict[str, bool]:
    """Judges {"size", "colour", "shape", "place"} -> whether the image shows that word of the caption `text`."""
    caption, shown = parse(text), check(image)
    return {field: shown[field] == getattr(caption, field) for field in WORDS}


def fully_right(text: str, image: np.ndarray) -> bool:
    """Returns whether the image shows every word of the caption `text`."""
    return all(words_right(text, image).values())


def _smooth(image):
    sigma = SMOOTHING * image.shape[0]
    return ndimage.gaussian_filter(image, (sigma, sigma, 0)[: image.ndim], mode="nearest")


def _find_blob(image):
    """Finds the shape on its background; None without a plain background or with more than one shape."""
    side = image.shape[0]
    smooth = _smooth(image)
    frame = max(1, side // 40)
    inner = np.zeros((side, side), bool)
    inner[frame:-frame, frame:-frame] = True
    border = smooth[~inner]
    background = np.median(border, axis=0)
    plain = np.linalg.norm(border - background, axis=1) < BORDER_TOLERANCE
    if background.mean() < MIN_BACKGROUND or plain.mean() < 0.85:
        return None
    distance = np.linalg.norm(smooth - background, axis=-1)
    few = max(1, round(0.01 * distance.size))
    contrast = np.median(np.partition(distance.ravel(), -few)[-few:])
    if contrast < MIN_CONTRAST:
        return None
    labels, count = ndimage.label(distance > contrast / 2)  # half of the contrast: where the outline is, blurred or not
    sizes = np.bincount(labels.ravel())[1:]
    mask = labels == 1 + np.argmax(sizes)
    near = ndimage.binary_dilation(mask, iterations=max(2, side // 20))
    others = ((distance > 0.3 * contrast) & ~near).sum()
    if others > 0.15 * mask.sum() or count > 12:
        return None
    alpha = np.where(near, np.clip(distance / _inner_contrast(distance, mask), 0, 1), 0)
    return Blob(alpha, mask, float(alpha.sum()))


def _inner(mask):
    """The mask without its rim, or all of it if little is left."""
    eroded = ndimage.binary_erosion(mask, iterations=max(1, mask.shape[0] // 32))
    return eroded if eroded.sum() >= 12 else mask


def _inner_contrast(distance, mask):
    return np.median(distance[_inner(mask)])


@functools.cache
def _unit_area(shape):
    """Area over radius squared."""
    return float(coverage(shape, (256, 256), 128, 512).sum()) / 128**2


def _size(blob):
    """By area: the shapes' areas at the same radius differ far less than small and large do."""
    side = blob.mask.shape[0]
    unit = np.mean([_unit_area(shape) for shape in SHAPES])
    radius = np.sqrt(blob.area / unit) / side
    word = min(RADIUS, key=lambda word: abs(np.log(radius / RADIUS[word])))
    return word if abs(np.log(radius / RADIUS[word])) < np.log(SIZE_TOLERANCE) else None


def _bounding_box_middle(mask):
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return float(rows[0] + rows[-1] + 1) / 2, float(columns[0] + columns[-1] + 1) / 2


def _shape(blob):
    """By soft intersection over union with each template of the same area and centroid."""
    side = blob.mask.shape[0]
    centroid = np.array(ndimage.center_of_mass(blob.alpha)) + 0.5
    scores = {}
    for shape in SHAPES:
        radius = np.sqrt(blob.area / _unit_area(shape))
        middle = centroid - _centroid_offset(shape) * radius
        template = _smooth(coverage(shape, middle, radius, side))
        scores[shape] = np.minimum(template, blob.alpha).sum() / np.maximum(template, blob.alpha).sum()
    second, first = sorted(SHAPES, key=scores.get)[-2:]
    clear = scores[first] >= MIN_IOU and scores[first] - scores[second] >= MIN_IOU_MARGIN
    return first if clear else None


@functools.cache
def _centroid_offset(shape):
    """From the middle of the bounding box to the centroid, in radii: (rows, columns)."""
    return (np.array(ndimage.center_of_mass(coverage(shape, (256, 256), 128, 512))) + 0.5 - 256) / 128


def _place(mask):
    side = mask.shape[0]
    row, column = (middle / side for middle in _bounding_box_middle(mask))
    if abs(row - 0.5) < PLACE_TOLERANCE and abs(column - 0.5) < PLACE_TOLERANCE:
        return "center"
    names = []
    for value, words in ((row, ("top", "bottom")), (column, ("left", "right"))):
        word = words[value > 0.5]
        if abs(min(value, 1 - value) - CORNER) >= PLACE_TOLERANCE:
            return None
        names.append(word)
    return " ".join(names)


def _colour(image, mask):
    pixels = image[_inner(mask)]
    middle = np.median(pixels, axis=0)
    hue, saturation, value = colorsys.rgb_to_hsv(*middle.tolist())
    uniform = (np.linalg.norm(pixels - middle, axis=1) < UNIFORM_DISTANCE).mean() >= UNIFORM
    if saturation < MIN_SATURATION or value < MIN_VALUE or not uniform:
        return None
    degrees = hue * 360
    for colour, (low, high) in HUES.items():
        if low <= degrees <= high or low <= degrees + 360 <= high:
            return colour
    return None
