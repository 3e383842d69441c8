"""Pictures from files and rows to float arrays of one size."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from imagereward_jax.data.errors import DataError, MissingDataError, missing_file

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_PIXELS = 89_478_485  # PIL's own threshold for a decompression bomb
CROPS = ("center", "random")


def find_picture(value, folder, where):
    """What a row says about its picture, made ready for `open_picture`, without reading it.

    Args:
        value: a path, the bytes of an encoded picture, a {"bytes", "path"} dict of `datasets`, a PIL image, or a
            uint8 array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4].
        folder: what a relative path is relative to, or None.
        where: file and row, for messages.
    Raises:
        DataError: no picture; MissingDataError: a path where there is no file.
    """
    if isinstance(value, dict) and ("bytes" in value or "path" in value):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and value.strip():
        path = Path(value).expanduser()
        path = path if folder is None else folder / path
        if not path.is_file():
            raise MissingDataError(f"{where}: {missing_file(path, 'picture')}")
        return path
    if isinstance(value, (bytes, Image.Image, np.ndarray)):
        return value
    raise DataError(f"{where}: expected a picture or the path of one; got {value!r}")


def open_picture(picture, where):
    """A decoded RGB PIL image, turned as its EXIF says; transparent parts become white.

    Raises:
        DataError: truncated, not a picture, or of more than `MAX_PIXELS` pixels; names file and row.
    """
    name = f"{where}: {picture}" if isinstance(picture, Path) else where
    try:
        image = _as_pil(picture)
        if image.width * image.height > MAX_PIXELS:
            raise DataError(
                f"{name}: {image.width} x {image.height} pixels are too many (at most {MAX_PIXELS:,}); shrink it first"
            )
        return _to_rgb(ImageOps.exif_transpose(image))
    except DataError:
        raise
    except Image.DecompressionBombError as e:
        raise DataError(f"{name}: the picture is too large (at most {MAX_PIXELS:,} pixels); shrink it first") from e
    except Exception as e:  # PIL raises OSError, SyntaxError, ValueError, struct.error, ... for broken files
        raise DataError(f"{name}: not a readable picture (truncated, or not a picture): {e}") from e


def _as_pil(picture):
    if isinstance(picture, Image.Image):
        return picture
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8:
            raise ValueError(f"expected an array of uint8; got {picture.dtype}")
        return Image.fromarray(picture[..., 0] if picture.ndim == 3 and picture.shape[2] == 1 else picture)
    return Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture)


def _to_rgb(image):
    if image.mode == "RGB":
        image.load()
        return image
    if image.mode.startswith("I;16"):  # PIL would cut 16-bit greys at 255 instead of scaling them
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def fit(image, size, *, crop="center", flip=False, rng=None):
    """The picture resized (bicubic, antialiased) so that its shorter side is `size`, and cropped to a square.

    Args:
        image: RGB PIL image.
        crop: "center", or "random" (needs `rng`).
        flip: mirror left and right, for half of the pictures (needs `rng`).
        rng: np.random.Generator.
    Returns:
        float32 [size, size, 3] in [0, 1].
    """
    return fit_and_locate(image, size, crop=crop, flip=flip, rng=rng)[0]


def fit_and_locate(image, size, *, crop="center", flip=False, rng=None):
    """The same picture as `fit` gives, and where it comes from, which SDXL is told.

    Returns:
        (picture, original_size, crop_top_left): int32 [2] each, (height, width) of `image` before it was resized, and
        (top, left) of the crop in the resized picture, in its mirror image if it was flipped.
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
