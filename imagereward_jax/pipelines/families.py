"""Decides the family of a model, by the class that its files name; no other module does."""

import difflib
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from imagereward_jax.models import clip, unet, vae
from imagereward_jax.pipelines.base import TextToImage, override_scheduler
from imagereward_jax.pipelines.sd1 import StableDiffusion1
from imagereward_jax.pipelines.sd3 import StableDiffusion3
from imagereward_jax.pipelines.sdxl import TURBO, StableDiffusionXL
from imagereward_jax.weights import components, diffusers, hub, orbax
from imagereward_jax.weights.generation import read_generation
from imagereward_jax.weights.sources import DiffusersSource, OrbaxSource

FAMILIES = {family.pipeline_class: family for family in (StableDiffusion1, StableDiffusionXL, StableDiffusion3)}

# config.json of the published networks by component.
SD1 = {"unet": unet.SD1, "vae": vae.SD1, "text_encoder": clip.VIT_L}
SDXL = {"unet": unet.SDXL, "vae": vae.SDXL, "text_encoder": clip.VIT_L, "text_encoder_2": clip.VIT_BIG_G}
# Published models of exactly these sizes: (pipeline class, sizes, generation or None for the family's).
PUBLISHED = {
    "CompVis/stable-diffusion-v1-4": ("StableDiffusionPipeline", SD1, None),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": ("StableDiffusionPipeline", SD1, None),
    "runwayml/stable-diffusion-v1-5": ("StableDiffusionPipeline", SD1, None),
    "stabilityai/stable-diffusion-xl-base-1.0": ("StableDiffusionXLPipeline", SDXL, None),
    "stabilityai/sdxl-turbo": ("StableDiffusionXLPipeline", SDXL, TURBO),
}
PUBLISHED_SCHEDULER = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
# Their licenses, by the names that the hub has for them.
LICENSES = {
    "CompVis/stable-diffusion-v1-4": "creativeml-openrail-m",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
    "runwayml/stable-diffusion-v1-5": "creativeml-openrail-m",
    "stabilityai/stable-diffusion-xl-base-1.0": "openrail++",
}
PROMPT_TOKENS = 77  # of CLIP's published tokenizers


class UnknownModel(ValueError):
    """A name that is neither a folder, nor built in, nor a published model whose sizes are known; lists the names."""


class StandInTokenizer:
    """Stands in for CLIP's tokenizer if only the shape of its ids matters: every id is 0."""

    model_max_length = PROMPT_TOKENS

    def __len__(self):
        return 0

    def __call__(self, prompts: list[str], *, max_length: int, **_) -> dict[str, np.ndarray]:
        return {"input_ids": np.zeros((len(prompts), max_length), np.int32)}


def family_of(pipeline_class: str | None, where: str) -> type[TextToImage]:
    """The family of a pipeline class.

    Args:
        where: how an error names the file that the class was read from.

    Raises:
        ValueError: the class is not implemented (inpainting, image to image, a refiner, another family).
    """
    name = str(pipeline_class).removeprefix("Flax")
    if name not in FAMILIES:
        raise ValueError(f"{where}: _class_name={pipeline_class!r} is not implemented, only {', '.join(FAMILIES)}")
    return FAMILIES[name]


def open_pipeline(
    name_or_path: str | Path,
    *,
    variant: str | None = None,
    prediction_type: str | None = None,
    download: bool = True,
    **options: Any,
) -> TextToImage:
    """Opens the structure of a text-to-image model: settings and tokenizers, no weights (`TextToImage.load_params`).

    Args:
        name_or_path: a diffusers folder, a folder that convert/from_diffusers.py wrote, a built-in model, or a name on
            the hub.
        variant: which weight files to read, e.g. "fp16".
        prediction_type: the network's output, if the folder's scheduler states it wrongly.
        download: False asks the hub for nothing. Published models then have the sizes of the table here, a
            `StandInTokenizer` and no weights.
        options: dtype, vae_dtype and remat, see `TextToImage`.

    Raises:
        FileNotFoundError: there is no such model, or a file of it is absent.
        UnknownModel: download is False and `name_or_path` is neither here nor in the table.
        ValueError: the family, or a setting of it, is not implemented.
    """
    options["prediction_type"] = prediction_type
    name = str(name_or_path).partition("@")[0]
    if not download and not Path(os.path.expanduser(name)).is_dir() and name not in hub.builtin_models():
        return _published(name, options)
    folder = diffusers.resolve_structure(name_or_path if download else name)
    if (folder / orbax.MANIFEST).is_file():
        return _from_checkpoint(folder, options)
    index = diffusers.read_index(folder)
    family = family_of(index.pipeline_class, str(folder / diffusers.INDEX))
    return _assemble(
        family,
        {part: diffusers.load_config(folder, part) for part in checked_components(family, index, folder)},
        diffusers.load_scheduler_config(folder),
        folder,
        **index.fields,
        **options,
        source=DiffusersSource(name_or_path if download else folder, variant),
    )


def license_of(name_or_path: str | Path) -> str | None:
    """The license of a model, as the hub calls it: the package's for a built-in one, that of a published name, or what
    the README.md of a folder says at its head. None if none of them tells."""
    name = str(name_or_path).partition("@")[0]
    if name in hub.builtin_models():
        return "apache-2.0"
    readme = Path(os.path.expanduser(name)) / "README.md"
    if not readme.is_file():
        return LICENSES.get(name)
    head = re.match(r"---\n(.*?)\n---", readme.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    found = re.search(r"^license:\s*([\w.+-]+)\s*$", head[1], re.MULTILINE) if head else None
    return found[1] if found else None


def load_pipeline(name_or_path: str | Path, **options: Any) -> tuple[TextToImage, dict[str, Any]]:
    """Opens a text-to-image model and reads its weights.

    Args:
        name_or_path, options: as for `open_pipeline`.

    Returns:
        (pipeline, params), params float32 numpy arrays.

    Raises:
        FileNotFoundError, ValueError: as `open_pipeline`, or naming the tensors that are absent or do not fit.
    """
    pipeline = open_pipeline(name_or_path, **options)
    return pipeline, pipeline.load_params()


def from_architecture(architecture: dict[str, Any], tokenizer: Any, **options: Any) -> TextToImage:
    """Makes a pipeline to train from nothing; `TextToImage.init` draws its weights.

    Args:
        architecture: config.json by component, and "scheduler". Two text encoders and a UNet make an SDXL.
        tokenizer: serves every text encoder, a tokenizer or its folder; or a dict of them, as for
            `TextToImage.from_configs`.
        options: dtype, vae_dtype and remat.

    Raises:
        ValueError: the components are those of no family, or do not fit together.
    """
    parts = {name: config for name, config in architecture.items() if name != "scheduler"}
    for family in FAMILIES.values():
        if set(family.components) - family.optional <= set(parts) <= set(family.components):
            return family.from_configs(parts, architecture["scheduler"], tokenizer, **options)
    known = "; ".join(f"{name}: {', '.join(family.components)}" for name, family in FAMILIES.items())
    raise ValueError(f"an architecture of {', '.join(sorted(parts))} is of no family that is implemented: {known}")


def checked_components(family: type[TextToImage], index: diffusers.Index, folder: Path) -> dict[str, str]:
    """Checks a model's components against its family.

    Returns:
        The family's {component: class}, without the optional ones that the model states to be absent.

    Raises:
        ValueError: model_index.json names another class for one of them, or none.
    """
    absent = family.optional & index.absent
    found = {name: class_name for name, class_name in family.components.items() if name not in absent}
    for name, class_name in found.items():
        if index.classes.get(name) != class_name:
            raise ValueError(
                f"{folder / diffusers.INDEX}: {name} is {index.classes.get(name, 'of no class that is implemented')}; "
                f"{family.pipeline_class} has {class_name}"
            )
    return found


def _from_checkpoint(folder, options):
    manifest = orbax.read_manifest(folder)
    family = family_of(manifest["pipeline_class"], str(folder / orbax.MANIFEST))
    configs = manifest["components"]
    stated = {name: components.class_of(config, str(folder)) for name, config in configs.items()}
    absent = frozenset(family.components) - stated.keys()
    checked_components(family, diffusers.Index(family.pipeline_class, stated, {}, absent), folder)
    source = OrbaxSource(folder)
    return _assemble(family, configs, manifest["scheduler"], folder, **manifest["fields"], **options, source=source)


def _assemble(family, configs, scheduler, folder, *, prediction_type, **options):
    """Makes the pipeline of a folder's configs, with its tokenizers and generation settings."""
    try:
        return family.from_configs(
            configs,
            override_scheduler(scheduler, prediction_type=prediction_type),
            {name: folder / name for name in family.text_encoders.values()},
            generation=read_generation(folder),
            **options,
        )
    except ValueError as error:
        if str(folder) in str(error):
            raise
        raise ValueError(f"{folder}: {error}") from error


def _published(name, options):
    """Makes a published model's pipeline from its sizes alone."""
    if name not in PUBLISHED:
        close = difflib.get_close_matches(name, PUBLISHED, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UnknownModel(
            f"{name!r}: no folder, and none of the models whose sizes are known here{hint}; pass its folder (only the "
            f"config.json files are read) or one of {', '.join(PUBLISHED)}"
        )
    pipeline_class, sizes, generation = PUBLISHED[name]
    family = FAMILIES[pipeline_class]
    scheduler = override_scheduler(PUBLISHED_SCHEDULER, prediction_type=options.pop("prediction_type"))
    tokenizers = dict.fromkeys(family.text_encoders.values(), StandInTokenizer())
    return family.from_configs(sizes, scheduler, tokenizers, generation=generation, **options)
