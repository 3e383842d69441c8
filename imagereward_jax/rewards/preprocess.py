"""Images as the reward networks see them: shorter side resized, centre cropped, normalised with CLIP's statistics.

Two ways in. `host_pixels` follows the original ImageReward step by step (`data.images.crop_square`, which training a
scorer uses too) and is what `score` uses. `device_pixels` does the same to arrays inside a compiled, differentiable
program; it differs in that nothing is rounded to 8 bits. HPSv2 fits the whole image into the square instead (the
`_padded` pair).
"""

import functools
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, UnidentifiedImageError

from imagereward_jax.data.errors import DataError
from imagereward_jax.data.images import crop_offset, crop_square, resized_shape

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation of pixels, by channel
CLIP_STATISTICS: Statistics = (CLIP_MEAN, CLIP_STD)


class ImageError(ValueError):
    """An image cannot be used; the message names it and says why."""


class ImageNotFound(ImageError, FileNotFoundError):
    """There is no such image file."""


def as_image_list(images: Any) -> tuple[list, bool]:
    """Lists the images that a user passed; returns (list, whether it was a single one).

    A single image is a PIL image, a path, or an array with two or three axes; several are a list or tuple of
    those, or an array [B, H, W, C].

    Raises:
        ImageError: the list is empty.
        ImageNotFound: a path leads nowhere. Images are opened later, so that long lists fit in memory.
    """
    if isinstance(images, (str, os.PathLike, Image.Image)):
        images, single = [images], True
    elif isinstance(images, (list, tuple)):
        images, single = list(images), False
    else:
        array = _as_array(images, "the image")
        images, single = (list(array), False) if array.ndim == 4 else ([array], True)
    if not images:
        raise ImageError("the list of images is empty; pass at least one")
    for image in images:
        if isinstance(image, (str, os.PathLike)) and not Path(image).is_file():
            what = "is a folder, not an image" if Path(image).is_dir() else "no such image"
            raise ImageNotFound(f"{image}: {what}")
    return images, single


def open_image(image: Any, name: str = "image") -> Image.Image:
    """Opens a PIL image, a path or an array as a PIL image that is whole in memory.

    Args:
        image: arrays are [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], uint8 or floating point in [0, 1] (rounded to
            8 bits, as a saved image would be).
        name: how an error names anything but a path.

    Raises:
        ImageError: the image is missing, broken, too large, or an array of another shape, dtype or range.
    """
    if isinstance(image, (str, os.PathLike)):
        return _open_file(image)
    if not isinstance(image, Image.Image):
        return Image.fromarray(_as_uint8(_as_array(image, name), name))
    try:
        image.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise ImageError(f"{getattr(image, 'filename', '') or name}: the image is broken ({error})") from error
    return image


def _open_file(path):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path)
        image.load()
    except FileNotFoundError as error:
        raise ImageNotFound(f"{path}: no such image") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path}: the image is too large ({error}); scale it down first") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{path}: not an image of a format that Pillow reads") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise ImageError(f"{path}: the image is broken or cut short ({error})") from error
    return image


def _as_array(image, name):
    try:
        array = np.asarray(image)
    except Exception as error:  # whatever a foreign array type raises when it cannot become a numpy array
        raise ImageError(f"{name}: cannot be read as an array ({error})") from error
    if array.dtype.kind not in "buifV" or array.ndim < 2:
        kind = type(image).__name__ if array.dtype.kind in "OUS" else f"array of shape {array.shape}"
        raise ImageError(f"{name}: expected a PIL image, a path, or an array [H, W, 3], not {kind}")
    return array


def _as_uint8(array, name):
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (3, 4)):
        hint = "; move the channels last" if array.ndim == 3 and array.shape[0] in (1, 3, 4) else ""
        raise ImageError(f"{name}: expected an array [H, W], [H, W, 3] or [H, W, 4], not {list(array.shape)}{hint}")
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
        raise ImageError(f"{name}: expected uint8 in [0, 255] or floating point in [0, 1], not {array.dtype}")
    array = array.astype(np.float32)
    low, high = (array.min(), array.max()) if array.size else (0, 0)
    if not (low >= 0 and high <= 1):  # also catches NaN
        hint = "; map it by image / 2 + 0.5" if -1.01 <= low < 0 and high <= 1.01 else ""
        raise ImageError(f"{name}: floating-point images must lie in [0, 1], this one in [{low:.4g}, {high:.4g}]{hint}")
    return np.round(array * 255).astype(np.uint8)


def host_pixels(
    image: Any,
    size: int,
    name: str | os.PathLike = "image",
    *,
    rgb_first: bool = False,
    statistics: Statistics = CLIP_STATISTICS,
) -> np.ndarray:
    """Preprocesses one image as the original ImageReward does: normalised float32 [size, size, 3].

    Args:
        image: whatever `open_image` takes.
        rgb_first: see `data.images.crop_square`. statistics: to normalise by.

    Raises:
        ImageError: see `open_image`; also an image with an empty side, or so long that resizing would not fit.
    """
    opened, name = _open_named(image, name)
    try:
        pixels = crop_square(opened, size, rgb_first=rgb_first)
    except DataError as error:
        raise ImageError(f"{name}: {error}") from error
    return _normalise(pixels.astype(np.float32) / 255, statistics, np)


def host_pixels_padded(
    image: Any, size: int, name: str | os.PathLike = "image", *, statistics: Statistics = CLIP_STATISTICS
) -> np.ndarray:
    """Preprocesses one image as HPSv2 does: all of it, its longer side resized, the rest filled with black.

    Args:
        image: whatever `open_image` takes.

    Returns:
        Normalised float32 [size, size, 3]. Resized in floating point (antialiased bicubic), and not clipped.

    Raises:
        ImageError: see `open_image`; also an image with an empty side.
    """
    opened, name = _open_named(image, name)
    try:
        pixels = np.asarray(opened.convert("RGB"), np.float32) / 255
    except (ValueError, OSError) as error:
        raise ImageError(f"{name}: Pillow cannot convert an image of mode {opened.mode} ({error})") from error
    height, width = fitted_shape(*pixels.shape[:2], size)
    if (height, width) != pixels.shape[:2]:
        planes = [Image.fromarray(pixels[..., channel]) for channel in range(3)]
        planes = [np.asarray(plane.resize((width, height), Image.Resampling.BICUBIC)) for plane in planes]
        pixels = np.stack(planes, axis=-1)
    return _normalise(np.pad(pixels, _margins(height, width, size)), statistics, np)


def _open_named(image, name):
    """Opens an image; returns it and how an error names it. Refuses empty ones."""
    opened = open_image(image, name)
    name = image if isinstance(image, (str, os.PathLike)) else name
    if min(opened.size) < 1:
        raise ImageError(f"{name}: the image is empty ({opened.size[0]} x {opened.size[1]} pixels)")
    return opened, name


def fitted_shape(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width once the longer side is `size`; the shorter is rounded, to at least one pixel."""
    scale = size / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def _margins(height, width, size):
    """Padding for [height, width, 3] that makes it square."""
    top, left = (size - height) // 2, (size - width) // 2
    return (top, size - height - top), (left, size - width - left), (0, 0)


def _normalise(pixels, statistics, numpy):
    mean, std = map(numpy.float32, statistics)
    return (pixels - mean) / std


def _check_batch(images):
    if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
        raise ImageError(f"expected images [B, H, W, 3], not {list(images.shape)}")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ImageError(f"expected floating-point images in [0, 1], not {images.dtype}; divide uint8 by 255")


def _resize(images, height, width):
    if (height, width) == images.shape[1:3]:
        return images.astype(jnp.float32)
    shape = (images.shape[0], height, width, images.shape[3])
    return jax.image.resize(images.astype(jnp.float32), shape, "cubic", antialias=True)


def device_pixels(images: jax.Array, size: int, *, statistics: Statistics = CLIP_STATISTICS) -> jax.Array:
    """Preprocesses a batch of arrays as `host_pixels` does; differentiable, to be compiled.

    Args:
        images: [B, H, W, 3] floating point in [0, 1].

    Returns:
        Normalised float32 [B, size, size, 3]. Antialiased bicubic (a = -0.5, as Pillow's); overshoot is not
        clipped, which would cut the gradient.

    Raises:
        ImageError: the shape or dtype is another.
    """
    _check_batch(images)
    height, width = resized_shape(*images.shape[1:3], size)
    images = _resize(images, height, width)
    top, left = crop_offset(height, size), crop_offset(width, size)
    return _normalise(images[:, top : top + size, left : left + size], statistics, jnp)


def device_pixels_padded(images: jax.Array, size: int, *, statistics: Statistics = CLIP_STATISTICS) -> jax.Array:
    """Preprocesses a batch of arrays as `host_pixels_padded` does; see `device_pixels`."""
    _check_batch(images)
    height, width = fitted_shape(*images.shape[1:3], size)
    images = _resize(images, height, width)
    return _normalise(jnp.pad(images, ((0, 0), *_margins(height, width, size))), statistics, jnp)


class Preprocess(NamedTuple):
    """The preprocessing of a network.

    host: (image, size, name) -> normalised float32 [size, size, 3], exactly as the network's authors do it.
    device: (images [B, H, W, 3] in [0, 1], size) -> normalised [B, size, size, 3], differentiable.
    """

    host: Callable[..., np.ndarray]
    device: Callable[[jax.Array, int], jax.Array]

    def normalised_by(self, statistics: Statistics) -> "Preprocess":
        """The same with another mean and deviation of the pixels."""
        return Preprocess(*(functools.partial(function, statistics=statistics) for function in self))


CROP = Preprocess(host_pixels, device_pixels)
RGB_CROP = Preprocess(functools.partial(host_pixels, rgb_first=True), device_pixels)
PAD = Preprocess(host_pixels_padded, device_pixels_padded)
