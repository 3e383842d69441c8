"""Sampling settings of a model: `generation_config.json` beside model_index.json or beside an adapter."""

import dataclasses
import json
import math
from pathlib import Path

from imagereward_jax.weights.files import WeightsError, read_json

FILE = "generation_config.json"
_MAX_STEPS = 1000  # as many as models were trained with


@dataclasses.dataclass(frozen=True)
class Generation:
    """Sampler, number of steps and guidance scale (1 or less: no guidance) that suit a model."""

    sampler: str = "ddim"
    num_inference_steps: int = 50
    guidance_scale: float = 7.5


# Schedulers of models that are distilled to few steps without guidance, by the names of their samplers.
_DISTILLED = {"LCMScheduler": "lcm", "FlowMatchLCMScheduler": "lcm", "TCDScheduler": "tcd"}


def distilled_generation(scheduler_class: str | None) -> Generation | None:
    """The settings of a model whose scheduler_config.json names a consistency model's scheduler; None for others."""
    sampler = _DISTILLED.get(scheduler_class)
    return None if sampler is None else Generation(sampler, 4, 1.0)


def read_generation(folder: str | Path) -> Generation | None:
    """Reads the `Generation` that a folder states; None if it has no such file.

    Raises:
        WeightsError: naming the file and the field that is unknown, absent or of the wrong kind.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    values = read_json(path)
    names = [field.name for field in dataclasses.fields(Generation)]
    if sorted(values) != sorted(names):
        raise WeightsError(f"{path}: has the fields {', '.join(sorted(values)) or 'none'}; expected {', '.join(names)}")
    steps, guidance = values["num_inference_steps"], values["guidance_scale"]
    if not isinstance(values["sampler"], str):
        raise WeightsError(f"{path}: sampler={values['sampler']!r} should be the name of a sampler")
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= _MAX_STEPS:
        raise WeightsError(f"{path}: num_inference_steps={steps!r} should be a whole number from 1 to {_MAX_STEPS}")
    if isinstance(guidance, bool) or not isinstance(guidance, int | float) or not math.isfinite(guidance):
        raise WeightsError(f"{path}: guidance_scale={guidance!r} should be a finite number")
    return Generation(values["sampler"], steps, float(guidance))


def write_generation(folder: str | Path, generation: Generation) -> None:
    """Writes the file into an existing folder."""
    text = json.dumps(dataclasses.asdict(generation), indent=2) + "\n"
    (Path(folder) / FILE).write_text(text, encoding="utf-8")
