"""Errors of files and folders, and the words that say what to do about them."""

import contextlib
import errno
import os
from collections.abc import Iterator

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class StorageError(ValueError):
    """A file or folder cannot be read or written; the message names it and says why."""


class WriteError(StorageError):
    """A file or folder could not be written: a full disk, no permission. The input is not at fault."""

    exit_status = 1


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Turns an error of the file system in the block into a `WriteError` that names `path` and the way out."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise  # of this package, about something else
        reason = f"{error.strerror}: {error.filename}" if error.errno == errno.ENOENT else error.strerror
        raise WriteError(f"{path}: could not be written ({reason}); {way_out(error)}") from error


def way_out(error: OSError | None = None) -> str:
    """What to do after a write failed."""
    if error is None or error.errno in _FULL:
        return "free some room and run the same command again"
    return "make it writable, or choose another place, and run the command again"
