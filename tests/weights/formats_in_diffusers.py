"""Every format of docs/files.md beside PyTorch diffusers: images, exports, round trips, as a table.

    python tests/weights/formats_in_diffusers.py [--old-python PYTHON] [--only REGEX]

Tiny random models are opened in each format by this package and by diffusers, in this interpreter and in PYTHON, an
environment of `OLD`; columns are the largest differences of images in [0, 1]. Exit status 1 if a figure is over its
limit.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("USE_TF", "0")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import format_cases
import jax
import numpy as np

from imagereward_jax.pipelines import load_pipeline

OLD = 'torch diffusers==0.27.2 "transformers<4.41" "huggingface_hub<0.26" "peft<0.11" accelerate==0.29.3'
READER = Path(__file__).with_name("diffusers_reader.py")
LIMIT = 1e-4  # of an image
APART = 1e-2  # an adapter or embedding changes the image by at least this
STEPS, GUIDANCE = 3, 3.0


class Row(NamedTuple):
    """Figures of a case. images, exports: by version, the difference to diffusers, or why there is none."""

    case: format_cases.Case
    images: dict[str, float | str]
    exports: dict[str, float | str]
    exact: bool | None
    faults: list[str]


class Painter:
    """Images of this package; models of the same settings share a compiled program. place: for the noise."""

    def __init__(self, place: Path):
        self._programs, self._place = {}, place

    def noise(self, family: str) -> Path:
        """The file of the noise for a family."""
        path = self._place / f"noise_{family}.npy"
        if not path.exists():
            channels = 16 if family == "SD 3" else 4
            np.save(path, np.random.default_rng(5).standard_normal((1, 8, 8, channels)).astype(np.float32))
        return path

    def __call__(self, family: str, pipeline: Any, params: Any, prompt: str) -> np.ndarray:
        """The image [1, H, W, 3] of a prompt."""
        key = repr((pipeline.configs, pipeline.scheduler_config))
        if key not in self._programs:
            side = 8 * pipeline.configs["vae"].downsampling
            sampler = pipeline.make_sampler("euler" if family == "SD 3" else "ddim", STEPS, 0.0, side, side)

            def sample(params, ids, negative, noise):
                return pipeline.sample(params, ids, negative, noise, sampler=sampler, guidance_scale=GUIDANCE)

            self._programs[key] = jax.jit(sample)
        ids, negative = pipeline.tokenize([prompt]), pipeline.tokenize([""])
        return np.asarray(self._programs[key](params, ids, negative, np.load(self.noise(family))))


def compare(place: Path, pythons: dict[str, str], only: str = "") -> tuple[list[Row], dict[str, dict[str, str]]]:
    """Makes the images of every case in a folder.

    Args:
        pythons: interpreters by "new" and perhaps "old". only: a regular expression of the cases' names.

    Returns:
        Rows, and by interpreter the versions of its libraries.
    """
    paint, jobs, ours, alone, exact = Painter(place), [], {}, {}, {}
    chosen = [case for case in format_cases.cases(place) if re.search(only, f"{case.name}, {case.family}")]
    for number, case in enumerate(chosen):
        common = {"prompt": case.prompt, "noise": str(paint.noise(case.family)), "steps": STEPS, "guidance": GUIDANCE}
        ours[number] = paint(case.family, *case.open(), case.prompt)
        if case.apart:
            alone[number] = paint(case.family, *load_pipeline(case.job["model"]), case.prompt)
        jobs.append(common | case.job | {"name": f"{number} read"})
        if case.reference:
            jobs.append(common | case.reference | {"name": f"{number} reference"})
        if case.export:
            job, exact[number] = case.export(place / f"export {number}")
            jobs.append(common | job | {"name": f"{number} export"})
    (place / "jobs.json").write_text(json.dumps(jobs))
    answers = {version: Answers(place, version, python) for version, python in pythons.items()}
    rows = [
        _row(case, number, ours[number], alone.get(number), exact.get(number), answers)
        for number, case in enumerate(chosen)
    ]
    return rows, {version: answer.versions for version, answer in answers.items()}


class Answers:
    """Images of diffusers in an interpreter, for the jobs of a folder."""

    def __init__(self, place: Path, version: str, python: str):
        self._out = place / version
        self._out.mkdir()
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        command = [python, READER, place / "jobs.json", self._out]
        done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{python}: {READER.name} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        answers = json.loads((self._out / "answers.json").read_text())
        self.versions, self.errors = answers["versions"], answers["errors"]

    def difference(self, job: str, image: np.ndarray) -> float:
        """The largest difference of the image of a job to another; infinite if diffusers refused the job."""
        if job in self.errors:
            return float("inf")
        return float(np.abs(np.load(self._out / f"{job}.npy") - image).max())


def _row(case, number, image, alone, exact, answers):
    """The figures of a case, and its faults."""
    images, exports, faults = {}, {}, []
    if alone is not None and np.abs(image - alone).max() < APART:
        faults.append("it changes the image by less than it should")
    if exact is False:
        faults.append("the round trip changes numbers")
    for version, answer in answers.items():
        if case.family == "SD 3" and version == "old":
            continue  # which came with diffusers 0.29
        read = answer.difference(f"{number} read", image)
        if version not in case.readers and read < LIMIT:
            faults.append(f"diffusers {answer.versions['diffusers']} reads it after all")
        for kind, figures in (("read" if version in case.readers else "reference", images), ("export", exports)):
            if kind == "export" and not case.export:
                continue
            figures[version] = answer.difference(f"{number} {kind}", image)
            if not figures[version] < LIMIT:
                error = answer.errors.get(f"{number} {kind}", "another image")
                faults.append(f"{kind}, diffusers {answer.versions['diffusers']}: {figures[version]:.1e}, {error}")
    return Row(case, images, exports, exact, faults)


def table(rows: list[Row], versions: dict[str, dict[str, str]]) -> str:
    """The rows as Markdown; a star marks formats that diffusers does not read, compared by their reference."""
    names = [f"{versions[version]['diffusers']}" for version in versions]
    titles = ["format", "model", *names, *(f"export, {name}" for name in names), "round trip"]
    lines = [titles, ["---"] * len(titles)]
    for row in rows:
        cells = []
        for figures, stars in ((row.images, True), (row.exports, False)):
            for version in versions:
                star = "*" if stars and version not in row.case.readers else ""
                cells.append(f"{figures[version]:.0e}{star}" if version in figures else "-")
        exact = {None: "-", True: "exact", False: "NOT EXACT"}[row.exact]
        lines.append([row.case.name, row.case.family, *cells, exact])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main(argv: list[str] | None = None) -> int:
    """Prints the table, the versions and the faults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old-python", metavar="PYTHON", help=f"an interpreter with {OLD}")
    parser.add_argument("--only", default="", metavar="REGEX", help="formats to compare (default: all)")
    args = parser.parse_args(argv)
    if args.old_python and not shutil.which(args.old_python):
        parser.error(f"--old-python {args.old_python}: no such program")
    pythons = {"new": sys.executable} | ({"old": args.old_python} if args.old_python else {})
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        rows, versions = compare(Path(place), pythons, args.only)
    if not rows:
        parser.error(f"--only {args.only}: no format has such a name")
    print(table(rows, versions))
    for found in versions.values():
        print(", ".join(f"{name} {version}" for name, version in found.items()))
    print(f"{len(rows)} formats in {time.monotonic() - start:.0f} s")
    faults = [f"{row.case.name}, {row.case.family}: {fault}" for row in rows for fault in row.faults]
    print(*faults, sep="\n", end="\n" if faults else "")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
