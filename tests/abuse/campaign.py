"""Bad inputs by kind, through the commands' own `main`: how many are refused in clear words.

`python tests/abuse/campaign.py [--every N] [--taken]` tries every N-th of each kind and prints a table; with --taken
also each input that was taken.

The commands run in this process, without what would compile: sampling, scoring and training are replaced by nothing,
so that an input that is taken ends with status 0. Each case has a limit of time and of address space.
"""

import argparse
import collections
import contextlib
import io
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

SECONDS = 20  # of wall-clock time; the machine may be busy
MEMORY = 500 * 2**20  # more than before the case
ROOT = Path(__file__).parents[2]
WRONG = (None, True, -1, 0, 1e9, float("nan"), "x", [], ["x"], {}, {"a": 1}, 10**30)
NUMBERS = ("nan", "inf", "-1", "0", "1e12", "1000000000000", "x")
DEEP = "[" * 100_000

CLEAR, TAKEN, UNCLEAR, TRACEBACK, HANG, LIMIT = "clear", "taken", "unclear", "traceback", "hang", "over its limit"
OUTCOMES = (CLEAR, TAKEN, UNCLEAR, TRACEBACK, HANG, LIMIT)
KNOWN = re.compile(r"error: .*\S", re.DOTALL)


class Case(NamedTuple):
    """A bad input. spoil() makes it, and returns what undoes it; run() is the command; names: of which a clear refusal
    names one."""

    kind: str
    name: str
    spoil: Callable[[], Callable[[], None]]
    run: Callable[[], int]
    names: tuple[str, ...]


class Hang(BaseException):
    """A case is over its time."""


class Place:
    """A folder with one of each file that the commands read, whole."""

    def __init__(self, folder: Path):
        import tiny_sd1

        from imagereward_jax.weights.hub import resolve_model

        self.folder = folder
        self.model = tiny_sd1.save_one_level(folder)
        self.flow = shutil.copytree(resolve_model("tiny-shapes-sd3", allow_patterns=None), folder / "flow")
        self.reward = shutil.copytree(resolve_model("tiny-shapes", allow_patterns=None) / "reward", folder / "reward")
        self.image = folder / "image.png"
        Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(self.image)
        for name in ("image.jpg", "image.webp", "image.gif", "image.bmp", "image.tif"):
            Image.open(self.image).save(folder / name)
        rows = [{"image": "image.png", "prompt": f"a cat {i}"} for i in range(4)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "rows.json").write_text(json.dumps(rows))
        (folder / "rows.csv").write_text("image,prompt\n" + "".join(f"image.png,a cat {i}\n" for i in range(4)))
        (folder / "prompts.txt").write_text("a cat\na dog\n")
        ranked = [{"id": 1, "prompt": "a", "generations": ["image.png", "image.jpg"], "ranking": [1, 2]}]
        (folder / "ranked.json").write_text(json.dumps(ranked))
        np.save(folder / "noise.npy", np.zeros((1, 8, 8, 4), np.float32))
        shutil.copy(ROOT / "configs/refl_tiny.py", folder / "recipe.py")
        for stray in ("shapes_pretrain.py", "refl_tiny.py"):
            shutil.copy(ROOT / "configs" / stray, folder / stray)

    def generate(self, *more: str, model: Path | None = None) -> Callable[[], int]:
        from imagereward_jax import generate

        flags = ["--model", str(model or self.model), "--out", str(self.folder / "out"), "--overwrite", *more]
        return lambda: generate.main(flags if "--prompts" in more else [*flags, "--prompt", "a cat"])

    def score(self, *more: str) -> Callable[[], int]:
        from imagereward_jax import score

        return lambda: score.main(list(more))

    def score_image(self, name: str = "image.png") -> Callable[[], int]:
        return self.score("--model", "random", "--prompt", "a", str(self.folder / name))

    def score_table(self, name: str, *more: str) -> Callable[[], int]:
        output = ("--output", str(self.folder / "scored.jsonl"), "--overwrite")
        return self.score("--model", "random", "--input", str(self.folder / name), *output, *more)

    def evaluate(self, *more: str) -> Callable[[], int]:
        from imagereward_jax import evaluate

        return lambda: evaluate.main(["--model", "random", *more])

    def train(self, config: Path, *more: str) -> Callable[[], int]:
        from imagereward_jax import train

        def run():
            sys.modules.pop("config_config", None)  # ml_collections reads every config file into one module
            return train.main(["train", f"--config={config}", f"--workdir={self.folder / 'run'}", *more])

        return run


@contextlib.contextmanager
def without_work() -> Iterator[None]:
    """Replaces what compiles: an image is black, a score is 0, a training is over."""

    def make_draw(pipeline, params, sampler, args, **_):
        def draw(requests):
            return np.zeros((len(requests), 8, 8, 3), np.float32)

        draw.batch = 4
        return draw

    def inference_rank(self, prompt, images):
        return [1] * len(images), [0.0] * len(images)

    with (
        mock.patch("imagereward_jax.generate.make_draw", make_draw),
        mock.patch("imagereward_jax.rewards.base.Reward.inference_rank", inference_rank),
        mock.patch("imagereward_jax.training.loop.train", lambda *_, **__: True),
        mock.patch.dict(os.environ, {"HF_HUB_OFFLINE": "1"}),
    ):
        yield


def rewritten(path: Path, data: bytes | str) -> Callable[[], Callable[[], None]]:
    """Makes a file hold `data`; undone by what it held."""

    def spoil():
        before = path.read_bytes()
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return lambda: path.write_bytes(before)

    return spoil


def nothing() -> Callable[[], None]:
    return lambda: None


def settings_cases(place: Place) -> Iterator[Case]:
    """Every field of every settings file times every wrong type, and files that are no such JSON."""
    model = [
        *(f"{part}/config.json" for part in ("unet", "vae", "text_encoder")),
        *("scheduler/scheduler_config.json", "model_index.json", "generation_config.json"),
        "tokenizer/tokenizer_config.json",
    ]
    files = [(place.model / name, place.generate()) for name in model if (place.model / name).is_file()]
    score = place.score("--model", str(place.reward), "--prompt", "a", str(place.image))
    files.append((place.reward / "config.json", score))
    of_flows = ("transformer/config.json", "text_encoder_3/config.json", "scheduler/scheduler_config.json")
    files += [(place.flow / name, place.generate(model=place.flow)) for name in of_flows]
    for path, run in files:
        whole, part = json.loads(path.read_text()), str(path.parent)
        kind = f"settings: {path.name}" if path.name != "config.json" else f"settings: {path.parent.name}/config.json"
        kind += " (a flow's)" if path.parents[1] == place.flow else ""
        for where in _fields(whole):
            for value in WRONG:
                changed = _changed(whole, where, value)
                if changed != whole:
                    text, name = json.dumps(changed), ".".join(where)
                    yield Case(kind, f"{name}={value!r:.40}", rewritten(path, text), run, (*where, path.name, part))
        for name, text in {"deep": DEEP, "long number": f'{{"a": {"9" * 5000}}}', "no UTF-8": b"\xff{}"}.items():
            yield Case(kind, name, rewritten(path, text), run, (path.name, str(path.parent)))


def _fields(tree, prefix=()):
    for name, value in tree.items():
        yield (*prefix, name)
        if isinstance(value, dict):
            yield from _fields(value, (*prefix, name))


def _changed(tree, where, value):
    first, *rest = where
    return {**tree, first: _changed(tree[first], rest, value) if rest else value}


def config_cases(place: Place) -> Iterator[Case]:
    """Every numeric field of runs' configs times bad numbers."""
    from ml_collections import ConfigDict

    from imagereward_jax.recipes import default_config

    recipes = {"refl": "refl_tiny", "ddpo": "ddpo_tiny", "ranking": "imagereward_tiny", "reward_gradient": "draft_tiny"}
    for method, recipe in recipes.items():
        for where in _fields(default_config(method).to_dict()):
            name = ".".join(where)
            value = default_config(method)
            for part in where:
                value = value[part]
            if isinstance(value, bool | str | tuple | ConfigDict):
                continue
            for text in NUMBERS:
                flag = f"--config.{name}={text}"
                run = place.train(ROOT / f"configs/{recipe}.py", flag)
                yield Case("config fields", f"{method} {flag}", nothing, run, (name, where[-1]))


def flag_cases(place: Place) -> Iterator[Case]:
    """Every numeric flag times bad numbers."""
    generating = "num-images guidance-scale steps eta height width seed batch-size lora-scale tuned-weight tuned-steps"
    scoring, evaluating = "batch-size workers", "limit k show resamples level seed workers batch-size"
    shapes = ("--data", str(place.folder / "ranked.json"))
    for name, text in itertools.product(generating.split(), NUMBERS):
        flag = f"--{name}={text}"
        yield Case("flags: generate", flag, nothing, place.generate(flag), (name, name.replace("-", "_")))
    for name, text in itertools.product(scoring.split(), NUMBERS):
        flag = f"--{name}={text}"
        yield Case("flags: score", flag, nothing, place.score_table("rows.csv", flag), (name,))
    for name, text in itertools.product(evaluating.split(), NUMBERS):
        flag = f"--{name}={text}"
        yield Case("flags: evaluate", flag, nothing, place.evaluate(*shapes, flag), (name,))


def file_cases(place: Place) -> Iterator[Case]:
    """Every kind of file, empty, cut, with flipped bits, of another kind."""
    rng, at = random.Random(0), place.folder
    images = {name: place.score_image(name) for name in ("image.png", "image.jpg", "image.webp", "image.gif")}
    tables = {name: place.score_table(name) for name in ("rows.jsonl", "rows.json", "rows.csv")}
    runs = {
        **{at / name: run for name, run in {**images, **tables}.items()},
        at / "image.tif": place.score_image("image.tif"),
        at / "image.bmp": place.score_image("image.bmp"),
        at / "prompts.txt": place.generate("--prompts", str(at / "prompts.txt")),
        at / "noise.npy": place.generate("--noise", str(at / "noise.npy")),
        at / "ranked.json": place.evaluate("--data", str(at / "ranked.json")),
        at / "recipe.py": place.train(at / "recipe.py"),
        **{path: place.generate() for path in sorted(place.model.rglob("*")) if path.is_file()},
        **{
            path: place.score("--model", str(place.reward), "--prompt", "a", str(place.image))
            for path in sorted(place.reward.rglob("*"))
            if path.is_file()
        },
    }
    kinds = [at / "image.png", at / "rows.csv", at / "noise.npy", place.model / "unet/config.json"]
    for path, run in runs.items():
        whole = path.read_bytes()
        spoilt = {"empty": b"", "zeros": bytes(len(whole)), "cut": whole[: len(whole) // 2], "short": whole[:-1]}
        for number in range(12):
            data = bytearray(whole)
            for _ in range(1 + number % 4):  # half of them in the first bytes, where headers are
                data[rng.randrange(min(len(data), 200) if number % 2 else len(data))] ^= 1 << rng.randrange(8)
            spoilt[f"flipped {number}"] = bytes(data)
        spoilt |= {f"as {other.name}": other.read_bytes() for other in kinds if other.suffix != path.suffix}
        suffix = path.suffix if path.suffix != ".json" or path.parent == at else ".json of a model"
        names = (path.name, str(path.parent))
        for name, data in spoilt.items():
            if data != whole:
                yield Case(f"files: {suffix}", f"{path.name} {name}", rewritten(path, data), run, names)


def cases(place: Place) -> list[Case]:
    """All cases."""
    makers = (settings_cases, config_cases, flag_cases, file_cases)
    return [case for make in makers for case in make(place)]


def outcome(case: Case) -> tuple[str, str]:
    """Tries a case: (one of `OUTCOMES`, what it said)."""

    def over(signum, frame):
        raise Hang

    said, status, restore = io.StringIO(), None, case.spoil()
    before = signal.signal(signal.SIGALRM, over)
    memory, old = _memory(), resource.getrlimit(resource.RLIMIT_AS)
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (memory[0] + 4 * 2**30, old[1]))  # what is reserved is far more than is used
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            status = case.run()
    except SystemExit as stop:
        status = stop.code
    except Hang:
        return HANG, ""
    except MemoryError:
        return LIMIT, ""
    except BaseException as error:
        return TRACEBACK, f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, old)
        signal.signal(signal.SIGALRM, before)
        restore()
    text = said.getvalue()
    if _memory()[1] - memory[1] > MEMORY or "MemoryError" in text:
        return LIMIT, text
    if status == 0:
        return TAKEN, text
    if "Traceback" in text or "not foreseen" in text:
        return TRACEBACK, text
    named = any(name in text for name in case.names)
    return (CLEAR if status in (1, 2) and KNOWN.search(text) and named else UNCLEAR), text


def _memory():
    """(address space, the most memory in use so far) of this process, in bytes."""
    status = Path("/proc/self/status").read_text()
    return tuple(int(re.search(rf"{name}:\s+(\d+)", status)[1]) * 1024 for name in ("VmSize", "VmHWM"))


def campaign(
    folder: Path, every: int = 1, tell: Callable[[str, str], Any] = lambda found, line: None
) -> tuple[dict[str, collections.Counter], list[str]]:
    """Tries every `every`-th case of each kind: ({kind: outcomes}, lines on those that are not as they should be).

    `tell` gets the outcome of each case, and a line on it.
    """
    counts, bad = collections.defaultdict(collections.Counter), []
    seen = collections.Counter()
    with without_work():
        for case in cases(Place(folder)):
            seen[case.kind] += 1
            if (seen[case.kind] - 1) % every:
                continue
            found, text = outcome(case)
            counts[case.kind][found] += 1
            line = f"{found}: {case.kind}: {case.name}: {(text.strip().splitlines() or [''])[-1][-300:]}"
            tell(found, line)
            if found not in (CLEAR, TAKEN):
                bad.append(line)
    return counts, bad


def table(counts: dict[str, collections.Counter]) -> str:
    """The figures as a table of Markdown."""
    lines = [f"| input | tried | {' | '.join(OUTCOMES)} |", "| --- |" + " ---: |" * (len(OUTCOMES) + 1)]
    total = collections.Counter()
    for kind, found in sorted(counts.items()):
        total += found
        lines.append(f"| {kind} | {found.total()} | {' | '.join(str(found[one]) for one in OUTCOMES)} |")
    lines.append(f"| **all** | {total.total()} | {' | '.join(str(total[one]) for one in OUTCOMES)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1, help="try every N-th case of each kind")
    parser.add_argument("--taken", action="store_true", help="print those that are taken as well")
    args, begin = parser.parse_args(), time.monotonic()

    def tell(found, line):
        if found != CLEAR and (args.taken or found != TAKEN):
            print(line, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        counts, bad = campaign(Path(folder), args.every, tell)
    print(table(counts), f"\n{time.monotonic() - begin:.0f} s")
    return bool(bad)


if __name__ == "__main__":
    os.environ.setdefault("IMAGEREWARD_JAX_CACHE", "off")
    sys.exit(main())
