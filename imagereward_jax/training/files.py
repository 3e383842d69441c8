"""Files that appear whole or not at all."""

import os
import shutil
from pathlib import Path


def write_text(path, text):
    """Writes through a temporary file in the same folder."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def save_image(path, image):
    """Saves a PIL image as PNG through a temporary file in the same folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    image.save(temporary, format="PNG")
    os.replace(temporary, path)


def replace_folder(folder, write):
    """Lets `write(temporary)` fill a folder beside `folder`, then puts it in its place."""
    folder = Path(folder)
    temporary, old = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("tmp", "old"))
    for left_over in (temporary, old):
        shutil.rmtree(left_over, ignore_errors=True)
    write(temporary)
    if folder.exists():
        os.rename(folder, old)
    os.rename(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)
