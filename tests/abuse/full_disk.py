"""A disk that is full at any moment of a run or of `score`: thirty sizes from nothing to enough.

    python tests/abuse/full_disk.py [train] [score]

prints what happened by size. As root on Linux, where small disks in memory can be mounted. The run is the toy of
tests/training (two phases, evaluations, checkpoints, export); `score` scores 400 rows at random.
"""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from toy import assemble_toy, toy_config, train

from imagereward_jax import score
from imagereward_jax.command import command
from imagereward_jax.training.metric_writers import read_rows

SIZES = 30
WAY_OUT = "free some room and run the same command again"
TIMES = ("time", "images_per_second")


class Tried(NamedTuple):
    """Size of the disk in KiB, exit status, what was said, names left on the disk, and whether the end is equal."""

    size: int
    status: int
    said: str
    left: list[str]
    equal: bool

    @property
    def as_promised(self) -> bool:
        """Whether a failure named a file on the disk and the way out, without a traceback, and the end is equal."""
        clear = "/disk/" in self.said and WAY_OUT in self.said and "Traceback" not in self.said
        return self.equal and (self.status == 0 or (self.status == 1 and clear))


def mount(place: Path, size: int, *more: str) -> bool:
    """Mounts a disk of `size` KiB in memory; whether that was possible."""
    options = ",".join([f"size={size}k", *more])
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True)
    return done.returncode == 0


def unmount(place: Path) -> None:
    subprocess.run(["umount", "-l", place], check=True)


@contextlib.contextmanager
def said() -> Iterator[io.StringIO]:
    """What Python prints meanwhile."""
    text = io.StringIO()
    with contextlib.redirect_stderr(text), contextlib.redirect_stdout(text):
        yield text


def run_toy(folder: Path) -> int:
    """The exit status of a run in `folder`."""
    return command(lambda argv: int(not train(toy_config(steps=12), assemble_toy, folder / "run")))([])


def end_of_toy(folder: Path) -> object:
    rows = [{k: v for k, v in row.items() if k not in TIMES} for row in read_rows(folder / "run/metrics.jsonl")]
    return rows, np.load(folder / "run/export/w.npy").tobytes()


def score_rows(folder: Path) -> int:
    """The exit status of `score` with an output in `folder`, of a table beside it."""
    given = ("--model", "random", "--input", str(folder.parent / "rows.jsonl"), "--batch-size", "2")
    return score.main([*given, "--output", str(folder / "scored.jsonl")])


def end_of_score(folder: Path) -> object:
    return (folder / "scored.jsonl").read_bytes(), sorted(os.listdir(folder))


def write_table(folder: Path) -> None:
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(folder / "image.png")
    rows = [{"image": "image.png", "prompt": f"a cat {i}" + " and a dog" * 20} for i in range(400)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# {name: (runs in a folder, reads how that ended)}
WORK = {"train": (run_toy, end_of_toy), "score": (score_rows, end_of_score)}


def sizes(clean: Path) -> list[int]:
    """From one block to twice what an undisturbed run leaves, in KiB, each larger, denser where little fits."""
    used = sum(path.lstat().st_blocks // 2 for path in clean.rglob("*"))
    return [4 * (1 + step + round(used / 2 * (step / (SIZES - 1)) ** 1.5)) for step in range(SIZES)]


def attempt(disk: Path, size: int, work: Callable[[Path], int], end_of: Callable[[Path], object], expected) -> Tried:
    """Works on a disk of `size` KiB, and again once there is room."""
    mount(disk, size)
    try:
        with said() as text:
            status = work(disk)
        left = sorted(str(path.relative_to(disk)) for path in disk.glob("*/checkpoints/*"))
        left += sorted(path.name for path in disk.iterdir())
        if status:
            mount(disk, 100_000, "remount")
            with said():
                again = work(disk)
        return Tried(size, status, text.getvalue(), left, not (status and again) and end_of(disk) == expected)
    finally:
        unmount(disk)


def try_all(folder: Path, name: str, every: int = 1) -> list[Tried]:
    """Every `every`-th of the sizes, the last one always."""
    work, end_of = WORK[name]
    (clean := folder / "clean").mkdir()
    write_table(folder)
    with said():
        assert work(clean) == 0
    (disk := folder / "disk").mkdir()
    expected, some = end_of(clean), sizes(clean)
    found = [attempt(disk, size, work, end_of, expected) for size in [*some[:-1:every], some[-1]]]
    shutil.rmtree(clean)
    disk.rmdir()
    return found


def main() -> int:
    bad = 0
    for name in sys.argv[1:] or WORK:
        with tempfile.TemporaryDirectory() as folder:
            for one in try_all(Path(folder), name):
                bad += not one.as_promised
                last = (one.said.strip().splitlines() or [""])[-1].replace(folder, "") if one.status else ""
                verdict = "as promised" if one.as_promised else "NOT as promised"
                print(f"{name}: {one.size} KiB: status {one.status}, left {one.left}, {verdict}: {last}", flush=True)
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
