"""Rows of arrays that were computed once, on disk: sharded safetensors files, as a random-access source.

FOLDER/cache.json                   what made it, and how many rows there are
FOLDER/shard_00000.safetensors ...  `ROWS_PER_SHARD` rows each, by name [n, ...]; a file is there whole or not at all
FOLDER/empty.safetensors            the row of the empty prompt
"""

import json
from pathlib import Path

from imagereward_jax.data.errors import DataError
from imagereward_jax.weights.files import read_json, read_tensors, write_safetensors

MANIFEST, EMPTY = "cache.json", "empty.safetensors"
FORMAT = "imagereward-jax cache 1"
ROWS_PER_SHARD = 256


class CacheError(DataError):
    """A cache was made by other settings, or is damaged; the message says what differs and what to do."""


class Cache:
    """A folder of shards; made, or continued, by `open_cache`. Item i is a dict of arrays."""

    def __init__(self, folder, rows):
        self.folder, self.rows = Path(folder), rows
        self._shards = {}

    def __len__(self):
        return self.rows

    def __getitem__(self, index):
        if not 0 <= index < self.rows:
            raise IndexError(f"index {index} is outside a cache of {self.rows} rows")
        shard, row = divmod(int(index), ROWS_PER_SHARD)
        if shard not in self._shards:
            self._shards[shard] = self._read(shard)
        return {name: array[row] for name, array in self._shards[shard].items()}

    def __getstate__(self):
        """Without the files that are mapped into memory: a worker process opens its own."""
        return {"folder": self.folder, "rows": self.rows, "_shards": {}}

    def rows_of(self, shard):
        """The range of rows in a shard."""
        return range(shard * ROWS_PER_SHARD, min((shard + 1) * ROWS_PER_SHARD, self.rows))

    def missing(self):
        """Numbers of the shards that are not on disk."""
        count = -(-self.rows // ROWS_PER_SHARD)
        return [shard for shard in range(count) if not self._path(shard).is_file()]

    def write(self, shard, arrays):
        """Writes a shard: arrays by name, with the rows of `rows_of` first."""
        write_safetensors(self._path(shard), arrays)

    def empty(self):
        """The row of the empty prompt, or None before `write_empty`."""
        path = self.folder / EMPTY
        return read_tensors(path) if path.is_file() else None

    def write_empty(self, arrays):
        """Writes the row of the empty prompt."""
        write_safetensors(self.folder / EMPTY, arrays)

    def _path(self, shard):
        return self.folder / f"shard_{shard:05d}.safetensors"

    def _read(self, shard):
        arrays, expected = read_tensors(self._path(shard)), len(self.rows_of(shard))
        if any(len(array) != expected for array in arrays.values()):
            raise CacheError(f"{self._path(shard)}: expected {expected} rows of everything; delete it and run again")
        return arrays


def open_cache(folder, fingerprint, rows):
    """The `Cache` in a folder, which is made if absent.

    Args:
        fingerprint: what the rows follow from, a flat dict for JSON.
        rows: how many there are to be.

    Raises:
        CacheError: the folder was made by something else; names every field that differs.
        FileExistsError: the folder holds other files.
    """
    folder = Path(folder)
    made_by = json.loads(json.dumps({**fingerprint, "rows": rows}))
    if not (folder / MANIFEST).is_file():
        if folder.exists() and any(folder.iterdir()):
            raise FileExistsError(f"{folder} exists and is no cache (no {MANIFEST}): choose another config.data.cache")
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{MANIFEST}.partial"
        partial.write_text(json.dumps({"format": FORMAT, "made_by": made_by}, indent=2) + "\n", encoding="utf-8")
        partial.replace(folder / MANIFEST)
        return Cache(folder, rows)
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise CacheError(f"{folder / MANIFEST}: format is {manifest.get('format')!r}, expected {FORMAT!r}")
    there = manifest["made_by"]
    differ = [name for name in sorted(there.keys() | made_by.keys()) if there.get(name) != made_by.get(name)]
    if differ:
        changes = "; ".join(f"{name}: {there.get(name)!r} there, {made_by.get(name)!r} now" for name in differ)
        raise CacheError(
            f"{folder} was computed with other settings ({changes}): pass what it was made with, or another "
            "config.data.cache"
        )
    return Cache(folder, rows)
