"""Images with their captions, as a random-access source for training text-to-image models.

Resized for the VAE (`images.fit_and_locate`), not as reward models see images (`images.crop_square`).
"""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from imagereward_jax.data import images
from imagereward_jax.data.errors import DataError
from imagereward_jax.data.prompts import PROMPT_COLUMNS, SHAPES_PREFIX, shapes_captions
from imagereward_jax.data.shapes.sources import ShapesPairs
from imagereward_jax.data.tables import Table, check_texts, column_values, pick_column, read_file, read_table, read_text

IMAGE_COLUMNS = ("image", "image_path", "file_name", "path", "file")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SHAPES_SIZE = 20_000


def load_pairs(
    source: str | os.PathLike,
    *,
    image_column: str | None = None,
    text_column: str | None = None,
    prompt: str | None = None,
    image_size: int = 64,
    crop: str = "center",
    flip: bool = False,
    split: str = "train",
    shapes: dict[str, Any] | None = None,
) -> "Pairs | ShapesPairs":
    """Loads image-text pairs: item i is {"image", "prompt", "original_size", "crop_top_left"}.

    The image is float32 [S, S, 3] in [0, 1]; the sizes are as `images.fit_and_locate` returns them.

    Args:
        source: a table as for `load_prompts`, whose image column holds paths relative to the file (or absolute), or
            images (Parquet, `datasets`, TFDS); a folder of images with metadata.jsonl, metadata.csv or
            metadata.parquet (file_name and text), or with a .txt of the same stem beside each; "shapes:train".
        image_column: by default the first of image, image_path, file_name, path, file that is there.
        text_column: by default the first of text, prompt, caption.
        prompt: the caption of every image, which then needs none of its own.
        image_size: S; the shorter side is resized to it, then the image is cropped.
        crop: "center" or "random". flip: mirror half of the images. Both draw from the generator given to `fetch`.
        split: of a `datasets` or TFDS data set.
        shapes: for shapes sources, options of `ShapesPairs`: size (default 20,000), seed, caption_noise.

    Raises:
        DataError: broken rows, empty captions; MissingDataError: a file is not there. Every path is looked up now;
            an image that cannot be decoded is reported when it is read. Both name file and row.
    """
    if crop not in images.CROPS:
        raise ValueError(f"crop must be one of {', '.join(images.CROPS)}; got {crop!r}")
    if image_size < 1:
        raise ValueError(f"image_size must be at least 1; got {image_size}")
    source = str(source)
    if source.startswith(SHAPES_PREFIX):
        if prompt is not None:
            raise DataError(f"{source}: its images have captions of their own, and cannot all be {prompt!r}")
        options = {"size": SHAPES_SIZE, **(shapes or {})}
        return ShapesPairs(captions=shapes_captions(source), image_size=image_size, **options)
    if shapes is not None:
        raise ValueError(f"shapes options are for shapes:train and shapes:held_out alone; the source is {source!r}")
    table = read_pairs_table(source, split, captions=prompt is None)
    image_column = pick_column(table, image_column, IMAGE_COLUMNS, "image_column= (--config.data.pairs_image_column=)")
    prompts = [prompt] * len(table.rows)
    if prompt is None:
        text_column = pick_column(table, text_column, PROMPT_COLUMNS, "text_column= (--config.data.pairs_text_column=)")
        prompts = check_texts(table, column_values(table, text_column), f"caption in column {text_column!r}")
    return Pairs(table, image_column, prompts, image_size=image_size, crop=crop, flip=flip)


class Pairs:
    """Reads image-text pairs of a table by number; see `load_pairs`."""

    def __init__(self, table: Table, image_column: str, prompts: list[str], *, image_size: int, crop: str, flip: bool):
        self.table, self.image_column, self.prompts = table, image_column, prompts
        self.image_size, self.crop, self.flip = image_size, crop, flip
        self.found = None
        if isinstance(table.rows[0].get(image_column), str):  # a path: cheap to look up now, not at step 10,000
            values = column_values(table, image_column)
            self.found = [images.find_image(v, table.folder, table.where(i)) for i, v in enumerate(values)]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Reads a pair, cropped at the centre and not mirrored."""
        return self._item(index)

    def fetch(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """Reads a pair with the crop and mirroring that were asked for, drawn from `rng`."""
        return self._item(index, crop=self.crop, flip=self.flip, rng=rng)

    def size_of(self, index: int) -> tuple[int, int]:
        """Height and width of the image of a pair, before it is resized."""
        where = self.table.where(index)
        return images.shown_size(self._encoded(index, where), where)

    def state_of(self, rows: Iterable[int]) -> str:
        """What changes when the image files of these rows do, whose names stay; "" if they are in the table."""
        if self.found is None:
            return ""
        states = "\n".join(images.state_of(self.found[index]) for index in rows)
        return hashlib.sha256(states.encode()).hexdigest()

    def _item(self, index, **options):
        where = self.table.where(index)
        image = images.open_image(self._encoded(index, where), where)
        image, original_size, corner = images.fit_and_locate(image, self.image_size, **options)
        prompt = self.prompts[index]
        return {"image": image, "prompt": prompt, "original_size": original_size, "crop_top_left": corner}

    def _encoded(self, index, where):
        if self.found is not None:
            return self.found[index]
        return images.find_image(self.table.rows[index][self.image_column], self.table.folder, where)


def read_pairs_table(source: str | os.PathLike, split: str = "train", *, captions: bool = True) -> Table:
    """Reads the rows behind `load_pairs`: those of a table, or of a folder of images, with their captions if needed."""
    folder = Path(os.path.expanduser(source))
    if not folder.is_dir() or any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        return read_table(source, split)
    for name in METADATA:
        if (folder / name).is_file():
            table = read_file(folder / name)
            break
    else:
        table = _caption_files(folder) if captions else _image_files(folder)
    if not table.rows:
        raise DataError(f"{table.name}: no pairs in it; expected images ({', '.join(images.FORMATS)}) with captions")
    return table


def _caption_files(folder):
    """Lists the images in a folder and below, each with a .txt of the same stem, as a table."""
    files = images.list_images(folder)
    bare = [path for path in files if not path.with_suffix(".txt").is_file()]
    if bare:
        raise DataError(
            f"{bare[0]}: no caption {bare[0].with_suffix('.txt').name} beside it ({len(bare)} of {len(files)} images "
            f"lack one), and {folder} has no {' or '.join(METADATA)}"
        )
    rows = [{"image": str(path.relative_to(folder)), "text": _caption(path.with_suffix(".txt"))} for path in files]
    return Table(str(folder), rows, lambda i: str(files[i].with_suffix(".txt")), folder)


def _image_files(folder):
    files = images.list_images(folder)
    return Table(
        str(folder), [{"image": str(path.relative_to(folder))} for path in files], lambda i: str(files[i]), folder
    )


def _caption(path):
    return " ".join(read_text(path).replace("\r\n", "\n").rstrip("\n").split("\n"))
