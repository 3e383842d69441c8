"""Reads rows of (prompt, image) from files and folders, and writes them with a score column."""

import csv
import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from imagereward_jax.bulk_scoring.stream import Item, Unusable
from imagereward_jax.data import images
from imagereward_jax.data.errors import DataError, missing_file
from imagereward_jax.data.images import FORMATS, find_image, list_images
from imagereward_jax.data.pairs import IMAGE_COLUMNS, METADATA, read_pairs_table
from imagereward_jax.data.prompts import PROMPT_COLUMNS
from imagereward_jax.data.tables import Table, check_texts, column_values, pick_column
from imagereward_jax.storage.files import whole_file

OUTPUTS = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
_UNQUOTED = re.compile(r"[\t\r\n]")  # characters that a .tsv has no way to hold


class Rows(NamedTuple):
    """Rows to score: the table, and an `Item` per row."""

    table: Table
    items: list[Item]

    def digest(self) -> str:
        """Hashes all prompts and image paths (the image content if it is in the table)."""
        sha = hashlib.sha256()
        for item in self.items:
            image = item.image if isinstance(item.image, bytes) else str(item.image).encode("utf-8", "ignore")
            prompt = item.prompt.encode("utf-8", "ignore")
            sha.update(b"%d %d " % (len(prompt), len(image)) + prompt + image)
        return sha.hexdigest()


def read_rows(
    source: str | os.PathLike,
    *,
    prompt: str | None = None,
    prompt_column: str | None = None,
    image_column: str | None = None,
    skip_errors: bool = False,
) -> Rows:
    """Reads the rows to score.

    Args:
        source: a .csv, .tsv, .json, .jsonl or .parquet file with a prompt and an image column (paths relative to the
            file, or encoded images), a folder of images as for training pairs (metadata.jsonl, or a .txt beside
            each image), a folder saved by `datasets`, ...; with `prompt` also a folder of images alone.
        prompt: one prompt for all rows, instead of a column.
        prompt_column, image_column: names of the columns, if not the usual ones.
        skip_errors: turns a missing image into an `Unusable` instead of raising.

    Raises:
        DataError, MissingDataError: the message names file and row.
    """
    if prompt is not None and prompt_column is not None:
        raise DataError("--prompt applies to all rows; do not pass --prompt-column as well")
    table = _read(Path(os.path.expanduser(source)), source, prompt)
    image_column = pick_column(table, image_column, IMAGE_COLUMNS, "--image-column")
    if prompt is None:
        column = pick_column(table, prompt_column, PROMPT_COLUMNS, "--prompt-column")
        prompts = check_texts(table, column_values(table, column), f"prompt in column {column!r}")
    else:
        prompts = [prompt] * len(table.rows)
    items = []
    for i, value in enumerate(column_values(table, image_column)):
        where = table.where(i)
        try:
            image = find_image(value, table.folder, where)
        except DataError as error:
            if not skip_errors:
                raise
            image = Unusable(str(error))
        items.append(Item(prompts[i], image, where))
    return Rows(table, items)


def _read(path, source, prompt):
    bare = prompt is not None and path.is_dir() and not any((path / name).is_file() for name in METADATA)
    if not bare:
        return read_pairs_table(str(source), "train")
    files = list_images(path)
    if not files:
        raise DataError(f"{path}: it contains no images ({', '.join(FORMATS)})")
    rows = [{"image": str(file.relative_to(path)), "prompt": prompt} for file in files]
    return Table(str(path), rows, lambda i: str(files[i]), path)


def state_of(items: Sequence[Item]) -> str:
    """What changes when the image files of these rows do, whose names stay."""
    states = [
        images.state_of(item.image) if isinstance(item.image, Path) else str(item.image)
        for item in items
        if isinstance(item.image, Path | Unusable)  # others are in the table
    ]
    return hashlib.sha256("\n".join(states).encode("utf-8", "surrogatepass")).hexdigest()


def columns_of(table: Table) -> list[str]:
    """The columns of all rows, in the order in which they come.

    Raises:
        DataError: a row has no columns.
    """
    if names := getattr(table.rows, "column_names", None) or getattr(
        getattr(table.rows, "table", None), "column_names", None
    ):
        return list(names)
    found = {}
    for i, row in enumerate(table.rows):
        if not isinstance(row, dict):
            raise DataError(f"{table.where(i)}: expected an object with named columns; got {row!r:.100}")
        found |= dict.fromkeys(row)
    return list(found)


def check_output(path: str | os.PathLike, table: Table, names: Sequence[str], overwrite: bool = False) -> None:
    """Checks that the output can be written, and can hold every row, before anything is scored.

    Args:
        names: columns to add.

    Raises:
        DataError, FileExistsError: the file type is unknown, the folder does not exist, the file or a column exists
            already, or the rows hold what such a file cannot store; the message names column and row.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in OUTPUTS:
        raise DataError(f"--output {path}: unknown file type; expected one of {', '.join(OUTPUTS)}")
    if not path.parent.is_dir():
        raise missing_file(path, "output file")
    if path.is_dir() or (path.exists() and not overwrite):
        raise FileExistsError(f"--output {path} exists already; choose another file, or pass --overwrite")
    if len(set(names)) < len(names):
        raise DataError(f"--score-column {names[0]}: --on-error skip adds a column of that name; choose another")
    columns = columns_of(table)
    taken = [name for name in names if name in columns]
    if taken:
        raise DataError(f"{table.name}: has a column {taken[0]!r} already; choose another name with --score-column")
    if suffix == ".parquet":
        _as_arrow(path, table)
        return
    for i, row in enumerate(table.rows):
        for name, value in row.items():
            if _holds_bytes(value):
                raise DataError(f"{table.where(i)}: the column {name!r} holds bytes, which only .parquet can store")
            if suffix == ".tsv" and _UNQUOTED.search(f"{name}{_cell(value)}"):
                raise DataError(
                    f"{table.where(i)}: the column {name!r} holds a tab or a line break, which .tsv cannot store; "
                    "choose another format for --output"
                )


def _holds_bytes(value):
    if isinstance(value, dict | list):
        return any(map(_holds_bytes, value.values() if isinstance(value, dict) else value))
    return isinstance(value, bytes | bytearray | memoryview)


def write_rows(
    path: str | os.PathLike,
    table: Table,
    added: dict[str, Sequence[Any]],
    *,
    before: Callable[[Path], None] = lambda partial: None,
) -> None:
    """Writes the rows of a table with new columns at the end. The file appears complete or not at all.

    Args:
        path: its suffix selects the file type. Dates and other values that are no JSON are written as text.
        added: {column: a value or None per row}: the scores, then the errors if any.
        before: called with the complete file before it gets its name.
    """
    path = Path(path)
    writers = {".csv": _write_csv, ".tsv": _write_csv, ".json": _write_json, ".jsonl": _write_json}
    with whole_file(path) as partial:
        writers.get(path.suffix.lower(), _write_parquet)(partial, path.suffix.lower(), table, added)
        before(partial)


def _merged(table, added):
    for i, row in enumerate(table.rows):
        yield {**row, **{name: values[i] for name, values in added.items()}}


def _write_csv(partial, suffix, table, added):
    """Writes .csv, and .tsv as `data.tables` reads it: without quoting."""
    errors = {name: [_no_formula(value) for value in values] for name, values in added.items()}
    unquoted = {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "quotechar": None}
    with open(partial, "w", encoding="utf-8", newline="", errors="replace") as file:
        writer = csv.writer(file, lineterminator="\n", **(unquoted if suffix == ".tsv" else {}))
        columns = [*columns_of(table), *added]
        writer.writerow(columns)
        for row in _merged(table, errors):
            writer.writerow([_cell(row.get(name)) for name in columns])


def _cell(value):
    if isinstance(value, list | dict | bool):
        return json.dumps(value, ensure_ascii=False, default=str)
    return "" if value is None else str(value)


def _no_formula(value):
    """A text of one line that spreadsheets take for a text; the user's own cells are copied as they are."""
    if not isinstance(value, str):
        return value
    return _UNQUOTED.sub(" ", f"'{value}" if value.startswith(("=", "+", "-", "@", "\t", "\r")) else value)


def _write_json(partial, suffix, table, added):
    """Writes JSON; lone surrogates become JSON escapes, as in the input."""
    lines = (json.dumps(row, ensure_ascii=False, default=str) for row in _merged(table, added))
    with open(partial, "w", encoding="utf-8", errors="backslashreplace") as file:
        if suffix == ".jsonl":
            file.writelines(f"{line}\n" for line in lines)
        else:
            file.write("[\n" + ",\n".join(lines) + "\n]\n")


def _write_parquet(partial, suffix, table, added):
    import pyarrow
    import pyarrow.parquet

    arrow = _as_arrow(partial, table)
    for (name, values), kind in zip(added.items(), (pyarrow.float32(), pyarrow.string())):
        arrow = arrow.append_column(name, pyarrow.array(list(map(_whole_characters, values)), kind))
    pyarrow.parquet.write_table(arrow, partial)


def _whole_characters(value):
    return value.encode("utf-8", "replace").decode("utf-8") if isinstance(value, str) else value


def _as_arrow(path, table):
    """The rows as an Arrow table; that of a Parquet file itself, with its column types."""
    import pyarrow

    if (arrow := getattr(table.rows, "table", None)) is not None:
        return arrow
    columns = {}
    for name in columns_of(table):
        try:
            columns[name] = pyarrow.array([row.get(name) for row in table.rows])
        except (pyarrow.ArrowException, ValueError, TypeError, OverflowError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(
                f"--output {path}: .parquet cannot store the column {name!r} ({reason}); choose .jsonl, or make its "
                "values of one kind"
            ) from error
    return pyarrow.table(columns)
