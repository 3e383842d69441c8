"""Writes files that appear complete or not at all."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes text through a temporary file in the same folder."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8", errors="replace")  # prompts may hold lone surrogates
    os.replace(temporary, path)


def save_image(path: str | os.PathLike, image: Image.Image, text: Mapping[str, object] | None = None) -> None:
    """Saves a PIL image as PNG, with `text` in its text chunks, through a temporary file in the same folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    chunks = PngInfo()
    for name, value in (text or {}).items():
        chunks.add_itxt(name, str(value))
    image.save(temporary, format="PNG", pnginfo=chunks)
    os.replace(temporary, path)


def save_arrays(path: str | os.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """Saves arrays by name as .npz through a temporary file in the same folder."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        np.savez(file, **arrays)
    os.replace(temporary, path)
