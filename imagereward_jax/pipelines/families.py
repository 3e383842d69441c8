"""Decides the family of a model, by the class that its files name; no other module does."""

import difflib
import os
import re
from pathlib import Path
from typing import Any

from imagereward_jax.models import clip, mmdit_config, t5, unet_config, vae
from imagereward_jax.pipelines.base import TextToImage, override_scheduler
from imagereward_jax.pipelines.model_files import ModelFiles, config_of
from imagereward_jax.pipelines.published_settings import (
    PROMPT_TOKENS,
    SCHEDULERS,
    T5_TOKENS,
    StandInTokenizer,
)
from imagereward_jax.pipelines.sd1 import StableDiffusion1
from imagereward_jax.pipelines.sd3 import StableDiffusion3
from imagereward_jax.pipelines.sdxl import TURBO, StableDiffusionXL
from imagereward_jax.weights import components, diffusers, hub, orbax, single_file
from imagereward_jax.weights.generation import read_generation
from imagereward_jax.weights.sources import DiffusersSource, OrbaxSource, SingleFileSource

FAMILIES = {family.pipeline_class: family for family in (StableDiffusion1, StableDiffusionXL, StableDiffusion3)}

# config.json of the published networks by component.
SD1 = {"unet": unet_config.SD1, "vae": vae.SD1, "text_encoder": clip.VIT_L}
SDXL = {"unet": unet_config.SDXL, "vae": vae.SDXL, "text_encoder": clip.VIT_L, "text_encoder_2": clip.VIT_BIG_G}
SD35 = {
    "vae": vae.SD3,
    "text_encoder": clip.VIT_L_PROJECTED,
    "text_encoder_2": clip.VIT_BIG_G,
    "text_encoder_3": t5.XXL,
}
# Published models of exactly these sizes: (pipeline class, sizes, generation or None for the family's).
PUBLISHED = {
    "CompVis/stable-diffusion-v1-4": ("StableDiffusionPipeline", SD1, None),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": ("StableDiffusionPipeline", SD1, None),
    "runwayml/stable-diffusion-v1-5": ("StableDiffusionPipeline", SD1, None),
    "stabilityai/stable-diffusion-xl-base-1.0": ("StableDiffusionXLPipeline", SDXL, None),
    "stabilityai/sdxl-turbo": ("StableDiffusionXLPipeline", SDXL, TURBO),
    "stabilityai/stable-diffusion-3.5-medium": (
        "StableDiffusion3Pipeline", {"transformer": mmdit_config.SD35_MEDIUM, **SD35}, None
    ),
    "stabilityai/stable-diffusion-3.5-large": (
        "StableDiffusion3Pipeline", {"transformer": mmdit_config.SD35_LARGE, **SD35}, None
    ),
}  # fmt: skip
# Their licenses, by the names that the hub has for them.
LICENSES = {
    "CompVis/stable-diffusion-v1-4": "creativeml-openrail-m",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
    "runwayml/stable-diffusion-v1-5": "creativeml-openrail-m",
    "stabilityai/stable-diffusion-xl-base-1.0": "openrail++",
    "stabilityai/stable-diffusion-3.5-medium": "other",
    "stabilityai/stable-diffusion-3.5-large": "other",
}


class UnknownModel(ValueError):
    """A name that is neither a folder, nor built in, nor a published model whose sizes are known; lists the names."""


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
    parts: str = "",
    prediction_type: str | None = None,
    download: bool = True,
    **options: Any,
) -> TextToImage:
    """Opens the structure of a text-to-image model: settings and tokenizers, no weights (`TextToImage.load_params`).

    Args:
        name_or_path: a diffusers folder, a checkpoint of one file in Stability's layout (`weights.single_file`), a
            folder that convert/from_diffusers.py wrote, a built-in model, or a name on the hub.
        variant: which weight files to read, e.g. "fp16"; of a single file "ema" reads the averaged weights.
        parts: what to take from elsewhere, "NAME=PATH,...": for a network ("vae", "text_encoder", ...) a file of its
            weights, for a tokenizer ("tokenizer", "tokenizer_2", ...) its folder.
        prediction_type: the network's output, if the files state it wrongly or, as those of Stable Diffusion 2, not.
        download: False asks the hub for nothing. Published models then have the sizes of the table here, a
            `StandInTokenizer` and no weights.
        options: dtype, vae_dtype and remat, see `TextToImage`.

    Raises:
        FileNotFoundError: there is no such model, or a file of it is absent.
        UnknownModel: download is False and `name_or_path` is neither here nor in the table.
        ValueError: the family, or a setting of it, is not implemented.
    """
    replaced = parse_parts(parts)
    name = str(name_or_path).partition("@")[0]
    if Path(name).suffix in single_file.SUFFIXES and not Path(os.path.expanduser(name)).exists():
        raise FileNotFoundError(f"{name}: no such file")
    if single_file.is_single_file(name_or_path):
        files = _single_file(Path(os.path.expanduser(name_or_path)), variant)
    elif not download and not Path(os.path.expanduser(name)).is_dir() and name not in hub.builtin_models():
        files = _published(name)
    else:
        folder = diffusers.resolve_structure(name_or_path if download else name)
        source = DiffusersSource(name_or_path if download else folder, variant)
        files = _checkpoint(folder) if (folder / orbax.MANIFEST).is_file() else _folder(folder, source)
    files.replace_parts(replaced)
    files.complete(prediction_type, download=download)
    try:
        scheduler = override_scheduler(files.scheduler, prediction_type=prediction_type)
        return files.family.from_configs(
            files.configs, scheduler, files.tokenizers, source=files.source, **files.options, **options
        )
    except ValueError as error:
        if name in str(error):
            raise
        raise ValueError(f"{name}: {error}") from error


def parse_parts(text: str) -> dict[str, Path]:
    """Parses "NAME=PATH,..." to {name: path}.

    Raises:
        ValueError: it has another form, or a name twice. FileNotFoundError: there is nothing at a path.
    """
    parts = {}
    for item in filter(None, (item.strip() for item in text.split(","))):
        name, equals, path = item.partition("=")
        if not equals or not path or name in parts:
            raise ValueError(f"parts={text!r}: expected NAME=PATH, separated by commas, each name once; got {item!r}")
        parts[name] = Path(os.path.expanduser(path))
        if not parts[name].exists():
            raise FileNotFoundError(f"parts: {name}={path}: no such file or folder")
    return parts


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


def _folder(folder, source):
    """The files of a diffusers folder."""
    index = diffusers.read_index(folder)
    family = family_of(index.pipeline_class, str(folder / diffusers.INDEX))
    configs = {part: diffusers.load_config(folder, part) for part in checked_components(family, index, folder)}
    scheduler = diffusers.load_scheduler_config(folder)
    return ModelFiles(family, configs, scheduler, *_beside(family, folder, source, index.fields))


def _checkpoint(folder):
    """The files of a folder that convert/from_diffusers.py wrote."""
    manifest = orbax.read_manifest(folder)
    family = family_of(manifest["pipeline_class"], str(folder / orbax.MANIFEST))
    configs = manifest["components"]
    stated = {name: components.class_of(config, str(folder)) for name, config in configs.items()}
    absent = frozenset(family.components) - stated.keys()
    checked_components(family, diffusers.Index(family.pipeline_class, stated, {}, absent), folder)
    beside = _beside(family, folder, OrbaxSource(folder), manifest["fields"])
    return ModelFiles(family, dict(configs), manifest["scheduler"], *beside)


def _beside(family, folder, source, fields):
    """(tokenizers, source, options) of a folder."""
    tokenizers = {name: folder / name for name in family.text_encoders.values()}
    return tokenizers, source, {"generation": read_generation(folder), **fields}


def _single_file(path, variant):
    """The file of a checkpoint in Stability's layout."""
    if variant not in single_file.VARIANTS:
        raise ValueError(f"{path}: variant={variant!r}; of a single file only 'ema' is read, its averaged weights")
    checkpoint = single_file.recognise(path)
    family = FAMILIES[checkpoint.pipeline_class]
    configs = {name: config_of(family, name, place) for name, place in checkpoint.places.items()}
    return ModelFiles(family, configs, checkpoint.scheduler, {}, SingleFileSource(path, checkpoint.places, variant))


def _published(name):
    """A published model's sizes alone, with no files."""
    if name not in PUBLISHED:
        close = difflib.get_close_matches(name, PUBLISHED, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UnknownModel(
            f"{name!r}: no folder, and none of the models whose sizes are known here{hint}; pass its folder (only the "
            f"config.json files are read) or one of {', '.join(PUBLISHED)}"
        )
    pipeline_class, sizes, generation = PUBLISHED[name]
    family = FAMILIES[pipeline_class]
    tokenizers = {
        name: StandInTokenizer(T5_TOKENS if "d_model" in sizes[encoder] else PROMPT_TOKENS)
        for encoder, name in family.text_encoders.items()
    }
    scheduler = SCHEDULERS[pipeline_class]
    return ModelFiles(family, dict(sizes), scheduler, tokenizers, None, {"generation": generation})
