"""Memory over thousands of steps and rows: of the process, blocks of Python and of malloc, jax's arrays.

    python tests/abuse/memory.py [NAME ...] [--times N]

Each of `WORK` runs in a process of its own: "steps", the toy of tests/training (two phases, 2,000 steps, a log row
every 50); "train", the same with an evaluation and a checkpoint every 50; "policy", its on-policy toy (500 steps of
four updates); "score", a table of 20,000 rows of small images through a tiny scorer. --times 0.1 makes a tenth of the
steps.

Prints MiB after a tenth, half and all of the work, the slope of a line through the samples after that tenth, and what
the second half added: in use by malloc, blocks of Python's own allocator, which takes what is small, and jax's arrays.
"""

import argparse
import contextlib
import ctypes
import functools
import gc
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import jax
import numpy as np
from PIL import Image

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "training")]

SAMPLES = 200
NEVER = 10**6  # steps


def resident() -> float:
    """MiB that this process holds in memory, without pages of files, which the kernel drops and reads as it likes."""
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**10


class Mallinfo(ctypes.Structure):
    """What glibc says of malloc (mallinfo2), in bytes."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def used() -> tuple[float, int, int]:
    """(MiB in use by malloc, blocks of Python's allocator, jax's arrays), after a collection."""
    gc.collect()
    mallinfo = ctypes.CDLL("libc.so.6").mallinfo2
    mallinfo.restype = Mallinfo
    return mallinfo().uordblks / 2**20, sys.getallocatedblocks(), len(jax.live_arrays())


@contextlib.contextmanager
def sampled(owner: type, name: str, count: int, rows: list) -> Iterator[None]:
    """Appends (calls so far, MiB, *used()) to `rows`, over `count` calls of a method.

    `used` is called twice alone, for a collection takes long: at half of the calls and at the last.
    """
    original, calls = getattr(owner, name), itertools.count(1)

    def watched(*arguments, **options):
        result, call = original(*arguments, **options), next(calls)
        counts = used() if call in (count // 2, count) else (np.nan,) * 3
        if call <= count and (call % max(1, count // SAMPLES) == 0 or call in (count // 2, count)):
            rows.append((call, resident(), *counts))
        return result

    with mock.patch.object(owner, name, watched):
        yield


def train_toy(folder: Path, steps: int, rows: list, every: int) -> int:
    """A run of two phases, an evaluation and a checkpoint `every` steps, and a last step that is not counted."""
    from toy import assemble_toy, toy_config, train

    from imagereward_jax.training.loop import _Loop

    fields = {"steps": steps + 1, "log_every": 50, "eval.every": every, "checkpoint.every": every}
    with sampled(_Loop, "_advance", steps, rows):
        train(toy_config(**fields), assemble_toy, folder / "run")
    return steps


def train_policy(folder: Path, steps: int, rows: list) -> int:
    """A run on policy, a checkpoint every 50 steps, and a last step that is not counted."""
    from toy import train
    from toy_policy import assemble_policy, policy_config

    from imagereward_jax.training.loop import _Loop

    config = policy_config()
    fields = {"steps": steps + 1, "log_every": 50, "checkpoint.every": 50, "eval.every": NEVER}
    config.update_from_flattened_dict(fields)
    with sampled(_Loop, "_advance", steps, rows):
        train(config, assemble_policy, folder / "run")
    return steps


def score_table(folder: Path, count: int, rows: list) -> int:
    """`score` over a table; its rows."""
    from tiny_runs import save_scorer

    from imagereward_jax import score
    from imagereward_jax.bulk_scoring.journal import Journal

    save_scorer(folder / "scorer")
    rng = np.random.default_rng(0)
    for index in range(50):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / f"{index}.png")
    lines = [json.dumps({"image": f"{i % 50}.png", "prompt": f"a red circle {i}"}) for i in range(count)]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    given = ("--model", str(folder / "scorer"), "--batch-size", "20", "--workers", "2")
    with sampled(Journal, "add", count // 20, rows):
        done = score.main([*given, "--input", str(folder / "rows.jsonl"), "--output", str(folder / "scored.jsonl")])
    assert done == 0
    return count


WORK = {
    "steps": (functools.partial(train_toy, every=NEVER), 2_000),
    "train": (functools.partial(train_toy, every=50), 2_000),
    "policy": (train_policy, 500),
    "score": (score_table, 20_000),
}


def measure(work: Callable[[Path, int, list], int], count: int) -> dict[str, float]:
    """MiB after a tenth, half and all of the work, MiB per 1,000 steps or rows, and what was added in number."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        done = work(Path(folder), count, rows)
    warm = np.array(rows[len(rows) // 10 :], float)
    half = warm[np.flatnonzero(~np.isnan(warm[:, 2]))[0]]
    slope = np.polyfit(warm[:, 0] * done / warm[-1, 0], warm[:, 1], 1)[0] * 1_000
    return {
        "count": done,
        "start": warm[0, 1],
        "middle": half[1],
        "end": warm[-1, 1],
        "per_thousand": slope,
        **dict(zip(("malloc", "blocks", "arrays"), warm[-1, 2:] - half[2:])),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(WORK)}; default: all")
    parser.add_argument("--times", type=float, default=1.0, help="how much of the work")
    parser.add_argument("--here", action="store_true", help="in this process, one of them, as a line of JSON")
    args = parser.parse_args()
    if unknown := set(args.names) - set(WORK):
        parser.error(f"{min(unknown)} is none of {', '.join(WORK)}")
    if args.here:
        work, count = WORK[args.names[0]]
        print(json.dumps(measure(work, round(count * args.times))))
        return 0
    for name in args.names or WORK:
        command = [sys.executable, __file__, name, "--here", "--times", str(args.times)]
        found = json.loads(
            subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout.splitlines()[-1]
        )
        print(
            f"{name}: {found['count']} steps or rows: {found['start']:.1f}, {found['middle']:.1f}, {found['end']:.1f} "
            f"MiB, {found['per_thousand']:+.2f} MiB per 1,000; in the second half {found['malloc']:+.2f} MiB of "
            f"malloc, {found['blocks']:+.0f} blocks, {found['arrays']:+.0f} arrays",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
