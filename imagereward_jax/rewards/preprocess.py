"""Images as the reward networks see them: shorter side resized, centre cropped, normalised with CLIP's statistics.

Two ways in. `host_pixels` follows the original ImageReward step by step (`data.images.open_square`, which training a
scorer uses too) and is what `score` uses. `device_pixels` does the same to arrays inside a compiled, differentiable
program; it differs in that nothing is rounded to 8 bits. HPSv2 fits the whole image into the square instead (the
`_padded` pair); AlignProp's aesthetic reward resizes bilinearly and takes square images alone (the `_bilinear` pair).
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from imagereward_jax.data.errors import ImageError, ImageNotFound
from imagereward_jax.data.images import as_array, crop_offset, open_image, open_square, resized_shape

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation of pixels, by channel
CLIP_STATISTICS: Statistics = (CLIP_MEAN, CLIP_STD)


def as_image_list(images: Any) -> tuple[list, bool]:
    """Lists the images that a user passed; returns (list, whether it was a single one).

    A single image is a PIL image, a path, or an array with two or three axes; several are a list or tuple of
    those, or an array [B, H, W, C].

    Raises:
        ImageError: the list is empty, or not one of images.
        ImageNotFound: a path leads nowhere. Images are opened later, so that long lists fit in memory.
    """
    if isinstance(images, (str, os.PathLike, Image.Image)):
        images, single = [images], True
    elif isinstance(images, (list, tuple)):
        images, single = list(images), False
    else:
        array = as_array(images)
        images, single = (list(array), False) if array.ndim == 4 else ([array], True)
    if not images:
        raise ImageError("the list of images is empty; pass at least one")
    for image in images:
        if isinstance(image, (str, os.PathLike)) and not Path(image).is_file():
            what = "is a folder, not an image" if Path(image).is_dir() else "no such image"
            raise ImageNotFound(f"{image}: {what}")
    return images, single


def host_pixels(
    image: Any,
    size: int,
    name: str = "",
    rule: str = "shown",
    *,
    rgb_first: bool = False,
    statistics: Statistics = CLIP_STATISTICS,
) -> np.ndarray:
    """Preprocesses one image as the original ImageReward does: normalised float32 [size, size, 3].

    Args:
        image, name, rule: see `data.images.open_image`.
        rgb_first: see `data.images.crop_square`. statistics: to normalise by.

    Raises:
        ImageError: see `data.images.open_square`.
    """
    pixels = open_square(image, size, name, rule, rgb_first=rgb_first)
    return _normalise(pixels.astype(np.float32) / 255, statistics, np)


def host_pixels_padded(
    image: Any, size: int, name: str = "", rule: str = "shown", *, statistics: Statistics = CLIP_STATISTICS
) -> np.ndarray:
    """Preprocesses one image as HPSv2 does: all of it, its longer side resized, the rest filled with black.

    Args:
        image, name, rule: see `data.images.open_image`.

    Returns:
        Normalised float32 [size, size, 3]. Resized in floating point (antialiased bicubic), and not clipped.

    Raises:
        ImageError: see `data.images.open_image`.
    """
    pixels = np.asarray(open_image(image, name, rule), np.float32) / 255
    height, width = fitted_shape(*pixels.shape[:2], size)
    if (height, width) != pixels.shape[:2]:
        planes = [Image.fromarray(pixels[..., channel]) for channel in range(3)]
        planes = [np.asarray(plane.resize((width, height), Image.Resampling.BICUBIC)) for plane in planes]
        pixels = np.stack(planes, axis=-1)
    return _normalise(np.pad(pixels, _margins(height, width, size)), statistics, np)


def host_pixels_bilinear(
    image: Any,
    size: int,
    name: str = "",
    rule: str = "shown",
    *,
    antialias: bool,
    statistics: Statistics = CLIP_STATISTICS,
) -> np.ndarray:
    """Preprocesses one image as AlignProp (arXiv 2310.03739) does: resized bilinearly in floating point, not cropped.

    Args:
        image, name, rule: see `data.images.open_image`.
        antialias: whether all pixels under an output pixel count, or just the four around its centre.

    Returns:
        Normalised float32 [size, size, 3].

    Raises:
        ImageError: the image is not square; or see `data.images.open_image`.
    """
    pixels = np.asarray(open_image(image, name, rule), np.float32)[None] / 255
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return np.asarray(device_pixels_bilinear(pixels, size, antialias=antialias, statistics=statistics)[0])


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


def device_pixels_bilinear(
    images: jax.Array, size: int, *, antialias: bool, statistics: Statistics = CLIP_STATISTICS
) -> jax.Array:
    """Preprocesses a batch of arrays as `host_pixels_bilinear` does; see `device_pixels`.

    Raises:
        ImageError: the images are not square; or see `device_pixels`.
    """
    _check_batch(images)
    if images.shape[1] != images.shape[2]:
        raise ImageError(
            f"AlignProp's aesthetic score takes square images, not {images.shape[2]} x {images.shape[1]}: it crops "
            "nothing; take the score 'Aesthetic'"
        )
    shape = (images.shape[0], size, size, 3)
    images = jax.image.resize(images.astype(jnp.float32), shape, "linear", antialias=antialias)
    return _normalise(images, statistics, jnp)


class Preprocess(NamedTuple):
    """The preprocessing of a network.

    host: (image, size, name, rule) -> normalised float32 [size, size, 3], exactly as the network's authors do it.
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
BILINEAR, BILINEAR_ANTIALIASED = (
    Preprocess(
        functools.partial(host_pixels_bilinear, antialias=antialias),
        functools.partial(device_pixels_bilinear, antialias=antialias),
    )
    for antialias in (False, True)
)
