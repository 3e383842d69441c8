"""Rows of arrays that are computed once and kept on disk: sharded safetensors files, read by row number.

FOLDER/cache.json                   what the rows were computed from, and how many there are
FOLDER/shard_00000.safetensors ...  `ROWS_PER_SHARD` rows each, by name [n, ...]; each file appears whole or not at all
FOLDER/empty.safetensors            the row of the empty prompt

A shard is written only after cache.json, so a folder that holds shards without it is not a cache.
"""

import contextlib
import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from imagereward_jax.data.errors import DataError
from imagereward_jax.storage.errors import writing
from imagereward_jax.storage.lock import Lock, LockedError
from imagereward_jax.weights.files import read_json, read_metadata, read_tensors, write_safetensors

MANIFEST, EMPTY, LOCK = "cache.json", "empty.safetensors", ".lock"
FORMAT = "imagereward-jax cache 1"
ROWS_PER_SHARD = 256
NAMED_AT_MOST = 5  # missing files that an error names

Row = dict[str, np.ndarray]


class CacheError(DataError):
    """A cache was computed with other settings, or is damaged; the message says what differs and what to do."""


class Cache:
    """A folder of shards, opened by `open_cache` and completed by `fill`. Item i is a dict of arrays.

    Args:
        folder: of the shards. rows: number of rows of the complete cache.
        state_of: rows of a shard -> a text that changes when the files do that they are computed from.
    """

    def __init__(self, folder: str | os.PathLike, rows: int, state_of: Callable[[range], str] | None = None):
        self.folder, self.rows, self.state_of = Path(folder), rows, state_of
        self._shards = {}

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < self.rows:
            raise IndexError(f"index {index} is outside a cache of {self.rows} rows")
        shard, row = divmod(int(index), ROWS_PER_SHARD)
        if shard not in self._shards:
            self._shards[shard] = self._read(shard)
        return {name: array[row] for name, array in self._shards[shard].items()}

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out the memory-mapped files: a worker process opens its own."""
        return {"folder": self.folder, "rows": self.rows, "state_of": None, "_shards": {}}

    def fill(
        self,
        encode_rows: Callable[[range], Row],
        encode_empty: Callable[[], Row],
        *,
        process_index: int = 0,
        process_count: int = 1,
        wait: Callable[[], None] | None = None,
    ) -> None:
        """Computes what is missing; all processes of a run call it, and return when the cache is complete.

        A shard belongs to the process whose index is the shard's number modulo `process_count`, whatever is on disk
        already. The row of the empty prompt belongs to process 0. What a killed run left half-written is removed.

        Args:
            encode_rows: the rows of one shard -> arrays by name, [number of rows, ...] each.
            encode_empty: the row of the empty prompt.
            wait: returns once every process has called it; required with several processes.

        Raises:
            CacheError: files are still missing after all processes are done; names them.
            LockedError: another run is filling it. WriteError: it cannot be written.
        """
        if process_count > 1 and wait is None:
            raise ValueError(f"{process_count} processes that fill one cache must wait for each other: pass wait=")
        with contextlib.ExitStack() as stack:
            if process_index == 0:
                lock = Lock(self.folder / LOCK, f"config.data.cache={str(self.folder)!r}")
                complete = not self.missing()
                if not complete:
                    with writing(self.folder):
                        stack.enter_context(lock)
                elif lock.path.exists():  # of a run that was killed when all was written, or of one at its end
                    with contextlib.suppress(LockedError, OSError), lock:
                        pass
                if complete and process_count == 1:  # looking costs a file's state for each row
                    return self._remove_temporary()
            self._fill(encode_rows, encode_empty, process_index, process_count, wait)

    def _fill(self, encode_rows, encode_empty, process_index, process_count, wait):
        for shard in self._missing_shards(process_index, process_count):
            metadata = {"format": "pt", "state": self._state(shard)}
            write_safetensors(self._path(shard), encode_rows(self.rows_of(shard)), metadata)
        if process_index == 0 and not (self.folder / EMPTY).is_file():
            write_safetensors(self.folder / EMPTY, encode_empty())
        if wait is not None:
            wait()
        missing = self.missing()
        if missing:
            more = f" and {len(missing) - NAMED_AT_MOST} more" if len(missing) > NAMED_AT_MOST else ""
            raise CacheError(
                f"{self.folder}: {', '.join(missing[:NAMED_AT_MOST])}{more} missing although all {process_count} "
                "processes are done; config.data.cache must be one folder that every process sees"
            )
        if process_index == 0:
            self._remove_temporary()

    def _remove_temporary(self):
        for path in self.folder.iterdir():
            if _is_temporary(path.name) and path.name != LOCK:
                path.unlink(missing_ok=True)

    def rows_of(self, shard: int) -> range:
        """The range of rows in a shard."""
        return range(shard * ROWS_PER_SHARD, min((shard + 1) * ROWS_PER_SHARD, self.rows))

    def missing(self) -> list[str]:
        """Names of the files that are not on disk, or of whose rows the files have changed."""
        found = [self._path(shard).name for shard in self._missing_shards()]
        return found if (self.folder / EMPTY).is_file() else [*found, EMPTY]

    def count_missing(self, process_index: int = 0, process_count: int = 1) -> int:
        """Number of rows that a process would compute now, see `fill`."""
        return sum(len(self.rows_of(shard)) for shard in self._missing_shards(process_index, process_count))

    def _missing_shards(self, first=0, every=1):
        return [shard for shard in range(first, self._shard_count(), every) if not self._is_current(shard)]

    def _state(self, shard):
        return "" if self.state_of is None else self.state_of(self.rows_of(shard))

    def _is_current(self, shard):
        """Whether a shard is there, of the files as they are; shards of earlier versions say nothing of their files."""
        path = self._path(shard)
        if not path.is_file():
            return False
        stated = self._metadata(path).get("state")
        return stated is None or stated == self._state(shard)

    def _metadata(self, path):
        from safetensors import SafetensorError

        try:
            return read_metadata(path)
        except (OSError, SafetensorError):
            return {"state": "damaged"}  # computed again

    def empty(self) -> Row:
        """The row of the empty prompt."""
        return read_tensors(self.folder / EMPTY)

    def _shard_count(self):
        return -(-self.rows // ROWS_PER_SHARD)

    def _path(self, shard):
        return self.folder / f"shard_{shard:05d}.safetensors"

    def _read(self, shard):
        arrays, expected = read_tensors(self._path(shard)), len(self.rows_of(shard))
        if any(len(array) != expected for array in arrays.values()):
            raise CacheError(f"{self._path(shard)}: expected {expected} rows in every array; delete it and run again")
        return arrays


def open_cache(
    folder: str | os.PathLike,
    fingerprint: dict[str, Any],
    rows: int,
    state_of: Callable[[range], str] | None = None,
) -> Cache:
    """Opens the cache in a folder, which is made if absent; several processes may do so at once.

    Args:
        fingerprint: everything that the rows depend on, a flat dict for JSON.
        rows, state_of: see `Cache`.

    Raises:
        CacheError: the folder was computed with other settings; names every field that differs.
        FileExistsError: the folder holds other files.
    """
    folder = Path(folder)
    manifest = folder / MANIFEST
    made_by = json.loads(json.dumps({**fingerprint, "rows": rows}))
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file, not a folder: choose another config.data.cache")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if not manifest.is_file():
        foreign = [path.name for path in folder.iterdir() if not _may_be_beside(path)]
        if foreign and not manifest.is_file():  # looked for again: another process may have written it meanwhile
            raise FileExistsError(f"{folder} exists and is no cache (no {MANIFEST}): choose another config.data.cache")
        with writing(manifest):
            _write_first(manifest, json.dumps({"format": FORMAT, "made_by": made_by}, indent=2) + "\n")
    written = read_json(manifest)
    if written.get("format") != FORMAT:
        raise CacheError(f"{manifest}: format is {written.get('format')!r}, expected {FORMAT!r}")
    if not isinstance(written.get("made_by"), dict):
        raise CacheError(f"{manifest}: made_by={written.get('made_by')!r} should be an object; delete {folder}")
    _compare(folder, written["made_by"], made_by)
    return Cache(folder, rows, state_of)


def _compare(folder, there, now):
    differ = [name for name in sorted(there.keys() | now.keys()) if there.get(name) != now.get(name)]
    if differ:
        changes = "; ".join(f"{name}: {there.get(name)!r} there, {now.get(name)!r} now" for name in differ)
        raise CacheError(
            f"{folder} was computed with other settings ({changes}): pass what it was made with, or another "
            "config.data.cache"
        )


def _write_first(path, text):
    """Writes a file that appears whole, unless another process was first."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.link(partial, path)
    except OSError as error:
        if path.is_file():
            return
        if not partial.is_file():
            raise
        try:
            os.replace(partial, path)  # a file system without hard links, such as a mounted bucket
        except OSError:
            raise error from None
    finally:
        partial.unlink(missing_ok=True)


def _may_be_beside(path):
    """True for what may be in a new cache's folder: leftovers of a kill, and another cache as a folder in it."""
    return _is_temporary(path.name) or (path / MANIFEST).is_file()


def _is_temporary(name):
    """True for what this module leaves when it is killed while it writes."""
    partial = name.startswith((f".{MANIFEST}.", ".shard_", f".{EMPTY}.")) and name.endswith(".partial")
    return partial or name == LOCK or name.startswith(".tmp")  # the last is safetensors' own
