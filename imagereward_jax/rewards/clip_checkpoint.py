"""Reads published CLIP files, and from the files beside them what weights do not show: heads, activation, pixels."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import numpy as np

from imagereward_jax.models.clip import CLIPTextConfig
from imagereward_jax.models.clip_score import CLIPConfig, CLIPVisionConfig
from imagereward_jax.models.config import check_types
from imagereward_jax.rewards.checkpoint import read_cached
from imagereward_jax.rewards.preprocess import CLIP_STATISTICS, Statistics
from imagereward_jax.weights import clip_layouts, diffusers, files, hub
from imagereward_jax.weights.files import WeightsError

OPEN_CLIP_CONFIG = "open_clip_config.json"
_INDEX = ".index.json"  # says which shard holds which tensor
# Only OpenAI's archives hold it.
_OPENAI_MARK = "input_resolution"
# Width and layers of a vision tower: (width of its heads, width of the text tower, whose heads have 64, activation), as
# in open_clip's model_configs. None: published models of that size have QuickGELU (OpenAI's, MetaCLIP's, DFN's) or
# GELU (LAION's, DataComp's).
_PUBLISHED = {
    (768, 12): (64, 512, None),  # ViT-B/32, B/16
    (896, 12): (64, 640, "gelu"),  # B/16-plus
    (1024, 24): (64, 768, None),  # L/14, L/16
    (1280, 32): (80, 1024, None),  # H/14
    (1408, 40): (88, 1024, "gelu"),  # g/14
    (1664, 48): (104, 1280, None),  # bigG/14
}
# Fields of a tower in open_clip_config.json that weights show, or that have no effect once it is trained. Of others
# only what is implemented is read: values that turn a feature off, and these.
_SHOWN = {
    *("layers", "width", "head_width", "heads", "mlp_ratio", "patch_size", "image_size", "context_length"),
    *("vocab_size", "patch_dropout", "output_tokens"),
}
_IMPLEMENTED = {"vision": {"pool_type": "tok", "pos_embed_type": "learnable"}, "text": {"pool_type": "argmax"}}
_OPEN_CLIP_PIXELS = {"interpolation": "bicubic", "resize_mode": "shortest"}
_TRANSFORMERS_PIXELS = {"resample": 3, "do_resize": True, "do_center_crop": True, "do_normalize": True}


class Base(NamedTuple):
    """The CLIP that a score was trained from: width of its vision tower, and activation."""

    vision_width: int
    hidden_act: str


class Clip(NamedTuple):
    """A CLIP as read: tensors under transformers' names, sizes, mean and deviation of its pixels."""

    tensors: dict[str, np.ndarray]
    config: CLIPConfig
    statistics: Statistics


class _Hidden(NamedTuple):
    """Settings that weights do not show. heads: number by tower."""

    heads: dict[str, int]
    hidden_act: str
    statistics: Statistics = CLIP_STATISTICS


def read_clip(path: Path, root: Path, base: Base | None = None) -> Clip:
    """Reads a CLIP in any published layout.

    Args:
        path: a file of OpenAI, OpenCLIP or transformers, or a folder of the latter two, whole or in shards.
        root: folder for converted copies of pickles if the checkpoint's folder is not writable.
        base: the CLIP that the score was trained from; None if it takes any.

    Raises:
        FileNotFoundError: the folder has no weights.
        ValueError: the files are broken or do not match each other, or nothing states a setting that weights do not
            show; the message says which file would.
    """
    file = _weights_in(path) if path.is_dir() else path
    stored, beside = _read(file, root), file.with_name("config.json")
    if "visual_projection.weight" in stored and beside.is_file():
        config = config_from_json(files.read_json(beside), str(beside))
        return Clip(stored, config, _transformers_statistics(file.with_name("preprocessor_config.json")))
    tensors = clip_layouts.to_transformers(stored)
    return Clip(tensors, *config_of(tensors, file, base))


def _weights_in(folder):
    names = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    names += tuple(f"{name}{_INDEX}" for name in names[:2])
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    if file is None:
        raise hub.ModelNotFound(f"{folder}: no weights; expected {' or '.join(names)} in it")
    return file


def _read(file, root):
    if file.name.endswith(_INDEX):
        return diffusers.read_shards(file, lambda shard: read_cached(shard, root))
    return read_cached(file, root)


def config_of(tensors: dict[str, np.ndarray], file: Path, base: Base | None = None) -> tuple[CLIPConfig, Statistics]:
    """Sizes and statistics of a CLIP without transformers' config.json: OpenAI's, one with an open_clip_config.json, or
    one of published sizes.

    Raises:
        ValueError: see `read_clip`.
    """
    sizes, beside = clip_layouts.sizes_of(tensors, str(file)), file.with_name(OPEN_CLIP_CONFIG)
    towers = {name: sizes[name] for name in ("vision", "text") if name in sizes}
    if _OPENAI_MARK in tensors:
        hidden = _Hidden({name: tower["hidden_size"] // 64 for name, tower in towers.items()}, "quick_gelu")
    elif beside.is_file():
        hidden = _read_open_clip(beside, towers)
    else:
        hidden = _published(file, towers, base)
    for name, tower in towers.items():
        tower |= {"num_attention_heads": hidden.heads[name], "hidden_act": hidden.hidden_act}
    try:
        text, vision = CLIPTextConfig(**towers.get("text", {})), CLIPVisionConfig(**towers["vision"])
    except ValueError as error:
        raise WeightsError(f"{file}: {error}") from error
    return CLIPConfig(text, vision, sizes["projection_dim"]), hidden.statistics


def _read_open_clip(path, towers):
    """The settings that an open_clip_config.json states; also one of open_clip's model_configs under that name."""
    settings = files.read_json(path)
    model, heads = _section(path, settings, "model_cfg") or settings, {}
    for name, tower in towers.items():
        stated = _section(path, model, f"{name}_cfg")
        for field, value in stated.items():
            if value and field not in _SHOWN and value != _IMPLEMENTED[name].get(field):
                raise WeightsError(f"{path}: {name}_cfg: {field}={value!r} is not implemented")
        sizes = (stated.get("width"), stated.get("layers"))
        if sizes != (tower["hidden_size"], tower["num_hidden_layers"]):
            raise WeightsError(
                f"{path}: {name}_cfg states width and layers {sizes}, the weights beside it have "
                f"{tower['hidden_size'], tower['num_hidden_layers']}: it belongs to another model"
            )
        head_width = stated.get("head_width", 64)
        if not isinstance(head_width, int) or head_width < 1:
            raise WeightsError(f"{path}: {name}_cfg: head_width={head_width!r} should be a whole number of at least 1")
        heads[name] = stated.get("heads", tower["hidden_size"] // head_width)
    pixels = _section(path, settings, "preprocess_cfg")
    hidden_act = "quick_gelu" if model.get("quick_gelu") else "gelu"
    return _Hidden(heads, hidden_act, _statistics(path, pixels, "mean", "std", _OPEN_CLIP_PIXELS))


def _published(file, towers, base):
    """The settings of published sizes; their activation may be that of the score's base."""
    vision, text = towers["vision"], towers.get("text")
    key = vision["hidden_size"], vision["num_hidden_layers"]
    head, text_width, hidden_act = _PUBLISHED.get(key, (None, None, None))
    if base is not None and base.vision_width == vision["hidden_size"]:
        hidden_act = base.hidden_act
    if head is None or (text and text["hidden_size"] != text_width):
        hidden = "how wide its attention heads are (its sizes are not those of a published model)"
    elif hidden_act is None:
        hidden = "its activation (QuickGELU in OpenAI's models, GELU in most others)"
    else:
        widths = {"vision": head, "text": 64}
        return _Hidden({name: tower["hidden_size"] // widths[name] for name, tower in towers.items()}, hidden_act)
    raise WeightsError(
        f"{file}: weights do not show {hidden}: put the model's {OPEN_CLIP_CONFIG} beside it (its file of open_clip's "
        "model_configs will do, under that name), or transformers' config.json if they are in its layout"
    )


def config_from_json(settings: dict, what: str) -> CLIPConfig:
    """Builds a `CLIPConfig` from transformers' config.json.

    Files of 2022 repeat every setting of text generation in both encoders, so fields that are not sizes are ignored.
    The mapping of weights checks the sizes.

    Raises:
        ValueError: naming `what` and the field that is wrong.
    """
    parts = []
    for name, config_class in (("text_config", CLIPTextConfig), ("vision_config", CLIPVisionConfig)):
        values = settings.get(f"{name}_dict") or settings.get(name) or {}  # as transformers: the former is older
        if not isinstance(values, dict):
            raise ValueError(f"{what}: {name}={values!r:.100}: expected an object")
        known = {field.name for field in dataclasses.fields(config_class)} - {"architectures"}
        values = {key: value for key, value in values.items() if key in known}
        try:
            parts.append(config_class(**check_types(config_class, values, config_class.__name__)))
        except ValueError as error:
            raise ValueError(f"{what}: {name}: {error}") from error
    width = check_types(CLIPConfig, {"projection_dim": settings.get("projection_dim", 512)}, what)
    return CLIPConfig(*parts, **width)


def _transformers_statistics(path):
    settings = files.read_json(path) if path.is_file() else {}
    return _statistics(path, settings, "image_mean", "image_std", _TRANSFORMERS_PIXELS)


def _statistics(path, settings, mean, std, implemented):
    """The mean and deviation that a file states, by default CLIP's; pixels are otherwise prepared as CLIP's are."""
    for field, value in implemented.items():
        if settings.get(field, value) != value:
            raise WeightsError(f"{path}: {field}={settings[field]!r} is not implemented, only {value!r}")
    statistics = [settings.get(name, values) for name, values in zip((mean, std), CLIP_STATISTICS)]
    for name, values in zip((mean, std), statistics):
        if not isinstance(values, list | tuple) or [isinstance(value, int | float) for value in values] != [True] * 3:
            raise WeightsError(f"{path}: {name}={values!r} should be three numbers")
    return tuple(map(tuple, statistics))


def _section(path, settings, name):
    section = settings.get(name) or {}
    if not isinstance(section, dict):
        raise WeightsError(f"{path}: {name}={section!r} should be an object")
    return section
