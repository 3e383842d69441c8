"""Writes files that appear complete or not at all."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from imagereward_jax.storage.errors import writing


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path in the same folder; the file there becomes `path` if the block succeeds.

    Raises:
        WriteError: it could not be written; what was at `path` is as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with writing(path):
            yield temporary
            os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def is_temporary(path: Path) -> bool:
    """Whether a file is what a kill leaves of `whole_file`, or a lock."""
    return path.name.startswith(".") and path.name.endswith((".tmp", ".lock"))


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes text through a temporary file in the same folder."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace")  # prompts may hold lone surrogates


def save_image(path: str | os.PathLike, image: Image.Image, text: Mapping[str, object] | None = None) -> None:
    """Saves a PIL image as PNG, with `text` in its text chunks, through a temporary file in the same folder."""
    chunks = PngInfo()
    for name, value in (text or {}).items():
        chunks.add_itxt(name, str(value))
    with writing(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=chunks)


def save_arrays(path: str | os.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """Saves arrays by name as .npz through a temporary file in the same folder."""
    with whole_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)
