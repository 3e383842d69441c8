"""Rows of (prompt, image) from files and folders, and the same with a score column back into a file."""

import csv
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from imagereward_jax.bulk_scoring.stream import Item, Unusable
from imagereward_jax.data.errors import DataError, missing_file
from imagereward_jax.data.images import SUFFIXES, find_image
from imagereward_jax.data.pairs import IMAGE_COLUMNS, METADATA, read_pairs_table
from imagereward_jax.data.prompts import PROMPT_COLUMNS
from imagereward_jax.data.tables import Table, check_texts, column_values, pick_column

OUTPUTS = (".csv", ".tsv", ".json", ".jsonl", ".parquet")


class Rows(NamedTuple):
    """What is to be scored: the table as it was read, and an `Item` for each row of it."""

    table: Table
    items: list[Item]

    def digest(self) -> str:
        """A hash of all prompts and of what the images are called (of their content, where they are in the table)."""
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
    """Reads what to score.

    Args:
        source: a .csv, .tsv, .json, .jsonl or .parquet file with a prompt and an image column (paths relative to the
            file, or encoded images), a folder of images as for training pairs (metadata.jsonl, or a .txt beside
            each image), a folder saved by `datasets`, ...; with `prompt` a folder of images alone will do.
        prompt: one prompt for all rows, instead of a column.
        prompt_column, image_column: their names, if not the usual ones.
        skip_errors: a row whose image is not there becomes an `Unusable`, instead of ending everything.

    Raises:
        DataError, MissingDataError: naming file and row.
    """
    if prompt is not None and prompt_column is not None:
        raise DataError("--prompt is for all rows; do not give --prompt-column as well")
    table = _read(Path(source).expanduser(), source, prompt)
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
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
    if not files:
        raise DataError(f"{path}: no images in it ({', '.join(SUFFIXES)})")
    rows = [{"image": str(file.relative_to(path)), "prompt": prompt} for file in files]
    return Table(str(path), rows, lambda i: str(files[i]), path)


def check_output(path: str | os.PathLike, table: Table, names: Sequence[str], overwrite: bool = False) -> None:
    """Refuses an output that cannot be written, before anything is scored.

    Args:
        names: the columns that will be added.

    Raises:
        DataError, FileExistsError: of an unknown kind, in no folder, there already, with columns that are there
            already, or with images in cells of text.
    """
    path = Path(path)
    if path.suffix.lower() not in OUTPUTS:
        raise DataError(f"--output {path}: cannot tell what file to write; expected one of {', '.join(OUTPUTS)}")
    if not path.parent.is_dir():
        raise missing_file(path, "output file")
    if path.is_dir() or (path.exists() and not overwrite):
        raise FileExistsError(f"--output {path} exists already; choose another file, or pass --overwrite")
    taken = [name for name in names if name in (table.columns() or ())]
    if taken:
        raise DataError(
            f"{table.name}: has a column {taken[0]!r} already; call the new one otherwise with --score-column"
        )
    if path.suffix.lower() != ".parquet" and any(_has_bytes(value) for value in table.rows[0].values()):
        raise DataError(f"--output {path}: the rows hold encoded images, which only .parquet can keep")


def _has_bytes(value):
    values = value.values() if isinstance(value, dict) else [value]
    return any(not isinstance(item, (str, int, float, bool, list, dict, type(None))) for item in values)


def write_rows(path: str | os.PathLike, table: Table, added: dict[str, Sequence[Any]]) -> None:
    """Writes the rows of a table with new columns behind the others. The file appears whole or not at all.

    Args:
        path: its suffix says what kind.
        added: {column: list of a value for each row, None for none}: the scores, and after them errors if any.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.tmp")
    writers = {".csv": _write_csv, ".tsv": _write_csv, ".json": _write_json, ".jsonl": _write_json}
    writers.get(path.suffix.lower(), _write_parquet)(partial, path.suffix.lower(), table, added)
    os.replace(partial, path)


def _merged(table, added):
    for i, row in enumerate(table.rows):
        yield {**row, **{name: values[i] for name, values in added.items()}}


def _write_csv(partial, suffix, table, added):
    def cell(value):
        return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict, bool)) else value

    with open(partial, "w", encoding="utf-8", newline="", errors="replace") as file:
        writer = csv.writer(file, delimiter="\t" if suffix == ".tsv" else ",", lineterminator="\n")
        columns = [*table.columns(), *added]
        writer.writerow(columns)
        for row in _merged(table, added):
            writer.writerow([cell(row.get(name)) for name in columns])


def _write_json(partial, suffix, table, added):
    """Halves of characters are written as JSON's escapes, which is how they came in."""
    lines = (json.dumps(row, ensure_ascii=False) for row in _merged(table, added))
    with open(partial, "w", encoding="utf-8", errors="backslashreplace") as file:
        if suffix == ".jsonl":
            file.writelines(f"{line}\n" for line in lines)
        else:
            file.write("[\n" + ",\n".join(lines) + "\n]\n")


def _write_parquet(partial, suffix, table, added):
    import pyarrow
    import pyarrow.parquet

    arrow = getattr(table.rows, "table", None)  # a Parquet file keeps its types
    if arrow is None:
        arrow = pyarrow.Table.from_pylist([dict(row) for row in table.rows])
    for (name, values), kind in zip(added.items(), (pyarrow.float32(), pyarrow.string())):
        arrow = arrow.append_column(name, pyarrow.array(values, kind))
    pyarrow.parquet.write_table(arrow, partial)
