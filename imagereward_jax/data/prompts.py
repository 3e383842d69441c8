"""Prompts from files, `datasets`, TFDS and the shapes world: strings, or rows with the other columns as metadata."""

import os
from typing import Any

from imagereward_jax.data.errors import DataError, nearest
from imagereward_jax.data.shapes.drawing import Caption
from imagereward_jax.data.shapes.drawing import split as split_shapes
from imagereward_jax.data.tables import Table, check_texts, column_values, pick_column, read_table, row_names
from imagereward_jax.storage.names import single_name

PROMPT_COLUMNS = ("text", "prompt", "caption", "prompts")
SHAPES_PREFIX = "shapes:"


def load_prompts(source: str | os.PathLike, *, column: str | None = None, split: str = "train") -> list[str]:
    """Loads the prompts of a source, in its order, as they are written there.

    Args:
        source: a .json list of strings or objects, .jsonl, .csv, .tsv, .txt (one per line) or .parquet file; a folder
            saved by `datasets`; a hub name "owner/name"; "tfds:NAME"; "shapes:train" or "shapes:held_out".
        column: the column that holds the prompt; by default the first of text, prompt, caption, prompts that is there,
            in any case.
        split: of a `datasets` or TFDS data set.

    Returns:
        list of str, not empty.

    Raises:
        DataError: the source is broken, empty, or has an empty or missing prompt; names file and row.
        MissingDataError: there is no such source.
    """
    return load_prompt_rows(source, column=column, split=split).prompts


def load_named_prompts(source: str | os.PathLike, column: str | None = None) -> dict[str, str]:
    """Loads prompts by names for their files: each row's "id" if the source has them, else its number from 0.

    Args:
        column: as of `load_prompts`; --prompt-column of a command.

    Raises:
        StorageError: an id cannot name a file. DataError: two ids are equal; or see `load_prompts`.
    """
    if str(source).startswith(SHAPES_PREFIX):
        return {str(i): prompt for i, prompt in enumerate(load_prompts(source))}
    table, named = read_table(source), {}
    for i, (name, prompt) in enumerate(zip(row_names(table), table_prompts(table, column, "--prompt-column"))):
        if single_name(name, f"{table.where(i)}: id") in named:
            raise DataError(f"{table.where(i)}: id {name!r} is not the only one of that name")
        named[name] = prompt
    return named


def load_prompt_rows(
    source: str | os.PathLike, *, column: str | None = None, split: str = "train", flag: str = "column="
) -> "PromptRows":
    """Loads prompts with the other columns of their rows; for the rest see `load_prompts` and `table_prompts`."""
    source = str(source)
    if source.startswith(SHAPES_PREFIX):
        return PromptRows([caption.text for caption in shapes_captions(source)])
    table = read_table(source, split)
    prompts = table_prompts(table, column, flag)
    if table.columns() is None:
        return PromptRows(prompts)
    column = pick_column(table, column, PROMPT_COLUMNS, flag)
    others = [name for name, value in table.rows[0].items() if name != column and _is_plain(value)]
    return PromptRows(prompts, {name: column_values(table, name) for name in others if _in_every_row(table, name)})


def table_prompts(table: Table, column: str | None = None, flag: str = "column=") -> list[str]:
    """Lists the prompts of a table: its rows, if they are plain text, or a column; errors as of `load_prompts`.

    Args:
        flag: what the user sets to choose another column, for the message; "" if there is none.
    """
    if column is None and isinstance(table.rows[0], str):
        return check_texts(table, list(table.rows), "prompt")
    column = pick_column(table, column, PROMPT_COLUMNS, flag)
    return check_texts(table, column_values(table, column), f"prompt in column {column!r}")


class PromptRows:
    """Random access to prompts: item i is {"prompt": str, "metadata": {column: value}}.

    Args:
        prompts: not empty. columns: the metadata, a value for each prompt by column.
    """

    def __init__(self, prompts: list[str], columns: dict[str, list] | None = None):
        self.prompts, self.columns = prompts, columns or {}

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"prompt": self.prompts[index], "metadata": {name: v[index] for name, v in self.columns.items()}}


def _is_plain(value):
    """Whether a value is text, a number or lists and objects of those; encoded images are not."""
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float)


def _in_every_row(table, name):
    return not isinstance(table.rows, list) or all(name in row for row in table.rows)


def shapes_captions(source: str) -> list[Caption]:
    """Lists the captions behind "shapes:train" and "shapes:held_out".

    Raises:
        DataError: another name after the colon.
    """
    train, held_out = split_shapes()
    parts = {"train": train, "held_out": held_out}
    name = source.removeprefix(SHAPES_PREFIX)
    if name not in parts:
        raise DataError(
            f"{source}: no such part of the shapes world; there are shapes:train and shapes:held_out"
            f"{nearest(name, parts)}"
        )
    return parts[name]
