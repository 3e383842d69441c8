"""What a run left in its workdir, as reports read it: config, numbers, samples, how it was started and ended."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from imagereward_jax.training.metric_writers import METRICS, read_rows, rows_with
from imagereward_jax.training.samples import Key, PromptSamples, read_samples, sheets
from imagereward_jax.training.workdir import CONFIG, STARTED, read_done

REWARD = "eval/reward_mean"
# In this order in figures; the judges come after the reward.
WATCHED = (
    *(REWARD, "eval/checker_rate", "eval/accuracy", "eval/psnr", "eval/loss"),
    *("eval/diversity", "eval/diversity_pixels", "eval/drift", "eval/drift_pixels"),
)


class Cost(NamedTuple):
    """What a run has cost so far; None where it did not record it.

    Attributes:
        images: trained on. evaluated: sampled by evaluations. seconds: of its training steps.
        rate: images per second of them. elapsed: seconds from the first number to the last, pauses included.
    """

    images: int | None
    evaluated: int
    seconds: float | None
    rate: float | None
    elapsed: float | None


class Run(NamedTuple):
    """A workdir, read.

    Attributes:
        config: of JSON. rows: of metrics.jsonl. samples, sheets: by step, see `training.samples`.
        started: see `progress.started`; {} for runs of before. done: of done.json, or None.
    """

    workdir: Path
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    samples: dict[int, dict[Key, PromptSamples]]
    sheets: dict[int, Path]
    started: dict[str, Any]
    done: dict[str, Any] | None

    @property
    def name(self) -> str:
        """The folder's."""
        return self.workdir.resolve().name

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The rows of evaluations."""
        return rows_with(self.rows, "eval/")

    @property
    def step(self) -> int:
        """The last that there is a number of."""
        return self.rows[-1]["step"] if self.rows else 0

    def points(self, name: str) -> list[tuple[int, float | None]]:
        """(step, value) of a metric; None if it was not finite."""
        return [(row["step"], row[name]) for row in self.rows if name in row]

    def watched(self) -> list[str]:
        """The metrics of its evaluations that matter first: reward, judges, checker, diversity, drift."""
        there = [name for row in self.evaluations for name in row if name.startswith("eval/")]
        judges = sorted({name for name in there if name.startswith("eval/judge_") and "@" not in name})
        found = [name for name in WATCHED if name in there]
        found[1 if REWARD in found else 0 : 0] = judges
        return found or list(dict.fromkeys(there))

    def spread(self, name: str) -> tuple[dict[int, float], dict[int, tuple[float, float]]]:
        """(standard deviation of a metric over prompts, its least and largest prompt), by step."""
        deviations, extremes = {}, {}
        if name == REWARD:
            deviations = {step: value for step, value in self.points("eval/reward_std") if value is not None}
        for step, prompts in self.samples.items():
            means = [mean for mean in (prompt.mean(name) for prompt in prompts.values()) if mean is not None]
            if len(means) > 1:
                centre = sum(means) / len(means)
                deviations[step] = math.sqrt(sum((mean - centre) ** 2 for mean in means) / len(means))
                extremes[step] = (min(means), max(means))
        return deviations, extremes

    def cost(self) -> Cost:
        """What it has cost so far; a resumed run's pauses count in `elapsed` alone."""
        seconds, before = 0.0, 0
        for row in self.rows:
            if row.get("images") and row.get("images_per_second"):
                seconds += (row["images"] - before) / row["images_per_second"]
                before = row["images"]
        rates = [rate for _, rate in self.points("images_per_second") if rate]
        times = [row["time"] for row in self.rows if isinstance(row.get("time"), int | float)]
        scales = 1 + len(self.config.get("eval", {}).get("guidance_scales", ()))
        evaluated = sum(
            scales * max((len(values) for values in prompt.scores.values()), default=0)
            for prompts in self.samples.values()
            for prompt in prompts.values()
        )
        return Cost(
            before or None,
            evaluated,
            seconds or None,
            before / seconds if seconds else (sum(rates) / len(rates) if rates else None),
            times[-1] - times[0] if len(times) > 1 else None,
        )


def read_run(workdir: str | Path) -> Run:
    """Reads a workdir.

    Raises:
        FileNotFoundError: it is none. ValueError: its config.json cannot be read.
    """
    workdir = Path(workdir)
    path = workdir / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected the workdir of a run of `train`")
    config = _read_object(path)
    if not isinstance(config.get("steps"), int) or "name" not in (config.get("method") or ()):
        raise ValueError(f"{path} is not the config of a run")
    rows = read_rows(workdir / METRICS)
    # Later ones are a killed run's, which the run will write again; without any row, numbers are not written here.
    steps = {row["step"] for row in rows_with(rows, "eval/")} if rows else None
    return Run(
        workdir,
        config,
        rows,
        read_samples(workdir, steps),
        sheets(workdir, steps),
        _read_object(workdir / STARTED) if (workdir / STARTED).is_file() else {},
        read_done(workdir),
    )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} should hold an object")
    return found
