"""README.md of an export: what was tuned, from what, by which method and reward, and what was measured."""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from imagereward_jax.data.errors import ImageError
from imagereward_jax.data.images import open_image
from imagereward_jax.methods.base import Export, find_method
from imagereward_jax.training.metric_writers import rounded, rows_with
from imagereward_jax.training.workdir import fields_and_defaults, is_within
from imagereward_jax.weights import adapters
from imagereward_jax.weights.diffusers import INDEX

CARD = "README.md"
PICTURE = "before_after.jpg"
SHEET_SIDE, GAP = 640, 12  # pixels of a sheet's longer side at most, and between two
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?")
# How exports are opened with diffusers, by the file that marks them.
_OPENED = {
    INDEX: "pipe = DiffusionPipeline.from_pretrained(FOLDER)",
    adapters.FILE: "pipe = DiffusionPipeline.from_pretrained(BASE)\npipe.load_lora_weights(FOLDER)",
}
# Fields that say how a run was watched or computed, not what it trained.
_LEFT_OUT = ("log_every", "writers", "compilation_cache", "data.workers", "mesh", "profile", "max_skipped")


def model_card(
    config: Any,
    rows: list[dict[str, Any]],
    step: int,
    export: Export,
    license: str | None,
    *,
    pictured: bool = False,
) -> str:
    """Writes the card of a run's export.

    Args:
        config: the run's. rows: of its metrics.jsonl.
        step: the exported one. export: how it is written.
        license: of the model that training started from, as the hub calls it; None if it is not known.
        pictured: whether the file `PICTURE` of `before_and_after` is beside the card.

    Returns:
        Markdown, with the head that the hub reads. Folders and files of this machine are named without their path.
    """
    method = config.method.name
    title = f"{_shown(_base(config)) or 'A model'} tuned by {method}"
    said = " ".join((find_method(method).__doc__ or "").partition("\n\n")[0].split())
    parts = [
        _head(config, export.marker, license),
        f"# {title}\n\nMade with imagereward-jax. The method: {said}",
        _table(("", ""), _facts(config, step, export, license)),
        _figures(config, rows, step),
        _shown_before_and_after(pictured, step),
        _opened(config, export.marker),
        _settings(config),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(config, marker, license):
    base = str(_base(config))
    fields = {"library_name": "diffusers" if marker in _OPENED else "imagereward-jax"}
    fields |= {"pipeline_tag": "text-to-image"} if marker in _OPENED else {}
    if _HUB_NAME.fullmatch(base) and not Path(base).exists():
        fields["base_model"] = base.partition("@")[0]
    fields |= {"license": license} if license else {}
    fields["tags"] = ["imagereward-jax", str(config.method.name)] + ["lora"] * (marker == adapters.FILE)
    return "\n".join(["---", *(f"{name}: {json.dumps(value)}" for name, value in fields.items()), "---"])


def _base(config):
    """What training started from: a model, or the scorer that trains."""
    if "blip" in config.get("reward", {}):
        return config.reward.path or config.reward.blip
    return "" if config.model.get("from_scratch") else config.model.path


def _facts(config, step, export, license):
    reward = config.get("reward", {})
    terms = {name: term["path"] for name, term in reward.get("terms", {}).items()}
    mixture = " + ".join(f"{reward['terms'][name]['weight']:g} x {_shown(path)}" for name, path in terms.items())
    weights = f"low-rank parameters (rank {config.lora.rank})" if export.marker == adapters.FILE else "weights"
    facts = {
        "base": _shown(_base(config)) or "random weights",
        "license of the base": license or "not known: see its page",
        "trained": f"{weights} of {' and '.join(export.components)}",
        "reward": "" if "blip" in reward else mixture or _shown(reward.get("path", "")),
        "prompts": _shown(config.data.get("prompts", "")),
        "image-text pairs": _shown(config.data.get("pairs", "")),
        "steps": f"{step} of batch {config.batch_size}, seed {config.seed}",
    }
    return [(name, value) for name, value in facts.items() if value]


def _figures(config, rows, step):
    """Evaluations before training and of the exported step, and test metrics of the export."""
    evaluated = rows_with(rows, "eval/")
    exported = next((row for row in evaluated if row["step"] == step), None)
    tested = {name: value for row in rows for name, value in row.items() if name.startswith("test/")}
    cells = []
    if exported is not None:
        first = evaluated[0]
        cells = [(n, rounded(first.get(n)), rounded(exported[n])) for n in exported if n.startswith("eval/")]
    cells += [(name, "", rounded(value)) for name, value in tested.items()]
    if not cells:
        return ""
    start = f"step {evaluated[0]['step']}" if exported is not None else ""
    return f"## Figures\n\n{_conditions(config)}\n\n" + _table(("", start, f"step {step}"), cells)


def before_and_after(samples: Path, step: int) -> Image.Image | None:
    """The sheets of the evaluation before training and of that of a step, side by side; None if one is not there.

    Args:
        samples: WORKDIR/samples.
    """
    paths = [samples / f"step_{each:07d}.png" for each in (0, step)]
    if step == 0 or not all(path.is_file() for path in paths):
        return None
    try:
        sheets = [open_image(path) for path in paths]
    except ImageError:  # a user may have changed it; the card goes without
        return None
    for sheet in sheets:
        sheet.thumbnail((SHEET_SIDE, SHEET_SIDE))
    width, height = sheets[0].width, max(sheet.height for sheet in sheets)
    both = Image.new("RGB", (width + GAP + sheets[1].width, height + 2 * GAP), "white")
    for left, sheet, title in zip((0, width + GAP), sheets, ("before training", f"at step {step}")):
        ImageDraw.Draw(both).text((left + 6, 6), title, fill="black", font=ImageFont.load_default(14))
        both.paste(sheet, (left, 2 * GAP))
    return both


def _shown_before_and_after(pictured, step):
    return f"![The same prompts and noise before training and at step {step}]({PICTURE})" if pictured else ""


def _conditions(config):
    """How evaluations sample, for methods that sample."""
    settings = config.eval
    if not settings.get("sampler"):
        return "On held-out data:"
    return (
        f"Held-out prompts ({_shown(settings.prompts)}), up to {settings.num_prompts}, {settings.images_per_prompt} "
        f"image(s) each, the same noise at every evaluation; {settings.sampler}, {settings.num_steps} steps, guidance "
        f"{settings.guidance_scale:g}:"
    )


def _opened(config, marker):
    if marker not in _OPENED:
        return ""
    code = _OPENED[marker].replace("BASE", repr(_shown(_base(config)))).replace("FOLDER", '"FOLDER_OR_NAME_OF_THIS"')
    return f"## With diffusers\n\n```python\nfrom diffusers import DiffusionPipeline\n\n{code}\n```"


def _settings(config):
    """The fields that differ from the method's defaults."""
    now, default = fields_and_defaults(config)
    lines = [
        f"config.{name} = {_shown(value)!r}"
        for name, value in now.items()
        if value != default.get(name) and not is_within(name, _LEFT_OUT)
    ]
    head = f'config = imagereward_jax.recipes.default_config("{config.method.name}")'
    return "## Config\n\n```python\n" + "\n".join([head, *lines]) + "\n```"


def _table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    lines = [head, ["---"] * len(tuple(head)), *rows]
    return "\n".join("| " + " | ".join(_escaped(cell) for cell in line) + " |" for line in lines)


def _escaped(value):
    """Text in a cell: no new columns, lines or tags."""
    return re.sub(r"([|<>`\[\]*_\\])", r"\\\1", " ".join(str(value).split()))


def _shown(value):
    """The value; of a path on this machine its last part, as the rest is private and of no use to others."""
    is_path = isinstance(value, str) and (Path(os.path.expanduser(value)).is_absolute() or value.startswith((".", "~")))
    return Path(value).name if is_path else value
