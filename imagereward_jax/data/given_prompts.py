"""Prompts that Python code brings: a list, or a function that is called for each; and the table that keeps them.

A function is called for all prompts of a run before its first step, and what it gave is kept in the workdir. So a
resumed run is given the same prompts whatever the function remembers or draws from.
"""

import contextlib
import json
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from imagereward_jax.data.errors import DataError, describe

PromptFunction = Callable[[], str | tuple[str, dict[str, Any] | None]]
Row = dict[str, Any]  # {"prompt": str, "metadata": dict}


class GivenPrompts:
    """Random access to rows {"prompt": str, "metadata": dict}, as `prompts.PromptRows`.

    Args:
        rows: not empty. drawn: whether they are those of a whole run in its order, to be read neither shuffled nor
            twice.
    """

    def __init__(self, rows: list[Row], *, drawn: bool = False):
        self.rows, self.drawn = rows, drawn

    @property
    def prompts(self) -> list[str]:
        """The prompts alone."""
        return [row["prompt"] for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    def to_text(self) -> str:
        """The rows as JSON, one a line."""
        return "".join(json.dumps(row) + "\n" for row in self.rows)


def rows_of_text(text: str) -> list[Row]:
    """The inverse of `GivenPrompts.to_text`."""
    return [json.loads(line) for line in text.splitlines()]


def rows_of_list(prompts: Iterable[Any], name: str) -> list[Row]:
    """The rows of a list of prompts, or of (prompt, metadata).

    Args:
        name: what errors call the list.

    Raises:
        DataError: it is no list, empty, or has something else in it.
    """
    if not isinstance(prompts, list | tuple | np.ndarray):
        raise DataError(f"{name}: expected a list of prompts, or of (prompt, metadata); got {type(prompts).__name__}")
    rows = [_row(item, f"{name}[{index}]") for index, item in enumerate(prompts)]
    if not rows:
        raise DataError(f"{name}: there are no prompts in it")
    return rows


def draw_rows(function: PromptFunction, first: int, count: int, *, seed: int, name: str) -> list[Row]:
    """Calls a function of no arguments for the rows `first` to `count` - 1.

    Before call i, Python's and NumPy's global generators are seeded by (seed, i): a function that draws from them, and
    remembers nothing, gives row i whatever was drawn before. Their states are restored afterwards.

    Raises:
        DataError: it raised an error, or gave neither a prompt nor (prompt, metadata).
    """
    rows = []
    with _kept_generators():
        for index in range(first, count):
            random.seed(f"{seed} {index}")
            np.random.seed([seed, index])
            where = f"prompts: {name}, call {index + 1}"
            try:
                drawn = function()
            except Exception as error:
                raise DataError(f"{where}: {describe(error, function)}") from error
            rows.append(_row(drawn, where))
    return rows


@contextlib.contextmanager
def _kept_generators() -> Iterator[None]:
    states = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _row(item, where):
    """A checked row, as JSON gives it back."""
    prompt, metadata = item if isinstance(item, tuple) and len(item) == 2 else (item, None)
    prompt = str(prompt) if isinstance(prompt, np.str_) else prompt  # numpy.random.choice of a list of prompts
    if not isinstance(prompt, str) or not prompt.strip() or not isinstance(metadata, dict | None):
        raise DataError(f"{where}: expected a prompt, or (prompt, dict of metadata); got {item!r:.200}")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: the prompt {prompt!r:.200} is not valid Unicode: {error.reason}") from error
    try:
        return json.loads(json.dumps({"prompt": prompt, "metadata": metadata or {}}))
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: metadata is kept as JSON, which cannot hold this: {error}") from error
