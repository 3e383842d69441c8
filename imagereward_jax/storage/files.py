"""Files that appear whole or not at all."""

import os
from pathlib import Path


def write_text(path, text):
    """Writes through a temporary file in the same folder."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8", errors="replace")  # halves of characters occur in prompts
    os.replace(temporary, path)


def save_image(path, image):
    """Saves a PIL image as PNG through a temporary file in the same folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    image.save(temporary, format="PNG")
    os.replace(temporary, path)
