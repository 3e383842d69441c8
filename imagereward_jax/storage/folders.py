"""Writes folders that appear complete or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from imagereward_jax.storage.errors import StorageError, writing
from imagereward_jax.storage.lock import Lock


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
        WriteError: writing fails (disk full, no permission); nothing at `target` was changed.
        LockedError: another process is writing it.
    """
    target = Path(os.path.abspath(target))
    refuse_existing(target, overwrite=overwrite, marker=marker)
    partial, old, lock = (target.with_name(f".{target.name}.{kind}") for kind in ("partial", "old", "lock"))
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with Lock(lock, str(target)):
            # A process that was killed left it between the two renames, or while it wrote.
            if old.exists() and not target.exists():
                old.rename(target)
            try:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                yield partial
                if target.exists():
                    target.rename(old)
                partial.rename(target)
            except StorageError as error:
                raise type(error)(str(error).replace(str(partial), str(target))) from error
            finally:
                if old.exists() and not target.exists():
                    old.rename(target)
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


def export_of(folder: Path) -> Path:
    """The export of a run's workdir; any other folder as it is.

    Raises:
        FileNotFoundError: the run has none yet.
    """
    if not (folder / "metrics.jsonl").is_file():
        return folder
    if not (folder / "export").is_dir():
        raise FileNotFoundError(
            f"{folder} has no export yet: let the run end, or write a checkpoint's with `imagereward export {folder} "
            "OUT`, and pass OUT"
        )
    return folder / "export"
