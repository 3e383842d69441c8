"""Errors in the user's data, and the words that explain them."""

import difflib
import inspect
import os
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


class DataError(ValueError):
    """The data cannot be used; the message names the file and row, what was expected, and what to do."""


class MissingDataError(DataError, FileNotFoundError):
    """A file, folder or data set that was named is not there."""

    def __str__(self):
        return str(self.args[0])


class ImageError(DataError):
    """An image cannot be used; the message names it and says why."""


class ImageNotFound(ImageError, MissingDataError):
    """There is no such image file."""


def nearest(name: Any, choices: Iterable[Any]) -> str:
    """Returns ", did you mean 'x'?" for the choice most like `name`, or ""."""
    close = difflib.get_close_matches(str(name), [str(choice) for choice in choices], n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def missing_file(path: str | os.PathLike, what: str = "data file") -> MissingDataError:
    """Makes the error for a path that does not exist, with the nearest name in the same folder."""
    path = Path(path)
    if not path.parent.is_dir():
        return MissingDataError(f"{path}: no such {what}; the folder {path.parent} does not exist either")
    hint = nearest(path.name, sorted(other.name for other in path.parent.iterdir()))
    return MissingDataError(f"{path}: no such {what}{hint or f'; nothing in {path.parent} has a name like it'}")


def describe(error: Exception, function: Callable[..., Any]) -> str:
    """Describes an error that a user's function raised: its type, first line and last place in the function's file."""
    text = str(error).strip()
    told = f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
    function = inspect.unwrap(getattr(function, "func", function))  # of a functools.partial, of jax.jit
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if code is not None and frame.filename == code.co_filename]
    return f"{told} ({os.path.basename(own[-1].filename)}, line {own[-1].lineno})" if own else told
