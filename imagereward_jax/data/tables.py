"""Tables of rows from files, `datasets` folders and names, and TFDS. One reader for all kinds of data.

A `Table` returns rows by number, and the place of a row so that a message can name it. Lines without anything in them
are no rows, in any format of lines (docs/files.md).
"""

import csv
import dataclasses
import io
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from imagereward_jax.data.errors import DataError, MissingDataError, missing_file, nearest
from imagereward_jax.terminal import say

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt", ".parquet")
TFDS_PREFIX = "tfds:"
_QUOTED_TABS = "a file whose quotes are CSV's should be named .csv, tabs or not"


class Table(NamedTuple):
    """Rows of one source.

    Attributes:
        name: the file or data set, for messages.
        rows: sequence of rows; a row is a dict, or a string (one column without a name).
        where: row number from 0 -> "prompts.csv, line 3".
        folder: what paths in the rows are relative to; None if they must be absolute.
    """

    name: str
    rows: Sequence
    where: Callable[[int], str]
    folder: Path | None

    def columns(self) -> list[str] | None:
        """Lists the names of the columns; None if rows are plain strings."""
        return list(self.rows[0]) if isinstance(self.rows[0], dict) else None


def read_table(source: str | os.PathLike, split: str = "train") -> Table:
    """Reads the rows of a file (by its suffix), a folder saved by `datasets`, "tfds:NAME", or a hub name "owner/name".

    Raises:
        DataError: unreadable, empty, or of an unknown kind; the message names file and row.
        MissingDataError: not there, with the nearest existing name.
    """
    source = str(source)
    path = Path(os.path.expanduser(source))
    if source.startswith(TFDS_PREFIX):
        table = _tfds_table(source, split)
    elif path.is_dir():
        table = _saved_table(path, split)
    elif path.is_file():
        table = read_file(path)
    elif re.fullmatch(r"[\w-]+/[\w.-]+", source) and path.suffix.lower() not in SUFFIXES and not path.parent.is_dir():
        table = _hub_table(source, split)
    else:
        raise missing_file(path, "data file or folder (a data set of the Hugging Face hub is written owner/name)")
    if len(table.rows) == 0:
        raise DataError(f"{table.name}: there are no rows in it")
    return table


def read_file(path: str | os.PathLike) -> Table:
    """Reads the rows of one file, by its suffix; the table may be empty. Says on stderr how many lines were blank."""
    path = Path(path)
    readers = {
        ".json": _json_rows,
        ".jsonl": _json_lines,
        ".ndjson": _json_lines,
        ".csv": _csv_rows,
        ".tsv": _csv_rows,
        ".txt": _text_lines,
        ".parquet": _parquet_rows,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: cannot tell what this file is; expected one of {', '.join(SUFFIXES)}")
    rows, where = reader(path)
    return Table(str(path), rows, lambda i: f"{path}, {where(i)}", path.parent)


def read_text(path: Path) -> str:
    """Reads a text file in UTF-8, with a byte order mark or without.

    Raises:
        DataError: it is not UTF-8; names the line.
    """
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        raise DataError(
            f"{path}, line {line}: byte 0x{data[e.start]:02x} is not UTF-8; save the file in UTF-8 encoding"
        ) from e


def _json_rows(path):
    text = read_text(path)
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise _broken_json(path, e) from e
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a JSON list of strings or objects; got {_kind(rows)}")
    return rows, lambda i: f"row {i + 1}"


def _broken_json(path, error, line=None):
    """The error of text that is no JSON, or nests too deep, or holds a number of thousands of digits."""
    if not isinstance(error, json.JSONDecodeError):
        return DataError(f"{path}{f', line {line}' if line else ''}: broken JSON: {error}")
    hint = ""
    if error.msg == "Extra data" and line is None:
        hint = "; a file with one object a line should be named .jsonl"
    return DataError(f"{path}, line {line or error.lineno}, column {error.colno}: broken JSON: {error.msg}{hint}")


def _json_lines(path):
    rows, numbers = [], []
    for number, line in _filled_lines(path):
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as e:
            raise _broken_json(path, e, number) from e
        numbers.append(number)
    return rows, lambda i: f"line {numbers[i]}"


def _csv_rows(path):
    """Reads .csv, whose delimiter follows from its header, and .tsv, where quotes are text like any other."""
    text, tsv = read_text(path), path.suffix.lower() == ".tsv"
    delimiter = "\t" if tsv else _delimiter(text)
    quoting = csv.QUOTE_NONE if tsv else csv.QUOTE_MINIMAL
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
    header, rows, lines, blank = None, [], [], 0
    try:
        for values in reader:
            if not any(value.strip() for value in values):
                blank += 1
            elif header is None:
                header = values
                if doubled := [name for i, name in enumerate(header) if name in header[:i]]:
                    line = reader.line_num
                    raise DataError(f"{path}, line {line}: two columns are called {doubled[0]!r}; rename one")
            elif len(values) != len(header):
                raise _uneven(path, reader.line_num, values, header, delimiter)
            else:
                rows.append(dict(zip(header, values)))
                lines.append(reader.line_num)
    except csv.Error as e:
        raise DataError(f"{path}, line {reader.line_num}: broken CSV: {e}") from e
    _tell_blank(path, blank)
    if tsv:
        _tell_quoted(path, rows, lines)
    return rows, lambda i: f"line {lines[i]}"


def _delimiter(text):
    """The delimiter of a CSV that splits its header into the most columns; spreadsheets of many countries write ";"."""
    header = text.lstrip("\r\n").split("\n", 1)[0]
    return max(",;\t", key=lambda delimiter: len(next(csv.reader([header], delimiter=delimiter), [])))


def _uneven(path, line, values, header, delimiter):
    name = {",": "comma", ";": "semicolon", "\t": "tab"}[delimiter]
    advice = f"put text that holds a {name} in quotes"
    if path.suffix.lower() == ".tsv":
        advice = f"quotes in .tsv are text; {_QUOTED_TABS}"
    return DataError(
        f"{path}, line {line}: {len(values)} values, but the header has {len(header)} columns ({', '.join(header)}), "
        f"by the {name}s between them; {advice}"
    )


def _tell_quoted(path, rows, lines):
    """Warns of a .tsv that seems to be written with CSV's quoting."""
    found = [n for n, row in zip(lines, rows) if any(len(v) > 1 and v[0] == v[-1] == '"' for v in row.values())]
    if found:
        say(
            f"warning: {path}: values in quotes ({len(found)} rows, the first on line {found[0]}): quotes in .tsv are "
            f"read as text; {_QUOTED_TABS}",
            file=sys.stderr,
        )


def _text_lines(path):
    lines = _filled_lines(path)
    return [line for _, line in lines], lambda i: f"line {lines[i][0]}"


def _filled_lines(path):
    """Lists (number, line) of the lines that have something in them."""
    lines = read_text(path).replace("\r\n", "\n").removesuffix("\n").split("\n")
    filled = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    _tell_blank(path, len(lines) - len(filled))
    return filled


def _tell_blank(path, count):
    if count:
        say(f"{path}: {count} blank line{'s are' if count > 1 else ' is'} left out", file=sys.stderr)


class _ArrowRows(Sequence):
    """Rows of an Arrow table, turned into Python one at a time."""

    def __init__(self, table):
        self.table = table

    def __len__(self):
        return self.table.num_rows

    def __getitem__(self, i):
        return {name: self.table.column(name)[i].as_py() for name in self.table.column_names}


def _parquet_rows(path):
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as e:
        raise DataError(f"{path}: not a readable Parquet file: {_first_line(e)}") from e
    return _ArrowRows(table), lambda i: f"row {i + 1}"


def _saved_table(path, split):
    """A folder made by `save_to_disk` of the package `datasets`."""
    if not any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        raise DataError(
            f"{path}: a folder, but not one saved by `datasets` (no dataset_info.json or dataset_dict.json); "
            f"give the file in it, one of {', '.join(SUFFIXES)}"
        )
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
    except Exception as e:
        raise DataError(f"{path}: `datasets` cannot read this folder: {_first_line(e)}") from e
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise DataError(f"{path}: no split {split!r}; there are {', '.join(data)}{nearest(split, data)}")
        data = data[split]
    return _dataset_table(str(path), data)


def _hub_table(name, split):
    import datasets

    try:
        data = datasets.load_dataset(name, split=split)
    except Exception as e:
        raise MissingDataError(
            f"{name}: no such file here, and the Hugging Face hub gave no split {split!r} of it: {_first_line(e)}"
        ) from e
    return _dataset_table(name, data)


def _dataset_table(name, data):
    """Leaves images undecoded: `data.images` alone opens them, and reports a broken one with its row."""
    for column, feature in data.features.items():
        if (encoded := _undecoded(feature)) != feature:
            data = data.cast_column(column, encoded)
    return Table(name, data, lambda i: f"{name}, row {i + 1}", None)


def _undecoded(feature):
    """A feature of `datasets` whose images, those in lists included, stay encoded."""
    import datasets

    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        return dataclasses.replace(feature, feature=_undecoded(feature.feature))
    if isinstance(feature, dict):
        return {name: _undecoded(inner) for name, inner in feature.items()}
    return feature


class _TfdsRows(Sequence):
    """Rows of a TFDS data source; images stay encoded, text becomes str."""

    def __init__(self, data, images):
        self.data, self.images = data, images

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        if not 0 <= i < len(self.data):  # TFDS raises ValueError, which would not end a loop over the rows
            raise IndexError(i)
        return {key: self._value(key, value) for key, value in self.data[i].items()}

    def _value(self, key, value):
        return value.decode("utf-8") if isinstance(value, bytes) and key not in self.images else value


def _tfds_table(source, split):
    """tfds:NAME, or tfds:FOLDER of one prepared version; needs the random-access file format array_record."""
    import tensorflow_datasets as tfds

    name = source.removeprefix(TFDS_PREFIX)
    try:
        folder = Path(os.path.expanduser(name))
        builder = tfds.builder_from_directory(folder) if folder.is_dir() else tfds.builder(name)
        features = builder.info.features.items()
        images = {key for key, feature in features if isinstance(feature, tfds.features.Image)}
        decoders = {key: tfds.decode.SkipDecoding() for key in images}
        data = builder.as_data_source(split=split, decoders=decoders)
    except Exception as e:
        raise MissingDataError(
            f"{source}: TensorFlow Datasets cannot open split {split!r} of it: {_first_line(e)}; prepare it first with "
            "file_format='array_record', and set TFDS_DATA_DIR to where it is (or give tfds:FOLDER)"
        ) from e
    return Table(source, _TfdsRows(data, images), lambda i: f"{source}, row {i + 1}", None)


def pick_column(table: Table, wanted: str | None, usual: Sequence[str], flag: str) -> str:
    """Chooses the column to read: `wanted` if given, else the first of `usual` that is there.

    Args:
        flag: what the user sets to choose another column, for the message; "" if there is none.

    Raises:
        DataError: it is not there; the message lists the columns that are.
    """
    columns = table.columns()
    if columns is None:
        raise DataError(f"{table.where(0)}: expected an object with named columns; got {_kind(table.rows[0])}")
    if wanted is not None:
        if wanted not in columns:
            raise DataError(
                f"{table.name}: no column {wanted!r}; there are {', '.join(columns)}{nearest(wanted, columns)}"
            )
        return wanted
    found = [name for name in usual if name in columns]
    found = found or [name for name in columns if name.lower() in usual]
    if not found:
        raise DataError(
            f"{table.name}: none of the columns {', '.join(usual)}; there are {', '.join(columns)}"
            + (f": say which with {flag}" if flag else "; rename the one that is meant")
        )
    return found[0]


def row_names(table: Table) -> list[str]:
    """The names of the rows: their ids if there is a column "id", else their numbers from 0."""
    if "id" in (table.columns() or ()):
        return [str(value) for value in column_values(table, "id")]
    return [str(i) for i in range(len(table.rows))]


def column_values(table: Table, column: str) -> list[Any]:
    """Lists all values of a column.

    Raises:
        DataError: a row lacks it.
    """
    rows = table.rows
    if hasattr(rows, "column_names"):
        return list(rows[column])
    if isinstance(rows, _ArrowRows):
        return rows.table.column(column).to_pylist()
    values = []
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or column not in row:
            raise DataError(f"{table.where(i)}: expected an object with {column!r}; got {_kind(row)}")
        values.append(row[column])
    return values


def check_texts(table: Table, texts: list[Any], what: str) -> list[str]:
    """Returns the texts if each is a string with something in it, and without NUL, which only a damaged file holds.

    Raises:
        DataError: names the first row that is not, and counts the others.
    """
    bad = [i for i, text in enumerate(texts) if not isinstance(text, str) or not text.strip() or "\0" in text]
    if bad:
        value = texts[bad[0]]
        if isinstance(value, str):
            problem = f"the {what} holds a NUL character" if value.strip() else f"the {what} is empty"
        else:
            problem = f"the {what} must be a string; got {_kind(value)}"
        more = f" ({len(bad)} rows like this)" if len(bad) > 1 else ""
        raise DataError(f"{table.where(bad[0])}: {problem}{more}; correct or remove it")
    return texts


def _kind(value):
    """Describes a JSON value in words."""
    if isinstance(value, dict):
        return f"an object with {', '.join(map(repr, value)) or 'nothing in it'}"
    names = {list: "a list", str: "a string", type(None): "nothing (null)", bool: "true or false"}
    return names.get(type(value), f"{type(value).__name__} {value!r}")


def _first_line(error):
    """Describes an exception of another package on one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
