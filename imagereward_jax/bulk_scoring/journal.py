"""Journal of finished chunks of a run over many rows, so that a killed run resumes.

OUTPUT.parts/ holds settings.json (the run's settings) and a file per process with one line per finished chunk of rows.
A chunk counts once its line ends in a newline; an incomplete line from a kill is removed.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from imagereward_jax.data.errors import DataError
from imagereward_jax.storage.files import write_text

SETTINGS = "settings.json"


class Journal:
    """Journal of one output, opened by one process.

    Args:
        output: output file of the run; the journal is the folder OUTPUT.parts beside it.
        settings: dict of settings that must not change on resume.
        process: index of this process.

    Raises:
        DataError: another process with this index is running, the journal is of another run, or it is damaged.
    """

    def __init__(self, output: str | os.PathLike, settings: dict[str, Any], process: int = 0) -> None:
        self.folder = parts_folder(output)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._check_settings(settings)
        path = self.folder / f"{process:05d}.jsonl"
        self._file = open(path, "a+b")  # noqa: SIM115 (open until `close`, and with it the lock)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise DataError(
                f"{path}: another process is writing this file; wait for it, or choose another output"
            ) from error
        _remove_cut_line(self._file)

    def _check_settings(self, settings):
        path = self.folder / SETTINGS
        if not path.exists():
            write_text(path, json.dumps(settings, indent=2) + "\n")
            return
        try:
            there = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise DataError(f"{path}: broken JSON ({error}); delete {self.folder} to start over") from error
        changed = [f"{name}: {there.get(name)!r} there, {value!r} now" for name, value in settings.items()
                   if there.get(name) != value]  # fmt: skip
        if changed:
            raise DataError(
                f"{self.folder} belongs to another run ({'; '.join(changed)}); repeat that run's command to finish it, "
                "or delete the folder to start over"
            )

    def done(self) -> dict[int, dict[str, Any]]:
        """Reads {chunk index: {"scores", "errors"}} of all processes.

        Raises:
            DataError: a line is damaged.
        """
        chunks = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            lines = path.read_bytes().split(b"\n")[:-1]
            for number, line in enumerate(lines, 1):
                try:
                    entry = json.loads(line)
                    chunks.setdefault(entry.pop("chunk"), entry)
                except (ValueError, KeyError, AttributeError) as error:
                    raise DataError(
                        f"{path}, line {number}: damaged; delete this line to score its rows again"
                    ) from error
        return chunks

    def add(self, chunk: int, scores: Sequence[float | None], errors: dict[int, str]) -> None:
        """Records a finished chunk: `scores` with None for a skipped image, `errors` {row in the chunk: reason}."""
        entry = {"chunk": chunk, "scores": scores, "errors": {str(index): text for index, text in errors.items()}}
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file and releases the lock."""
        self._file.close()

    def remove(self) -> None:
        """Deletes the journal of a finished run; it is renamed first, so that no partial journal remains."""
        self.close()
        done = self.folder.with_name(f".{self.folder.name}.done")
        shutil.rmtree(done, ignore_errors=True)
        os.replace(self.folder, done)
        shutil.rmtree(done, ignore_errors=True)


def parts_folder(output: str | os.PathLike) -> Path:
    """Returns the journal's folder of an output file."""
    return Path(output).with_name(f"{Path(output).name}.parts")


def _remove_cut_line(file):
    file.seek(0)
    data = file.read()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        file.truncate(whole)
