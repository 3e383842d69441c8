"""What an evaluation leaves in WORKDIR/samples: a contact sheet, and its scores and images by prompt.

step_0000020.jsonl has a line for each prompt: {"prompt": text, "scores": {"eval/reward_mean": [a number per image],
"eval/diversity": [one number], ...}, "images": [base64 of WebP, at most 256 pixels wide or high]}. A score that is not
finite is null.
"""

import base64
import io
import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from imagereward_jax.methods.base import Evaluation
from imagereward_jax.storage.contact_sheet import to_uint8
from imagereward_jax.storage.errors import writing
from imagereward_jax.storage.files import save_image, write_text

FOLDER = "samples"  # in the workdir
NAME = re.compile(r"step_(\d+)(_\d+)?\.(png|jsonl)")  # other files there are the user's
THUMBNAIL = 256  # pixels
SMALLEST = 64  # smaller ones are enlarged by whole factors, as WebP's colours have half the resolution
PER_PROMPT, IN_ALL = 4, 256  # images that are kept of an evaluation, from the first

Key = tuple[str, int]  # a prompt, and which of the prompts of the same text


class PromptSamples(NamedTuple):
    """What an evaluation made of a prompt: scores by metric, and the first images (base64 of WebP)."""

    scores: dict[str, list[float | None]]
    images: list[str]

    def mean(self, metric: str) -> float | None:
        """The mean over the images with a score; None if there are none."""
        known = [value for value in self.scores.get(metric, ()) if value is not None]
        return sum(known) / len(known) if known else None


def save_samples(workdir: Path, step: int, index: int, evaluation: Evaluation) -> None:
    """Writes the sheet and the samples of the `index`-th evaluator, if the evaluation has them."""
    name = f"step_{step:07d}" + (f"_{index}" if index else "")
    if evaluation.sheet is not None:
        save_image(workdir / FOLDER / f"{name}.png", evaluation.sheet)
    if evaluation.samples is not None and evaluation.scores:
        with writing(workdir):
            (workdir / FOLDER).mkdir(exist_ok=True)
        lines = _lines(evaluation.samples, evaluation.scores)
        write_text(workdir / FOLDER / f"{name}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def _lines(samples, scores):
    prompts = min(len(values) for values in scores.values())
    each = len(samples.prompts) // prompts
    left = IN_ALL
    for row in range(prompts):
        images = samples.images[row * each : (row + 1) * each][: min(PER_PROMPT, left)]
        left -= len(images)
        yield {
            "prompt": samples.prompts[row * each],
            "scores": {name: [_number(x) for x in np.atleast_1d(values[row])] for name, values in scores.items()},
            "images": [encode_webp(Image.fromarray(to_uint8(image)), THUMBNAIL) for image in images],
        }


def _number(value):
    return float(f"{value:.6g}") if np.isfinite(value) else None


def encode_webp(image: Image.Image, side: int) -> str:
    """Base64 of an image as WebP, at most `side` pixels wide or high."""
    factor = -(-SMALLEST // max(image.size))
    if factor > 1:
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", quality=90 if factor > 1 else 80, method=2)
    return base64.b64encode(buffer.getvalue()).decode()


def read_samples(workdir: Path, steps: Collection[int] | None) -> dict[int, dict[Key, PromptSamples]]:
    """{step: {prompt: its samples}} of the evaluations at `steps` (None: all) that left any.

    Damaged lines are left out.
    """
    found = {}
    for step, path in _files(workdir, "jsonl", steps):
        rows = found.setdefault(step, {})
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            _take_in(rows, line)
    return {step: rows for step, rows in sorted(found.items()) if rows}


def _take_in(rows: dict[Key, PromptSamples], line: str) -> None:
    try:
        row: Any = json.loads(line)
        samples = PromptSamples(
            {str(name): [None if x is None else float(x) for x in values] for name, values in row["scores"].items()},
            [str(image) for image in row["images"]],
        )
        prompt = str(row["prompt"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return
    count = 0
    while (prompt, count) in rows:
        count += 1
    rows[prompt, count] = samples


def sheets(workdir: Path, steps: Collection[int] | None) -> dict[int, Path]:
    """{step: contact sheet} of the first evaluator, at `steps` (None: at all)."""
    return {step: path for step, path in _files(workdir, "png", steps) if not NAME.fullmatch(path.name)[2]}


def _files(workdir, ending, steps):
    """(step, path) of the evaluations' files, by step."""
    for path in sorted((workdir / FOLDER).glob(f"*.{ending}")):
        name = NAME.fullmatch(path.name)
        if name and (steps is None or int(name[1]) in steps):
            yield int(name[1]), path
