"""Checks names and links that come from a file: they must not lead out of the folder that the file describes."""

import os
from pathlib import Path
from typing import Any

from imagereward_jax.storage.folders import StorageError


def single_name(value: Any, where: str) -> str:
    """Returns a name that was read from a file if it is one part of a path.

    Args:
        where: the file and the field that it was read from.

    Raises:
        StorageError: it is not text, is empty, or leads to another folder.
    """
    if not isinstance(value, str) or value in ("", ".", "..") or set(value) & set("/\\\0"):
        raise StorageError(f"{where}: {value!r} should be a name of a file or folder, not a path")
    return value


def resolve_inside(path: Path, folder: Path) -> Path:
    """Follows the links of `path`, which must end in the folder of its model.

    A folder REPOSITORY/snapshots/REVISION of the hub's download cache consists of links to REPOSITORY/blobs.

    Raises:
        StorageError: a link leads to another place.
    """
    target, root = (Path(os.path.realpath(one)) for one in (path, folder))
    cache = [one.parent / "blobs" for one in (root, root.parent) if one.name == "snapshots"]
    if not any(target.is_relative_to(inside) for inside in (root, *cache)):
        raise StorageError(f"{path} is a link to {target}, outside of {folder}; replace the link by the file itself")
    return target
