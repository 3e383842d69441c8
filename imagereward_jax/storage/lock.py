"""One process at a time in a folder, on local and on shared file systems; a dead process keeps nothing.

The lock file says who holds it. Two things keep others out, so that one of them may be absent:

- The kernel's `flock`, which ends with its process. On network file systems other hosts may not see it.
- A beat: the holder writes a counter every `BEAT` seconds. Who finds a file of another host watches it for `PATIENCE`
  seconds by its own clock. If the counter stands still, the holder is dead.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Self

BEAT = 5.0
PATIENCE = 3 * BEAT
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # file systems without flock


class LockedError(ValueError):
    """Another process is at work in the folder; the message says which, and what to do."""


class Lock:
    """A lock file, held from `acquire` to `release` or the process's end; also a context manager.

    Args:
        path: the file; it is removed at the end. Its folder has to be there at `acquire`.
        what: what is locked, for the message.
    """

    def __init__(self, path: str | os.PathLike, what: str):
        self.path, self.what = Path(path), what
        self._file, self._id, self._stop = None, uuid.uuid4().hex, threading.Event()
        self._thread = None

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, *_) -> None:
        self.release()

    @property
    def held(self) -> bool:
        return self._file is not None

    def acquire(self) -> None:
        """Takes the lock; does nothing if it is held. May watch another host's beat for `PATIENCE` seconds.

        Raises:
            LockedError: another process holds it; names host, process and time.
            OSError: the file cannot be written.
        """
        if self.held:
            return
        self._file, kernel = self._open()
        try:
            there = self._read()
            if there and not (kernel and there.get("boot") == _boot()):  # else the kernel says that its holder is dead
                self._refuse_if_beating(there)
            self._since = time.strftime("%Y-%m-%d %H:%M:%S %z")
            self._write(0)
        except BaseException:
            self._close()
            raise
        self._thread = threading.Thread(target=self._beat, daemon=True, name=f"lock {self.path.name}")
        self._thread.start()

    def check(self) -> None:
        """Raises LockedError if another host has taken the lock meanwhile, as when this one was suspended."""
        there = self._read() if self.held else None
        if there and there.get("id") != self._id:
            raise self._taken(there)

    def release(self) -> None:
        """Gives the lock back and removes the file."""
        if not self.held:
            return
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if (self._read() or {}).get("id") == self._id:
                self.path.unlink(missing_ok=True)
        self._close()
        self._stop.clear()

    def _open(self):
        """(the file, whether the kernel locks it); opened again if it was removed between the two."""
        while True:
            file, kernel = open(self.path, "a+b", buffering=0), True  # noqa: SIM115 (open until `release`)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                kernel = False
                if error.errno not in _NO_LOCKS:
                    there = self._read()
                    file.close()
                    raise self._taken(there) from None
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(self.path)):
                    return file, kernel
            file.close()

    def _close(self):
        self._file.close()
        self._file = None

    def _read(self):
        """What the file says; None if it is empty, gone, or is being written."""
        try:
            there = json.loads(self.path.read_bytes())
        except (OSError, ValueError, RecursionError):
            return None
        return there if isinstance(there, dict) else None

    def _write(self, beat):
        holder = {"host": socket.gethostname(), "boot": _boot(), "process": os.getpid(), "id": self._id, "beat": beat}
        text = json.dumps({**holder, "since": self._since}).encode()
        self._file.truncate(0)
        self._file.write(text)

    def _refuse_if_beating(self, there):
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            time.sleep(min(0.2, PATIENCE / 10))
            now = self._read()
            if now and (now.get("id"), now.get("beat")) != (there.get("id"), there.get("beat")):
                raise self._taken(now)

    def _beat(self):
        beat = 0
        while not self._stop.wait(BEAT):
            beat += 1
            there = self._read()
            if there and there.get("id") != self._id:
                return  # taken by another host, `check` says so
            with contextlib.suppress(OSError):  # a full disk: the next beat may fit
                self._write(beat)

    def _taken(self, there):
        who = "another process"
        if there:
            who = f"process {there.get('process')} on {there.get('host')}, since {there.get('since')},"
        return LockedError(f"{self.what}: {who} is at work there: wait for it, or choose another")


def _boot():
    """This host's start and this container's processes, among which a process id means one process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()
