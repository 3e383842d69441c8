"""Images from files and rows, read by one rule for the whole package, and the two ways in which they become square.

Nothing else opens an image file. Every image is taken "as shown", for scoring, for training pairs and for a scorer's
training alike, because people judged and captioned what a viewer showed them: rotated as its EXIF says, transparent
parts white, 16 bits scaled to 8, floating point in [0, 1] alone, NaN and infinite pixels refused. Of an ordinary RGB
or grey image that is, to the bit, what the original ImageReward sees. The other rule, "original", does as the original
does with the others too: it ignores EXIF, shows the hidden colour of transparent parts, resizes palette images without
interpolation, and cuts 16-bit and floating-point values at 255. Both ignore colour profiles and refuse NaN.

`crop_square` is for everything that a reward model sees; `fit_and_locate` is for what a text-to-image model is trained
on: sizes are rounded, crops may be random.
"""

import contextlib
import functools
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from imagereward_jax.data.errors import DataError, ImageError, ImageNotFound, MissingDataError, missing_file
from imagereward_jax.terminal import say

# Pillow's names of raster formats whose decoders start no program (EPS and WMF do) and fetch nothing else. TGA comes
# last: it has no signature.
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "QOI", "TGA")
IMAGE_RULES = ("shown", "original")
MAX_PIXELS = 89_478_485  # Pillow's own threshold for a decompression bomb
CROPS = ("center", "random")
NAMED_AT_MOST = 5  # files left out of a folder that a message names

Encoded = Path | bytes | Image.Image | np.ndarray  # an image before it is decoded, as `find_image` returns it


@functools.cache
def readable_formats() -> tuple[str, ...]:
    """Returns those of `FORMATS` that this version of Pillow reads."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Returns the suffixes, in lower case, that Pillow gives to files of `readable_formats`."""
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in readable_formats())


def list_images(folder: Path) -> list[Path]:
    """Lists the images in a folder and below, by their suffixes; says on stderr which other files are left out.

    Hidden files and captions (a .txt of an image's stem) are not mentioned.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    found = [path for path in files if path.suffix.lower() in image_suffixes()]
    known = {*found, *(path.with_suffix(".txt") for path in found)}
    others = [path.relative_to(folder) for path in files if path not in known]
    others = [str(path) for path in others if not any(part.startswith(".") for part in path.parts)]
    if others:
        more = ", ..." if len(others) > NAMED_AT_MOST else ""
        say(
            f"warning: {folder}: {len(found)} images; {len(others)} other files are left out: "
            f"{', '.join(others[:NAMED_AT_MOST])}{more}",
            file=sys.stderr,
        )
    return found


def find_image(value: Any, folder: Path | None, where: str) -> Encoded:
    """Looks up the image that a row names or holds, without reading it.

    Args:
        value: a path, the bytes of an encoded image, a {"bytes", "path"} dict of `datasets`, a PIL image, or a
            uint8 array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4].
        folder: what a relative path is relative to, or None.
        where: file and row, for messages.

    Raises:
        DataError: not an image; MissingDataError: a path where there is no file.
    """
    if isinstance(value, dict) and ("bytes" in value or "path" in value):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and value.strip():
        path = Path(os.path.expanduser(value))
        path = path if folder is None else folder / path
        if not path.is_file():
            raise MissingDataError(f"{where}: {missing_file(path, 'image')}")
        return path
    if isinstance(value, (bytes, Image.Image, np.ndarray)):
        return value
    raise DataError(f"{where}: expected an image or the path of one; got {value!r}")


def open_image(image: Any, where: str = "", rule: str = "shown") -> Image.Image:
    """Reads an image as RGB.

    Args:
        image: a path, the bytes of an encoded image, a PIL image, or an array [H, W], [H, W, 1], [H, W, 3] or
            [H, W, 4]: uint8, uint16, or floating point in [0, 1] (rounded to 8 bits, as a saved image would be).
        where: file and row, for messages.
        rule: "shown" or "original", see the module.

    Raises:
        ImageError: the image is broken, of a format that is not read, empty, of more than `MAX_PIXELS` pixels, has
            pixels that are NaN or infinite, or is an array of another shape, dtype or range; names file and row.
        ImageNotFound: there is no such file.
    """
    with _naming(image, where, rule):
        return _read(image, rule).convert("RGB")


def open_bounded(encoded: bytes, max_pixels: int, where: str = "") -> Image.Image:
    """Opens an encoded image and checks its size without decoding it, which `open_image` and `open_square` do then.

    Raises:
        ImageError: as `open_image`, with `max_pixels` as the bound.
    """
    with _naming(encoded, where, "shown"):
        image = Image.open(io.BytesIO(encoded), formats=readable_formats())
        _check_size(image, max_pixels)
        return image


def shown_size(image: Any, where: str = "") -> tuple[int, int]:
    """Height and width of an image as `open_image` shows it, from its header alone if it is a file.

    Raises:
        ImageError, ImageNotFound: as `open_image`, for what the header tells.
    """
    with _naming(image, where, "shown"):
        if isinstance(image, (str, os.PathLike, bytes)):
            image = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=readable_formats())
        elif not isinstance(image, Image.Image):
            return as_array(image).shape[:2]
        turned = False
        with contextlib.suppress(Exception):  # as in `_as_shown`
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        return image.size if turned else image.size[::-1]


def open_square(image: Any, size: int, where: str = "", rule: str = "shown", *, rgb_first: bool = False) -> np.ndarray:
    """Reads an image and crops it as reward models see it: `crop_square`.

    Raises:
        ImageError: as `open_image`; also an image too long and thin to be resized.
    """
    with _naming(image, where, rule):
        return crop_square(_read(image, rule), size, rgb_first=rgb_first)


@contextlib.contextmanager
def _naming(image, where, rule) -> Iterator[None]:
    """Turns errors of Pillow, and those without a name, into one that names file and row."""
    if rule not in IMAGE_RULES:
        raise ValueError(f"image_rule must be one of {', '.join(IMAGE_RULES)}; got {rule!r}")
    path = os.fsdecode(image if isinstance(image, (str, os.PathLike)) else getattr(image, "filename", None) or "")
    name = ": ".join(dict.fromkeys(part for part in (where, path) if part)) or "the image"
    try:
        yield
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from error
    except FileNotFoundError as error:
        raise ImageNotFound(f"{name}: no such image") from error
    except UnidentifiedImageError as error:
        formats = ", ".join(readable_formats())
        raise ImageError(f"{name}: not a readable image (cut short, or none of {formats})") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: the image is too large (at most {MAX_PIXELS:,} pixels); scale it down") from error
    except Exception as error:  # decoders raise RuntimeError, SyntaxError, struct.error, ... for broken files
        if isinstance(error, OSError) and error.errno is not None:
            raise ImageError(f"{name}: cannot be read ({error.strerror})") from error
        raise ImageError(f"{name}: the image is broken or cut short ({error})") from error


def _read(image, rule):
    """Decodes an image: RGB as shown, or in its own mode by the original's rule."""
    if isinstance(image, (str, os.PathLike, bytes)):
        image = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=readable_formats())
    elif not isinstance(image, Image.Image):
        image = Image.fromarray(_as_uint8(as_array(image)))
    _check_size(image, MAX_PIXELS)
    image.load()
    if image.mode == "F":
        _check_finite(np.asarray(image))
    return _as_shown(image) if rule == "shown" else image


def _check_size(image, max_pixels):
    if min(image.size) < 1:
        raise ImageError(f"the image is empty ({image.width} x {image.height} pixels)")
    if image.width * image.height > max_pixels:
        raise ImageError(f"{image.width} x {image.height} pixels are too many (at most {max_pixels:,}); scale it down")


def _as_shown(image):
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _in_8_bits(image)
    # A damaged EXIF block says nothing of a rotation, and viewers show such an image as it is stored.
    with contextlib.suppress(Exception):
        image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _in_8_bits(image):
    """Scales grey values of 16 bits or floating point, where Pillow would cut them at 255; keeps the EXIF block."""
    array, info = np.asarray(image), dict(image.info)
    transparent = info.pop("transparency", None)
    if image.mode == "I" and image.format in ("PNG", "PPM"):  # which have no values of more than 16 bits
        array = array.astype(np.uint16)
    if getattr(image, "tag_v2", {}).get(258) == (12,):  # a TIFF's bits per sample, which Pillow does not scale to 16
        array = array * 16 + array // 256
    grey = Image.fromarray(_as_uint8(array))
    if transparent is not None:
        grey.putalpha(Image.fromarray(np.where(array == transparent, 0, 255).astype(np.uint8)))
    grey.info = info
    return grey


def as_array(image: Any) -> np.ndarray:
    """Returns an array of pixels as NumPy's.

    Raises:
        ImageError: it is not numeric, or has fewer than two axes.
    """
    try:
        array = np.asarray(image)
    except Exception as error:  # whatever a foreign array type raises when it cannot become a numpy array
        raise ImageError(f"cannot be read as an array ({error})") from error
    if array.dtype.kind not in "buifV" or array.ndim < 2:
        kind = type(image).__name__ if array.dtype.kind in "OUS" else f"array of shape {array.shape}"
        raise ImageError(f"expected a PIL image, a path, or an array [H, W, 3], not {kind}")
    return array


def _as_uint8(array):
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (3, 4)):
        hint = "; move the channels last" if array.ndim == 3 and array.shape[0] in (1, 3, 4) else ""
        raise ImageError(f"expected an array [H, W], [H, W, 3] or [H, W, 4], not {list(array.shape)}{hint}")
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype.kind == "u" and array.itemsize == 2:
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
        raise ImageError(
            f"expected pixels of 8 bits (0 to 255), 16 bits (0 to 65535) or floating point in [0, 1], not {array.dtype}"
        )
    array = array.astype(np.float32)
    _check_finite(array)
    low, high = (array.min(), array.max()) if array.size else (0, 0)
    if low < 0 or high > 1:
        hint = "; map it by image / 2 + 0.5" if -1.01 <= low < 0 and high <= 1.01 else ""
        raise ImageError(f"floating-point images must lie in [0, 1], this one in [{low:.4g}, {high:.4g}]{hint}")
    return np.round(array * 255).astype(np.uint8)


def _check_finite(array):
    if not np.isfinite(array).all():
        raise ImageError(f"NaN or infinite pixel values ({np.count_nonzero(~np.isfinite(array)):,})")


def resized_shape(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width once the shorter side is `size`; the longer is rounded down, as torchvision does."""
    if height <= width:
        return size, int(size * width / height)
    return int(size * height / width), size


def crop_offset(length: int, size: int) -> int:
    """Start of a centred crop (halves round to even, as torchvision does)."""
    return round((length - size) / 2.0)


def state_of(path: str | os.PathLike) -> str:
    """What changes when a file's content does: its size and the time of its last change."""
    status = os.stat(path)
    return f"{status.st_size}-{status.st_mtime_ns}"


def crop_square(image: Image.Image, size: int, *, rgb_first: bool = False) -> np.ndarray:
    """Resizes the shorter side to `size`, crops the centre, then converts to RGB, as the original ImageReward does.

    The resize (Pillow's bicubic) is done in the image's own mode, which by the rule "shown" is RGB.

    Args:
        rgb_first: converts to RGB before the resize and rounds crop offsets down, as transformers does.

    Returns:
        uint8 [size, size, 3].

    Raises:
        ImageError: the image is so long that resizing would not fit in memory, or of a mode that Pillow cannot resize.
    """
    width, height = image.size
    new_height, new_width = resized_shape(height, width, size)
    if Image.MAX_IMAGE_PIXELS and new_height * new_width > 2 * Image.MAX_IMAGE_PIXELS:
        raise ImageError(
            f"{width} x {height} pixels is too long and thin; with its shorter side at {size} pixels it would be "
            f"{new_width} x {new_height}. Crop it first"
        )
    left, top = crop_offset(new_width, size), crop_offset(new_height, size)
    try:
        if rgb_first:
            image = image.convert("RGB")
            left, top = (new_width - size) // 2, (new_height - size) // 2
        if (new_width, new_height) != image.size:
            image = image.resize((new_width, new_height), Image.Resampling.BICUBIC)
        return np.asarray(image.crop((left, top, left + size, top + size)).convert("RGB"))
    except (ValueError, OSError) as error:
        raise ImageError(f"Pillow cannot resize an image of mode {image.mode} ({error})") from error


def fit_and_locate(
    image: Image.Image,
    size: int | tuple[int, int],
    *,
    crop: str = "center",
    flip: bool = False,
    rng: np.random.Generator | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Resizes an image until it covers `size` (bicubic, antialiased) and crops it, for training a generator.

    Not for reward models, which see `crop_square`.

    Args:
        image: RGB PIL image.
        size: (height, width), or the side of a square.
        crop: "center", or "random" (needs `rng`).
        flip: mirrors half of the images left to right (needs `rng`).

    Returns:
        (image, original_size, crop_top_left): float32 [height, width, 3] in [0, 1]; int32 [2] each, (height, width) of
        `image` before it was resized, and (top, left) of the crop in the resized image, or in its mirror image if it
        was flipped. SDXL is conditioned on both.
    """
    original_size = np.array([image.height, image.width], np.int32)
    tall, wide = (size, size) if isinstance(size, int) else size
    scale = max(tall / image.height, wide / image.width)
    width, height = max(wide, round(image.width * scale)), max(tall, round(image.height * scale))
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - wide) // 2, (height - tall) // 2
    if crop == "random":
        left, top = int(rng.integers(width - wide + 1)), int(rng.integers(height - tall + 1))
    array = np.asarray(image.crop((left, top, left + wide, top + tall)), np.float32) / np.float32(255)
    if flip and rng.random() < 0.5:
        array, left = array[:, ::-1].copy(), width - wide - left
    return array, original_size, np.array([top, left], np.int32)
