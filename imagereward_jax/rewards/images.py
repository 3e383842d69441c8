"""Pictures as the reward networks see them: shorter side resized, centre cropped, normalised with CLIP's statistics.

Two ways in. `host_pixels` follows the original ImageReward step by step (Pillow, in the picture's own mode) and is
what `score` uses. `device_pixels` does the same to arrays inside a compiled, differentiable program; it differs in
that nothing is rounded to 8 bits.
"""

import os
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, UnidentifiedImageError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class ImageError(ValueError):
    """A picture cannot be used; the message names it and says why."""


class ImageNotFound(ImageError, FileNotFoundError):
    """There is no such picture file."""


def as_image_list(images):
    """What a user passes as images, as (list, whether it was a single one).

    A single picture is a PIL image, a path, or an array with two or three axes; several are a list or tuple of
    those, or an array [B, H, W, C].

    Raises:
        ImageError: the list is empty.
        ImageNotFound: a path leads nowhere. Pictures are opened later, so that long lists fit in memory.
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
            what = "is a folder, not a picture" if Path(image).is_dir() else "no such picture"
            raise ImageNotFound(f"{image}: {what}")
    return images, single


def open_image(image, name="image"):
    """A PIL image, whole in memory, from a PIL image, a path, or an array.

    Args:
        image: arrays are [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], uint8 or floating point in [0, 1] (rounded to
            8 bits, as a saved picture would be).
        name: how an error names anything but a path.

    Raises:
        ImageError: the picture is missing, broken, too large, or an array of another shape, dtype or range.
    """
    if isinstance(image, (str, os.PathLike)):
        return _open_file(image)
    if not isinstance(image, Image.Image):
        return Image.fromarray(_as_uint8(_as_array(image, name), name))
    try:
        image.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise ImageError(f"{getattr(image, 'filename', '') or name}: the picture is broken ({error})") from error
    return image


def _open_file(path):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path)
        image.load()
    except FileNotFoundError as error:
        raise ImageNotFound(f"{path}: no such picture") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path}: the picture is too large ({error}); scale it down first") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{path}: not a picture of a format that Pillow reads") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise ImageError(f"{path}: the picture is broken or cut short ({error})") from error
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


def resized_shape(height, width, size):
    """Height and width once the shorter side is `size`; the longer is rounded down, as torchvision does."""
    if height <= width:
        return size, int(size * width / height)
    return int(size * height / width), size


def crop_offset(length, size):
    """Where a centred crop starts (halves round to even, as torchvision does)."""
    return round((length - size) / 2.0)


def host_pixels(image, size, name="image"):
    """One picture, as the original preprocesses it: normalised float32 [size, size, 3].

    Args:
        image: whatever `open_image` takes.

    Raises:
        ImageError: see `open_image`; also a picture with an empty side, or so long that resizing would not fit.
    """
    picture = open_image(image, name)
    name = image if isinstance(image, (str, os.PathLike)) else name
    width, height = picture.size
    if min(width, height) < 1:
        raise ImageError(f"{name}: the picture is empty ({width} x {height} pixels)")
    new_height, new_width = resized_shape(height, width, size)
    if Image.MAX_IMAGE_PIXELS and new_height * new_width > 2 * Image.MAX_IMAGE_PIXELS:
        raise ImageError(
            f"{name}: {width} x {height} pixels is too long and thin; with its shorter side at {size} pixels it "
            f"would be {new_width} x {new_height}. Crop it first"
        )
    try:
        if (new_width, new_height) != picture.size:
            picture = picture.resize((new_width, new_height), Image.Resampling.BICUBIC)
        left, top = crop_offset(new_width, size), crop_offset(new_height, size)
        picture = picture.crop((left, top, left + size, top + size)).convert("RGB")
    except (ValueError, OSError) as error:
        raise ImageError(f"{name}: Pillow cannot resize a picture of mode {picture.mode} ({error})") from error
    pixels = np.asarray(picture, dtype=np.float32) / 255
    return (pixels - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)


def device_pixels(images, size):
    """The same for a batch of arrays, differentiable and to be compiled.

    Args:
        images: [B, H, W, 3] floating point in [0, 1].

    Returns:
        Normalised float32 [B, size, size, 3]. Antialiased bicubic (a = -0.5, as Pillow's); overshoot is not
        clipped, which would cut the gradient.

    Raises:
        ImageError: the shape or dtype is another.
    """
    if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
        raise ImageError(f"expected images [B, H, W, 3], not {list(images.shape)}")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ImageError(f"expected floating-point images in [0, 1], not {images.dtype}; divide uint8 by 255")
    batch, height, width, channels = images.shape
    new_height, new_width = resized_shape(height, width, size)
    images = images.astype(jnp.float32)
    if (new_height, new_width) != (height, width):
        images = jax.image.resize(images, (batch, new_height, new_width, channels), "cubic", antialias=True)
    top, left = crop_offset(new_height, size), crop_offset(new_width, size)
    images = images[:, top : top + size, left : left + size]
    return (images - jnp.float32(CLIP_MEAN)) / jnp.float32(CLIP_STD)
