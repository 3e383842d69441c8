"""Images from files and rows, and the two ways in which they become square.

`crop_square` is the original ImageReward's preprocessing, for everything that a reward model sees, in training and in
scoring alike. `fit_and_locate` is for what a text-to-image model is trained on: EXIF rotation is applied and
transparent parts become white (`open_image`), sizes are rounded, crops may be random.
"""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from imagereward_jax.data.errors import DataError, MissingDataError, missing_file

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_PIXELS = 89_478_485  # Pillow's own threshold for a decompression bomb
CROPS = ("center", "random")

Encoded = Path | bytes | Image.Image | np.ndarray  # an image before it is decoded, as `find_image` returns it


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
        path = Path(value).expanduser()
        path = path if folder is None else folder / path
        if not path.is_file():
            raise MissingDataError(f"{where}: {missing_file(path, 'image')}")
        return path
    if isinstance(value, (bytes, Image.Image, np.ndarray)):
        return value
    raise DataError(f"{where}: expected an image or the path of one; got {value!r}")


def open_image(image: Encoded, where: str) -> Image.Image:
    """Decodes an image to RGB, rotated as its EXIF says; transparent parts become white.

    Raises:
        DataError: truncated, not an image, or of more than `MAX_PIXELS` pixels; names file and row.
    """
    with _naming(image, where):
        return _to_rgb(ImageOps.exif_transpose(_decode(image)))


def open_square(image: Encoded, size: int, where: str) -> np.ndarray:
    """Decodes an image and crops it as reward models see it: `crop_square`.

    Raises:
        DataError: as `open_image`; also an image too long and thin to be resized.
    """
    with _naming(image, where):
        return crop_square(_decode(image), size)


@contextlib.contextmanager
def _naming(image, where) -> Iterator[None]:
    """Turns errors of Pillow into one that names file and row."""
    name = f"{where}: {image}" if isinstance(image, Path) else where
    try:
        yield
    except DataError as e:
        raise DataError(f"{name}: {e}") from e
    except Image.DecompressionBombError as e:
        raise DataError(f"{name}: the image is too large (at most {MAX_PIXELS:,} pixels); shrink it first") from e
    except Exception as e:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, ... for broken files
        raise DataError(f"{name}: not a readable image (truncated, or not an image): {e}") from e


def _decode(image):
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise DataError(f"expected an array of uint8; got {image.dtype}")
        image = Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image)
    elif not isinstance(image, Image.Image):
        image = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)
    if min(image.size) < 1:
        raise DataError(f"the image is empty ({image.width} x {image.height} pixels)")
    if image.width * image.height > MAX_PIXELS:
        raise DataError(f"{image.width} x {image.height} pixels are too many (at most {MAX_PIXELS:,}); shrink it first")
    image.load()
    return image


def _to_rgb(image):
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):  # Pillow would cut 16-bit greys at 255 instead of scaling them
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def resized_shape(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width once the shorter side is `size`; the longer is rounded down, as torchvision does."""
    if height <= width:
        return size, int(size * width / height)
    return int(size * height / width), size


def crop_offset(length: int, size: int) -> int:
    """Start of a centred crop (halves round to even, as torchvision does)."""
    return round((length - size) / 2.0)


def crop_square(image: Image.Image, size: int, *, rgb_first: bool = False) -> np.ndarray:
    """Resizes the shorter side to `size`, crops the centre, then converts to RGB, as the original ImageReward does.

    The resize (Pillow's bicubic) is done in the image's own mode; EXIF rotation is ignored, and of transparent parts
    the hidden colour shows.

    Args:
        rgb_first: converts to RGB before the resize and rounds crop offsets down, as transformers does.

    Returns:
        uint8 [size, size, 3].

    Raises:
        DataError: the image is so long that resizing would not fit in memory, or of a mode that Pillow cannot resize.
    """
    width, height = image.size
    new_height, new_width = resized_shape(height, width, size)
    if Image.MAX_IMAGE_PIXELS and new_height * new_width > 2 * Image.MAX_IMAGE_PIXELS:
        raise DataError(
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
        raise DataError(f"Pillow cannot resize an image of mode {image.mode} ({error})") from error


def fit_and_locate(
    image: Image.Image, size: int, *, crop: str = "center", flip: bool = False, rng: np.random.Generator | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Resizes the shorter side to `size` (bicubic, antialiased) and crops a square, for training a generator.

    Not for reward models, which see `crop_square`.

    Args:
        image: RGB PIL image.
        crop: "center", or "random" (needs `rng`).
        flip: mirrors half of the images left to right (needs `rng`).

    Returns:
        (image, original_size, crop_top_left): float32 [size, size, 3] in [0, 1]; int32 [2] each, (height, width) of
        `image` before it was resized, and (top, left) of the crop in the resized image, or in its mirror image if it
        was flipped. SDXL is conditioned on both.
    """
    original_size = np.array([image.height, image.width], np.int32)
    scale = size / min(image.size)
    width, height = (max(size, round(length * scale)) for length in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    if crop == "random":
        left, top = int(rng.integers(width - size + 1)), int(rng.integers(height - size + 1))
    array = np.asarray(image.crop((left, top, left + size, top + size)), np.float32) / np.float32(255)
    if flip and rng.random() < 0.5:
        array, left = array[:, ::-1].copy(), width - size - left
    return array, original_size, np.array([top, left], np.int32)
