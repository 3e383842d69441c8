"""Writes folders that appear complete or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


class StorageError(ValueError):
    """A file or folder could not be written; the message names it and says why."""


@contextlib.contextmanager
def new_folder(target: str | os.PathLike, *, overwrite: bool = False, marker: str) -> Iterator[Path]:
    """Yields an empty folder beside `target`; it becomes `target` if the block succeeds.

    Args:
        target: path of the new folder.
        overwrite: replaces an existing `target` at the very end, if it holds the file `marker`.
        marker: file that identifies folders of this kind, e.g. "model_index.json"; other folders are not replaced.

    Yields:
        Path of the folder to write into; it is removed if the block raises.

    Raises:
        FileExistsError: `target` exists, is not empty, and must not be replaced.
        StorageError: writing fails (disk full, no permission).
    """
    target = Path(os.path.abspath(target))
    refuse_existing(target, overwrite=overwrite, marker=marker)
    partial, old = (target.with_name(f".{target.name}.{os.getpid()}.{kind}") for kind in ("partial", "old"))
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if target.exists():
            target.rename(old)
        partial.rename(target)
    except StorageError as error:
        raise type(error)(str(error).replace(str(partial), str(target))) from error
    except OSError as error:
        if isinstance(error, FileNotFoundError | FileExistsError) and error.errno is None:
            raise  # raised by this package, about files of the block
        raise StorageError(f"{target}: could not be written ({error}); nothing at that path was changed") from error
    finally:
        if old.exists() and not target.exists():
            old.rename(target)  # interrupted between the two renames
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(partial, ignore_errors=True)


def refuse_existing(target: str | os.PathLike, *, overwrite: bool, marker: str) -> None:
    """Raises FileExistsError unless `target` does not exist, is empty, or may be overwritten and holds `marker`."""
    target = Path(target)
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(f"{target} exists already; choose another name, or overwrite it (--overwrite)")
    if not (target / marker).is_file():
        raise FileExistsError(f"{target} is not overwritten: it has no {marker}, so it is not a model")
