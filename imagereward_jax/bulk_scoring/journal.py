"""Journal of finished chunks of a run over many rows, so that a killed run resumes.

OUTPUT.parts/ holds settings.json (the run's settings) and a file per process with one line per finished chunk of rows.
A chunk counts once its line ends in a newline; an incomplete line from a kill is removed. If there are several lines of
a chunk, the last counts. A finished run leaves .OUTPUT.scored.json, which says what the output was made of: the same
command is then told that it is complete.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from imagereward_jax.data.errors import DataError
from imagereward_jax.storage.errors import writing
from imagereward_jax.storage.files import is_temporary, write_text
from imagereward_jax.storage.lock import Lock

SETTINGS, WRITTEN = "settings.json", "written.json"


class Journal:
    """Journal of one output, opened by one process.

    Args:
        output: output file of the run; the journal is the folder OUTPUT.parts beside it.
        settings: dict of settings that must not change on resume.
        process: index of this process.

    Raises:
        DataError: the journal is of another run, or it is damaged. FileExistsError: the folder is of something else.
        LockedError: another process with this index is running. WriteError: it cannot be written.
    """

    def __init__(self, output: str | os.PathLike, settings: dict[str, Any], process: int = 0) -> None:
        self.folder = parts_folder(output)
        path = self.folder / f"{process:05d}.jsonl"
        self._lock = Lock(self.folder / f".{process:05d}.lock", str(output))
        with writing(self.folder):
            if self.folder.exists() and not _is_journal(self.folder):
                raise FileExistsError(f"{self.folder} is where scores are kept until they are written: move it away")
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        try:
            self._check_settings(settings)
            with writing(path):
                self._file = open(path, "a+b")  # noqa: SIM115 (open until `close`)
                _remove_cut_line(self._file)
        except BaseException:
            self._lock.release()
            raise

    def _check_settings(self, settings):
        """Compares with the run that the journal is of; one that has scored nothing is none."""
        path = self.folder / SETTINGS
        there = settings
        if path.exists() and any(b"\n" in part.read_bytes() for part in self.folder.glob("*.jsonl")):
            try:
                there = json.loads(path.read_bytes())
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}: broken JSON ({error}); delete {self.folder} to start over") from error
            if not isinstance(there, dict):
                raise DataError(f"{path}: expected an object; delete {self.folder} to start over")
        changed = [f"{name}: {there.get(name)!r} there, {value!r} now" for name, value in settings.items()
                   if there.get(name) != value]  # fmt: skip
        if changed:
            raise DataError(
                f"{self.folder} belongs to another run ({'; '.join(changed)}); repeat that run's command to finish it, "
                "or delete the folder to start over"
            )
        write_text(path, json.dumps(settings, indent=2) + "\n")

    def done(self) -> dict[int, dict[str, Any]]:
        """Reads {chunk index: {"scores", "errors", "images"}} of all processes.

        Raises:
            DataError: a line is damaged.
        """
        chunks = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            lines = path.read_bytes().split(b"\n")[:-1]
            for number, line in enumerate(lines, 1):
                try:
                    entry = json.loads(line)
                    chunks[entry.pop("chunk")] = {name: entry[name] for name in ("scores", "errors")} | entry
                except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
                    raise DataError(
                        f"{path}, line {number}: damaged; delete this line to score its rows again"
                    ) from error
        return chunks

    def add(self, chunk: int, scores: Sequence[float | None], errors: dict[int, str], images: str) -> None:
        """Records a finished chunk.

        Args:
            scores: None for a skipped image. errors: {row in the chunk: reason}.
            images: changes when the chunk's image files do.
        """
        reasons = {str(index): text for index, text in errors.items()}
        entry = {"chunk": chunk, "scores": scores, "errors": reasons, "images": images}
        with writing(self.folder):
            self._file.write(json.dumps(entry).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def note_output(self, path: Path, made_of: dict[str, Any]) -> None:
        """Records the file that is about to become the output, so that it is known after a kill, and what it is of."""
        write_text(self.folder / WRITTEN, json.dumps({"file": _identity(path), **made_of}))

    def close(self) -> None:
        """Closes the file and releases the lock.

        Raises:
            WriteError: the last lines could not be written; the lock is released all the same.
        """
        try:
            with writing(self.folder):
                self._file.close()
        finally:
            self._lock.release()

    def remove(self) -> None:
        """Deletes the journal of a finished run, all but what says so; it is renamed first, so that no part remains.

        A kill here leaves an output that is known (`made_of`).
        """
        self.close()
        done = _done_folder(self.folder)
        shutil.rmtree(done, ignore_errors=True)
        with writing(self.folder):
            os.replace(self.folder, done)
            os.replace(done / WRITTEN, _record(self.folder))
        shutil.rmtree(done, ignore_errors=True)


def wrote(output: str | os.PathLike) -> bool:
    """Whether the output is that of a run that was killed before it had closed its journal."""
    return _noted(parts_folder(output) / WRITTEN, output) is not None


def made_of(output: str | os.PathLike) -> dict[str, Any] | None:
    """What an output was made of, as `note_output` was told; None if it is not as a finished run left it."""
    folder = parts_folder(output)
    with contextlib.suppress(OSError):  # of a run that was killed just before its end
        os.replace(_done_folder(folder) / WRITTEN, _record(folder))
        shutil.rmtree(_done_folder(folder))
    return _noted(_record(folder), output)


def _noted(path, output):
    with contextlib.suppress(OSError, ValueError, AttributeError):
        noted = json.loads(path.read_bytes())
        if noted.pop("file") == _identity(output):
            return noted
    return None


def _identity(path):
    status = os.stat(path)
    return [status.st_ino, status.st_size, status.st_mtime_ns]


def _is_journal(folder):
    return folder.is_dir() and ((folder / SETTINGS).is_file() or all(map(is_temporary, folder.iterdir())))


def parts_folder(output: str | os.PathLike) -> Path:
    """Returns the journal's folder of an output file."""
    return Path(output).with_name(f"{Path(output).name}.parts")


def _done_folder(folder):
    """What the journal's folder is called while it is deleted."""
    return folder.with_name(f".{folder.name}.done")


def _record(folder):
    """Where a finished run notes what its output is of."""
    return folder.with_name(f".{folder.name.removesuffix('.parts')}.scored.json")


def _remove_cut_line(file):
    file.seek(0)
    data = file.read()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        file.truncate(whole)
