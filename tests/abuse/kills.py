"""Kills at random moments: the same command then ends in the bits of a run that never stopped.

    python tests/abuse/kills.py [--kills 50] [--terms 20] [--scores 10] [--caches 10] [--methods refl ddpo ...]

SIGKILLs and SIGTERMs of tiny runs of every method (`tiny_runs.METHODS`, in turn), SIGKILLs of `score`, and of two
processes that fill one cache. A moment is drawn over an undisturbed run: half of them evenly over its time, half evenly
over its phases, so that short ones are hit too. A run is equal if its metrics but times are, and every file of its
export; a scoring if output and folder are; a cache if its files are.

Commands run in forks of this process, which has imported what they need; they compile quickly, to slower code.
"""

import argparse
import collections
import importlib
import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import conftest  # noqa: F401 (programs compile in less time to slower code, and equal ones once)
from tiny_runs import METHODS, Project, outcome

PATIENCE = 600  # seconds that a command may take on a busy machine
ROWS = 400  # of the table that is scored
CACHED = 64  # rows of the cache, two a shard


class Events:
    """The phases that a command goes through, as lines of a file: seconds, phase."""

    def __init__(self, path: Path, first: str = "starting"):
        self.path, self.outer = path, [first]

    def note(self) -> None:
        with self.path.open("a") as file:
            file.write(f"{time.monotonic()} {self.outer[-1]}\n")

    def watch(self, owner: Any, name: str, phase: str) -> None:
        """Notes when a function of a class or module begins and ends."""
        original = getattr(owner, name)

        def watched(*arguments, **options):
            self.outer.append(phase)
            self.note()
            try:
                return original(*arguments, **options)
            finally:
                self.outer.pop()
                self.note()

        setattr(owner, name, watched)

    def read(self) -> list[tuple[float, str]]:
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        found = [line.partition(" ") for line in lines]
        return [(float(seconds), phase) for seconds, _, phase in found if phase]


def watch_training(events: Events) -> None:
    from imagereward_jax.assembly import class_images
    from imagereward_jax.data.cache import Cache
    from imagereward_jax.training import loop
    from imagereward_jax.training.explore import Explore

    events.watch(class_images, "make_images", "class images")
    events.watch(Cache, "fill", "filling the cache")
    events.watch(Explore, "_collect", "rollout")
    for name, phase in {
        "__init__": "restoring",
        "run": "between steps",
        "_evaluate": "evaluating",
        "_compile": "compiling",
        "_updates": "updating",
        "_save": "saving",
    }.items():
        events.watch(loop._Loop, name, phase)
    events.watch(loop, "write_export", "exporting")
    events.watch(loop, "write_ending", "ending")


def watch_scoring(events: Events) -> None:
    from imagereward_jax.bulk_scoring import score_table
    from imagereward_jax.bulk_scoring.journal import Journal

    for name in ("add", "note_output", "remove"):
        events.watch(Journal, name, {"add": "scoring"}.get(name, "writing the output"))
    events.watch(score_table, "write_rows", "writing the output")


class Child:
    """A function in a fork: its exit status is what it returns, what it prints goes to a file."""

    def __init__(self, function: Callable[[], int], log: Path):
        self.log, self.status = log, None
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                with log.open("w") as file:
                    os.dup2(file.fileno(), 1)
                    os.dup2(file.fileno(), 2)
                status = function()
            except SystemExit as stop:
                status = stop.code
            finally:
                sys.stdout.flush()
                os._exit(status if isinstance(status, int) else 1)

    def ended(self) -> bool:
        """Whether it ended; its status is then as of `subprocess`."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status is not None

    def wait(self) -> int:
        """The exit status; a command that takes longer than `PATIENCE` is killed."""
        end = time.monotonic() + PATIENCE
        while not self.ended():
            time.sleep(0.01)
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
        return self.status


class Work(NamedTuple):
    """start(folder, events file) starts the command; end_of(folder) is how it ended, to be compared."""

    start: Callable[[Path, Path], list[Child]]
    end_of: Callable[[Path], Any]


def training(project: Project, method: str) -> Work:
    def start(folder, path):
        def run():
            from imagereward_jax.train import main

            os.chdir(project.folder)
            sys.path.insert(0, str(project.folder))
            events = Events(path)
            watch_training(events)
            events.note()
            cache = [f"--config.data.cache={folder / 'cache'}"] if method == "dpo" else []
            status = main(project.train(method, folder / "run", *cache))
            events.note()
            return status

        return [Child(run, folder / "log")]

    return Work(start, lambda folder: outcome(folder / "run"))


def scoring(project: Project) -> Work:
    def start(folder, path):
        def run():
            from imagereward_jax.score import main

            os.chdir(project.folder)
            events = Events(path)
            watch_scoring(events)
            events.note()
            status = main(project.score(ROWS, folder / "output/scored.jsonl"))
            events.note()
            return status

        (folder / "output").mkdir(exist_ok=True)
        return [Child(run, folder / "log")]

    def end_of(folder):
        return {path.name: path.read_bytes() for path in (folder / "output").glob("[!.]*")}

    return Work(start, end_of)


def filling() -> Work:
    """Two processes fill one cache, a hundredth of a second a shard."""
    import numpy as np

    from imagereward_jax.data import cache
    from imagereward_jax.weights.files import read_tensors

    def encode(rows):
        time.sleep(0.01)
        return {"square": np.array([[row**2] * 5_000 for row in rows])}

    def fill(folder, path, index):
        cache.ROWS_PER_SHARD = 2
        events = Events(path, "computing a shard") if index == 0 else None
        if events:
            events.watch(cache, "write_safetensors", "writing a shard")
            events.note()

        def wait():
            (folder / f"filled.{index}").touch()
            while not (folder / f"filled.{1 - index}").exists():
                time.sleep(0.001)

        opened = cache.open_cache(folder / "cache", {"seed": 3}, CACHED)
        opened.fill(encode, lambda: encode([0]), process_index=index, process_count=2, wait=wait)
        if events:
            events.note()
        return int([opened[row]["square"][0] for row in range(CACHED)] != [row**2 for row in range(CACHED)])

    def start(folder, path):
        for old in folder.glob("filled.*"):
            old.unlink()
        return [Child(lambda index=index: fill(folder, path, index), folder / f"log{index}") for index in (0, 1)]

    def end_of(folder):  # the order of a file's metadata is no matter
        files = {path.name: path for path in (folder / "cache").iterdir()}
        tensors = {name for name in files if name.endswith(".safetensors")}
        arrays = {name: read_tensors(files[name])["square"].tobytes() for name in tensors}
        return arrays | {name: path.read_bytes() for name, path in files.items() if name not in tensors}

    return Work(start, end_of)


class Clean(NamedTuple):
    """An undisturbed run: how it ended, and the seconds from each of its events to the next."""

    end: Any
    events: list[str]
    seconds: list[float]


def undisturbed(work: Work, folder: Path) -> Clean:
    folder.mkdir(parents=True)
    for child in work.start(folder, folder / "events"):
        if child.wait():
            raise RuntimeError(f"an undisturbed run ended with {child.status}: {child.log.read_text()[-2000:]}")
    times = Events(folder / "events").read()
    seconds = [after - before for (before, _), (after, _) in itertools.pairwise(times)]
    return Clean(work.end_of(folder), [phase for _, phase in times[:-1]], seconds)


def draw(clean: Clean, rng: random.Random, even: bool) -> tuple[int, float]:
    """(number of the event, seconds after it) of a moment, evenly over time, or over phases and then their events."""
    if even:
        index = rng.choices(range(len(clean.events)), clean.seconds)[0]
    else:
        phase = rng.choice(sorted(set(clean.events)))
        index = rng.choice([i for i, name in enumerate(clean.events) if name == phase])
    return index, rng.random() * clean.seconds[index]


def killed(work: Work, folder: Path, number: int, moment: tuple[int, float]) -> tuple[list[int], str] | None:
    """(exit statuses, phase) of a run that gets a signal at a moment; None if it ended before."""
    index, seconds = moment
    path = folder / "events"
    path.unlink(missing_ok=True)
    children = work.start(folder, path)
    while len(Events(path).read()) <= index and not children[0].ended():
        time.sleep(0.002)
    time.sleep(seconds)
    early = all([child.ended() for child in children])
    phase = (Events(path).read() or [(0, "starting")])[-1][1]
    for child in children:
        if not child.ended():
            os.kill(child.pid, number)
    if list(folder.glob("run/checkpoints/*.orbax-checkpoint-tmp*")):
        phase += ", a checkpoint half-written"
    statuses = [child.wait() for child in children]
    return None if early else (statuses, phase)


class Result(NamedTuple):
    """What was killed, by which signal, in which phase, and whether all was as promised; else why not."""

    name: str
    number: int
    phase: str
    fault: str


def attempt(name: str, work: Work, clean: Clean, folder: Path, number: int, rng: random.Random) -> Result:
    """Kills, starts again, compares; draws again if the run ended before the moment."""
    found = None
    while found is None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        found = killed(work, folder, number, draw(clean, rng, rng.random() < 0.5))
    statuses, phase = found
    stopped = {-number, 0} if number == signal.SIGKILL else {-number, 128 + number, 0}
    if not set(statuses) <= stopped:
        return Result(name, number, phase, f"ended with {statuses}: {(folder / 'log').read_text()[-500:]}")
    children = work.start(folder, folder / "events again")
    if any([child.wait() for child in children]):
        return Result(name, number, phase, f"did not continue: {children[0].log.read_text()[-500:]}")
    end = work.end_of(folder)
    differ = [key for key in clean.end.keys() | end.keys() if clean.end.get(key) != end.get(key)]
    if differ:
        return Result(name, number, phase, f"differs: {', '.join(sorted(differ))}")
    shutil.rmtree(folder)
    return Result(name, number, phase, "")


def table(results: Sequence[Result]) -> str:
    """The results by signal and phase, as a table of Markdown, and how many there are of each method."""
    rows = collections.defaultdict(list)
    for one in results:
        what = "training" if one.name in METHODS else one.name
        rows[signal.Signals(one.number).name, what, one.phase].append(not one.fault)
    lines = ["| signal | of | in the phase | tried | equal |", "| --- | --- | --- | ---: | ---: |"]
    lines += [f"| {' | '.join(row)} | {len(equal)} | {sum(equal)} |" for row, equal in sorted(rows.items())]
    lines.append(f"| **all** | | | {len(results)} | {sum(not one.fault for one in results)} |")
    methods = collections.Counter(one.name for one in results if one.name in METHODS)
    return "\n".join([*lines, "", "By method: " + ", ".join(f"`{name}` {count}" for name, count in methods.items())])


def import_all() -> None:
    """Imports what the commands import, before the forks; starts no device."""
    names = ("grain.python", "orbax.checkpoint", "optax", "PIL.PngImagePlugin", "ml_collections.config_flags")
    names += ("transformers.models.clip.tokenization_clip", "safetensors.numpy")
    for name in (*names, *(f"imagereward_jax.{own}" for own in ("score", "train", "trainer", "pipelines.families"))):
        importlib.import_module(name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, count in (("kills", 50), ("terms", 20), ("scores", 10), ("caches", 10), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    args, begin = parser.parse_args(), time.monotonic()
    import_all()
    rng, results, cleans = random.Random(args.seed), [], {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        project = Project(folder / "project")
        made = Child(lambda: project.make() or 0, folder / "log")  # this process starts no device, so that it can fork
        if made.wait():
            raise RuntimeError(made.log.read_text())
        works = {method: training(project, method) for method in args.methods}
        works |= {"score": scoring(project), "two processes that fill a cache": filling()}
        score, cache = list(works)[-2:]
        plan = [(cache, signal.SIGKILL)] * args.caches + [(score, signal.SIGKILL)] * args.scores
        numbers = [signal.SIGKILL] * args.kills + [signal.SIGTERM] * args.terms
        rng.shuffle(numbers)
        plan += [(args.methods[index % len(args.methods)], number) for index, number in enumerate(numbers)]
        for name, number in plan:
            if name not in cleans:
                cleans[name] = undisturbed(works[name], folder / "clean" / name)
            results.append(attempt(name, works[name], cleans[name], folder / "killed", number, rng))
            one, now = results[-1], time.monotonic() - begin
            said = f"{one.name}, {signal.Signals(number).name}, {one.phase}: {one.fault or 'equal'}"
            print(f"{now:.0f} s: {said}", flush=True)
        print(table(results))
    return int(any(one.fault for one in results))


if __name__ == "__main__":
    sys.exit(main())
