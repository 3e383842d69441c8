"""Writes files that appear complete or not at all."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes text through a temporary file in the same folder."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8", errors="replace")  # prompts may hold lone surrogates
    os.replace(temporary, path)


def save_image(path: str | os.PathLike, image: Image.Image) -> None:
    """Saves a PIL image as PNG through a temporary file in the same folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    image.save(temporary, format="PNG")
    os.replace(temporary, path)


def save_arrays(path: str | os.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """Saves arrays by name as .npz through a temporary file in the same folder."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        np.savez(file, **arrays)
    os.replace(temporary, path)
