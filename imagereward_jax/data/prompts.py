"""Prompts from files, `datasets`, TFDS and the shapes world, as a list of strings."""

import os

from imagereward_jax.data.errors import DataError, nearest
from imagereward_jax.data.shapes.drawing import Caption
from imagereward_jax.data.shapes.drawing import split as split_shapes
from imagereward_jax.data.tables import check_texts, column_values, pick_column, read_table

PROMPT_COLUMNS = ("text", "prompt", "caption")
SHAPES_PREFIX = "shapes:"


def load_prompts(source: str | os.PathLike, *, column: str | None = None, split: str = "train") -> list[str]:
    """Loads the prompts of a source, in its order, as they are written there.

    Args:
        source: a .json list of strings or objects, .jsonl, .csv, .tsv, .txt (one per line) or .parquet file; a folder
            saved by `datasets`; a hub name "owner/name"; "tfds:NAME"; "shapes:train" or "shapes:held_out".
        column: the column that holds the prompt; by default the first of text, prompt, caption that is there.
        split: of a `datasets` or TFDS data set.

    Returns:
        list of str, not empty.

    Raises:
        DataError: the source is broken, empty, or has an empty or missing prompt; names file and row.
        MissingDataError: there is no such source.
    """
    source = str(source)
    if source.startswith(SHAPES_PREFIX):
        return [caption.text for caption in shapes_captions(source)]
    table = read_table(source, split)
    if column is None and isinstance(table.rows[0], str):
        return check_texts(table, list(table.rows), "prompt")
    column = pick_column(table, column, PROMPT_COLUMNS, "column=")
    return check_texts(table, column_values(table, column), f"prompt in column {column!r}")


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
