"""Contact sheets: images in a grid, each with a caption."""

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

LINE_HEIGHT = 13


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Rounds floating-point images in [0, 1] to uint8; images that are uint8 stay as they are."""
    images = np.asarray(images)
    if images.dtype == np.uint8:
        return images
    return np.clip(np.rint(images.astype(np.float32) * 255), 0, 255).astype(np.uint8)


def contact_sheet(
    images: np.ndarray, captions: Sequence[str], *, columns: int | None = None, smallest: int = 128, largest: int = 256
) -> Image.Image:
    """Draws a sheet of images with captions.

    Args:
        images: [N, H, W, 3] float in [0, 1].
        captions: N strings, "" for none; wrapped to the image's width, at most three lines.
        columns: by default as many as make the sheet nearly square.
        smallest, largest: small images are enlarged by whole factors to a width of at least `smallest` pixels, large
            ones shrunk to `largest`.

    Returns:
        A PIL image.
    """
    images = to_uint8(images)
    count, height, width, _ = images.shape
    columns = columns or int(np.ceil(np.sqrt(count)))
    factor = max(1, -(-smallest // width)) if width <= largest else largest / width
    size = (round(width * factor), round(height * factor))
    font = ImageFont.load_default(10)
    lines = [textwrap.wrap(caption, max(8, size[0] // 6))[:3] for caption in captions]
    text_height = LINE_HEIGHT * max((len(part) for part in lines), default=0)
    margin = 6
    cell = (size[0] + margin, size[1] + text_height + margin)
    rows = -(-count // columns)
    sheet = Image.new("RGB", (columns * cell[0] + margin, rows * cell[1] + margin), "white")
    draw = ImageDraw.Draw(sheet)
    for index in range(count):
        x, y = margin + index % columns * cell[0], margin + index // columns * cell[1]
        resample = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.LANCZOS
        sheet.paste(Image.fromarray(images[index]).resize(size, resample), (x, y))
        for row, line in enumerate(lines[index]):
            draw.text((x, y + size[1] + row * LINE_HEIGHT), line, fill="black", font=font)
    return sheet
