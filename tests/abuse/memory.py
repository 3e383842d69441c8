"""Memory over thousands of steps and rows: resident set, Python's objects and jax's arrays, from start to end.

    python tests/abuse/memory.py [NAME ...] [--times N]

Each of `WORK` runs in a process of its own: "train", the toy of tests/training (two phases, 2,000 steps, an evaluation,
a checkpoint and a log row every 50); "policy", its on-policy toy (500 steps of four updates); "score", a table of
20,000 rows of small images through a tiny scorer. --times 0.1 makes a tenth of the steps.

Prints MiB after a tenth, half and all of the work, and the slope of a line through the samples after that tenth.
"""

import argparse
import contextlib
import gc
import itertools
import json
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

PAGE = 4096
SAMPLES = 200


def resident() -> float:
    """MiB of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 2**20


@contextlib.contextmanager
def sampled(owner: type, name: str, count: int, rows: list) -> Iterator[None]:
    """Appends (calls so far, MiB, Python's objects, jax's arrays) to `rows`, over `count` calls of a method.

    Objects are counted twice alone, for it takes long: at half of the calls and at the last.
    """
    original, calls = getattr(owner, name), itertools.count(1)

    def watched(*arguments, **options):
        result, call = original(*arguments, **options), next(calls)
        counts = (np.nan, np.nan)
        if call in (count // 2, count):
            gc.collect()
            counts = (len(gc.get_objects()), len(jax.live_arrays()))
        if call % max(1, count // SAMPLES) == 0 or call in (count // 2, count):
            rows.append((call, resident(), *counts))
        return result

    with mock.patch.object(owner, name, watched):
        yield


def train_toy(folder: Path, steps: int, rows: list) -> int:
    """A run of two phases; its steps."""
    from toy import assemble_toy, toy_config, train

    from imagereward_jax.training.loop import _Loop

    every = dict.fromkeys(("log_every", "eval.every", "checkpoint.every"), 50)
    with sampled(_Loop, "_advance", steps, rows):
        train(toy_config(**{"steps": steps, **every}), assemble_toy, folder / "run")
    return steps


def train_policy(folder: Path, steps: int, rows: list) -> int:
    """A run on policy; its steps."""
    from toy import train
    from toy_policy import assemble_policy, policy_config

    from imagereward_jax.training.loop import _Loop

    config = policy_config()
    config.update_from_flattened_dict({"steps": steps, "log_every": 50, "checkpoint.every": 50, "eval.every": steps})
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


WORK = {"train": (train_toy, 2_000), "policy": (train_policy, 500), "score": (score_table, 20_000)}


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
        "objects": warm[-1, 2] - half[2],
        "arrays": warm[-1, 3] - half[3],
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
            f"MiB, {found['per_thousand']:+.2f} MiB per 1,000; in the second half {found['objects']:+.0f} objects, "
            f"{found['arrays']:+.0f} arrays",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
