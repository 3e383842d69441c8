"""Reads and writes model folders in the layout of diffusers: one subfolder per component, `model_index.json` on top.

Reading gives the names and layouts of today's PyTorch checkpoints, whatever the folder's age: safetensors or pickles,
whole or in shards, with or without a variant ("fp16"), VAE attention under its names before diffusers 0.17, text
encoders with and without `text_model.`, and the msgpack files of diffusers' Flax models.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from imagereward_jax.storage.folders import new_folder
from imagereward_jax.storage.names import resolve_inside, single_name
from imagereward_jax.weights import components, hub
from imagereward_jax.weights.files import WeightsError, read_json, read_tensors, write_safetensors
from imagereward_jax.weights.generation import Generation, write_generation
from imagereward_jax.weights.tokenizer_files import SPIECE, tokenizer_class

INDEX = "model_index.json"
_TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
# What tokenizers of transformers are saved as; nothing else in a tokenizer's folder is copied.
TOKENIZER_FILES = (
    *("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.txt", SPIECE),
)
# Settings of a pipeline's class beside its parts: defaults to write, and names to read.
_NO_SAFETY_CHECKER = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"), (None, None))
_WRITTEN_FIELDS = {
    "StableDiffusionPipeline": {"requires_safety_checker": False} | _NO_SAFETY_CHECKER,
    # Unless T5 is among the parts.
    "StableDiffusion3Pipeline": dict.fromkeys(("text_encoder_3", "tokenizer_3"), (None, None)),
}
_READ_FIELDS = ("force_zeros_for_empty_prompt",)
# Files of a hub repository that opening a pipeline needs.
_STRUCTURE = [INDEX, "generation_config.json", "*/config.json", "scheduler/*", *(f"{name}/*" for name in _TOKENIZERS)]
# Settings that only diffusers' Flax models have; none changes what a network computes.
_FLAX_ONLY = ("dtype", "use_memory_efficient_attention", "split_head_dim")


class Index(NamedTuple):
    """The content of a folder's model_index.json.

    Attributes:
        pipeline_class: the class of the pipeline, or None.
        classes: the class of each network that this package reads, by component, under PyTorch's name.
        fields: settings of the pipeline beside its parts.
        absent: names of the parts that the model is stated to lack.
    """

    pipeline_class: str | None
    classes: dict[str, str]
    fields: dict[str, Any]
    absent: frozenset[str] = frozenset()


def read_index(folder: str | Path) -> Index:
    """Reads the `Index` of a diffusers folder.

    Raises:
        FileNotFoundError: there is no model_index.json. StorageError: it is broken.
    """
    path = Path(folder) / INDEX
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no {INDEX}; expected a folder that diffusers saved")
    index = read_json(path)
    parts = {name: entry[1] for name, entry in index.items() if isinstance(entry, list) and len(entry) == 2}
    for name in parts:
        single_name(name, f"{path}: component")
    classes = {
        name: components.torch_class(kind, str(path)) for name, kind in parts.items() if components.is_component(kind)
    }
    fields = {name: index[name] for name in _READ_FIELDS if name in index}
    check_fields(fields, str(path))
    absent = frozenset(name for name, kind in parts.items() if kind is None)
    return Index(index.get("_class_name"), classes, fields, absent)


def check_fields(fields: Mapping[str, Any], where: str) -> None:
    """Refuses settings of a pipeline that are unknown or not true or false; `where` names the file."""
    for name, value in fields.items():
        if name not in _READ_FIELDS or not isinstance(value, bool):
            raise WeightsError(f"{where}: {name}={value!r:.100}: expected true or false of {', '.join(_READ_FIELDS)}")


def resolve_structure(name_or_path: str | Path, *, cache_dir: str | Path | None = None) -> Path:
    """Finds the folder of a pipeline; from the hub, downloads its settings and tokenizers but no weights.

    Args:
        name_or_path, cache_dir: as for `hub.resolve_model`.

    Raises:
        hub.ModelNotFound: there is no such model, or the hub cannot be reached.
    """
    return hub.resolve_model(name_or_path, allow_patterns=_STRUCTURE, cache_dir=cache_dir)


def resolve_pipeline(
    name_or_path: str | Path, *, variant: str | None = None, cache_dir: str | Path | None = None
) -> Path:
    """Finds the diffusers folder of a pipeline; from the hub, downloads only the files that are read.

    Args:
        name_or_path, cache_dir: as for `hub.resolve_model`.
        variant: as for `load_component`.

    Raises:
        hub.ModelNotFound: there is no such model, or the hub cannot be reached.
        FileNotFoundError: it has no model_index.json.
    """
    folder = resolve_structure(name_or_path, cache_dir=cache_dir)
    if Path(os.path.expanduser(str(name_or_path))).is_dir() or name_or_path in hub.builtin_models():
        return folder
    wanted = [name for name in read_index(folder).classes if (folder / name / "config.json").is_file()]
    for stated in dict.fromkeys((variant, None)):
        for kind in ("safetensors", "bin", "msgpack"):
            files = [f"{name}/{file}" for name in wanted for file in _file_patterns(name, kind, stated)]
            folder = hub.resolve_model(name_or_path, allow_patterns=_STRUCTURE + files, cache_dir=cache_dir)
            wanted = [name for name in wanted if _find_weights(folder / name, name, stated) is None]
            if not wanted:
                return folder
        if not _has_variant(folder, variant):
            break
    return folder


def load_config(folder: str | Path, name: str) -> dict[str, Any]:
    """Reads a component's config.json; leaves out fields that only diffusers' Flax models have.

    Raises:
        FileNotFoundError: the folder, component or file is absent; the message says what is there.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    part = folder / name
    if not part.is_dir():
        raise FileNotFoundError(f"{part}: no such folder; {folder} has {_listing(folder, Path.is_dir)}")
    config = read_json(part / "config.json")
    return _without_flax_fields(config) if "_class_name" in config else config


def _without_flax_fields(config):
    return {key: value for key, value in config.items() if key not in _FLAX_ONLY}


def load_component(
    folder: str | Path,
    name: str,
    *,
    variant: str | None = None,
    read: Callable[[Path], dict[str, Any]] = read_tensors,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads one network's settings and weights from a diffusers folder.

    Args:
        folder: the pipeline's folder.
        name: the component: "unet", "vae", "text_encoder", "text_encoder_2", ...
        variant: which set of files, e.g. "fp16" for `diffusion_pytorch_model.fp16.safetensors`; None takes the plain
            ones, as does a network without the variant if another of the folder has it. Of several formats the first
            of safetensors, .bin and msgpack is read.
        read: function that reads a file of tensors: `files.read_tensors`, or `files.open_tensors` to read each tensor
            only when it is needed.

    Returns:
        (config, tensors): the content of config.json, and numpy arrays by the key of today's PyTorch checkpoints
        (CLIP's text encoders with their `text_model.` prefix), in the file's dtype.

    Raises:
        FileNotFoundError: the folder, component or file is absent; the message says what is there.
        StorageError: a file is broken.
    """
    config, part = load_config(folder, name), Path(folder) / name
    path = _find_weights(part, name, variant)
    if path is None and variant and _has_variant(part.parent, variant):
        path = _find_weights(part, name, None)
    if path is None:
        raise FileNotFoundError(_nothing_found(part, name, variant))
    tensors = read_shards(path, read) if path.suffix == ".json" else read(path)
    if path.suffix == ".msgpack":
        tensors, config = flax_to_torch(tensors), _without_flax_fields(config)
    return config, modern_names(name, tensors)


def tokenizers_of(folder: str | Path) -> dict[str, Path]:
    """Lists the tokenizers' folders in a diffusers folder, by name."""
    return {name: Path(folder) / name for name in _TOKENIZERS if (Path(folder) / name).is_dir()}


def load_scheduler_config(folder: str | Path) -> dict[str, Any]:
    """Reads scheduler/scheduler_config.json of a folder."""
    return read_json(Path(folder) / "scheduler" / "scheduler_config.json", infinite=True)


def save_component(
    folder: str | Path, name: str, config: dict[str, Any], tensors: Mapping[str, Any], *, overwrite: bool = False
) -> None:
    """Writes one network, its config.json and one safetensors file, as `folder/name`, whole or not at all.

    Args:
        tensors: arrays by PyTorch key. config: the content of config.json; it states the class.

    Raises:
        FileExistsError: `folder/name` is there and not empty, and `overwrite` is false.
        ValueError: config states no class that is implemented.
        WriteError: it could not be written.
    """
    label = components.label(components.class_of(config, name))
    with new_folder(Path(folder) / name, overwrite=overwrite, marker="config.json") as partial:
        _write_json(partial / "config.json", config | label)
        write_safetensors(partial / f"{_stem(name, 'safetensors')}.safetensors", tensors)


def save_pipeline(
    folder: str | Path,
    networks: Mapping[str, tuple[dict, Mapping]] | Iterable[tuple[str, tuple[dict, Mapping]]],
    *,
    pipeline_class: str,
    scheduler_config: dict[str, Any],
    tokenizers: Mapping[str, str | Path],
    fields: dict[str, Any] | None = None,
    generation: Generation | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a whole diffusers folder, which appears whole or not at all.

    Args:
        networks: by component, (config, tensors) as `save_component` takes them; may be an iterator of
            (name, (config, tensors)), so that no more than one need be in memory.
        pipeline_class: the class that diffusers opens the folder with.
        scheduler_config: the content of scheduler_config.json; its `_class_name` says how diffusers samples.
        tokenizers: folder to copy by name, e.g. {"tokenizer": path}.
        fields: settings of the pipeline's class beside its parts, e.g. {"force_zeros_for_empty_prompt": True}.
        generation: the `Generation` to state, or None.

    Raises:
        FileExistsError: `folder` is there and not empty, and `overwrite` is false or it is not a diffusers folder.
        ValueError: the scheduler's class is not stated. FileNotFoundError: a tokenizer folder is absent.
        WriteError: it could not be written. StorageError: a link in a tokenizer's folder leads out of the model's.
    """
    pairs = networks.items() if isinstance(networks, dict) else networks
    with new_folder(folder, overwrite=overwrite, marker=INDEX) as partial:
        parts = {}
        for name, (config, tensors) in pairs:
            save_component(partial, name, config, tensors)
            class_name = components.class_of(config, name)
            parts[name] = (components.COMPONENTS[class_name].library, class_name)
        if "_class_name" not in scheduler_config:
            raise ValueError("scheduler config: no _class_name; diffusers needs one, e.g. 'DDIMScheduler'")
        for name, source in tokenizers.items():
            copy_tokenizer(Path(source), partial / name)
            parts[name] = ("transformers", tokenizer_class(partial / name))
        (partial / "scheduler").mkdir()
        _write_json(partial / "scheduler" / "scheduler_config.json", scheduler_config)
        parts["scheduler"] = ("diffusers", scheduler_config["_class_name"])
        index = {"_class_name": pipeline_class} | _WRITTEN_FIELDS.get(pipeline_class, {}) | (fields or {})
        _write_json(partial / INDEX, index | parts)
        if generation is not None:
            write_generation(partial, generation)


def flax_to_torch(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Converts the (flattened) parameters of a diffusers or transformers Flax model to PyTorch's names and layouts.

    `down_blocks_0.resnets_0.conv1.kernel` [k, k, in, out] becomes `down_blocks.0.resnets.0.conv1.weight`
    [out, in, k, k]; Linear kernels [in, out] are transposed; scale and embedding become weight.
    """
    numbered = r"(down_blocks|up_blocks|resnets|attentions|transformer_blocks|downsamplers|upsamplers|to_out|net)_(\d+)"
    axes = {2: (1, 0), 4: (3, 2, 0, 1)}
    renamed = {}
    for key, array in tensors.items():
        *parents, last = key.removeprefix("params.").split(".")
        parents = [re.sub(f"^{numbered}$", r"\1.\2", part) for part in parents]
        if last == "kernel":
            array = array.transpose(axes[array.ndim])
        renamed[".".join([*parents, "weight" if last in ("kernel", "scale", "embedding") else last])] = array
    return renamed


def modern_names(name: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Brings a PyTorch checkpoint's tensors of component `name` to today's keys and shapes; drops position_ids."""
    if any(key.startswith("encoder.block.") for key in tensors):
        return _untied(name, tensors)
    is_text = name.startswith("text_encoder")
    renamed = {}
    for key, array in tensors.items():
        if key.endswith("position_ids"):
            continue
        if is_text:
            key = key if key.startswith(("text_model.", "text_projection.")) else f"text_model.{key}"
        else:
            key, array = _modern_attention(key, array)
        renamed[key] = array
    return renamed


def _untied(name, tensors):
    """T5's tensors with the embedding once, as "shared.weight"; files hold it under either name or both."""
    own, other = "shared.weight", "encoder.embed_tokens.weight"
    renamed = {key: array for key, array in tensors.items() if key != other}
    if other in tensors:
        same = renamed.setdefault(own, tensors[other])
        if same is not tensors[other] and not np.array_equal(np.asarray(same), np.asarray(tensors[other])):
            raise WeightsError(
                f"{name}: {own} and {other} differ; they are one embedding, keep the one that was trained"
            )
    return renamed


def _modern_attention(key, array):
    """Renames the old query, key, value and proj_attn of the VAE's attention, which may be 1x1 convolutions."""
    modern = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    match = re.fullmatch(r"(.*\battentions\.\d+\.)(query|key|value|proj_attn|to_[qkv]|to_out\.0)\.(weight|bias)", key)
    if match is None:
        return key, array
    prefix, layer, kind = match.groups()
    if array.ndim == 4 and array.shape[2:] == (1, 1):
        array = array.reshape(array.shape[:2])
    return f"{prefix}{modern.get(layer, layer)}.{kind}", array


def _stem(name, kind):
    """The first part of a weights file's name for a component and one of the formats."""
    if name.startswith("text_encoder"):
        return {"safetensors": "model", "bin": "pytorch_model", "msgpack": "flax_model"}[kind]
    return "diffusion_flax_model" if kind == "msgpack" else "diffusion_pytorch_model"


def _weight_files(name, kind, variant):
    """File names that a component's weights (or the index of their shards) may have in one format."""
    stem, variant = _stem(name, kind), f".{variant}" if variant else ""
    return [f"{stem}{variant}.{kind}", f"{stem}.{kind}.index{variant}.json"]


def _file_patterns(name, kind, variant):
    shards = f"{_stem(name, kind)}{f'.{variant}' if variant else ''}-?????-of-?????.{kind}"
    return [*_weight_files(name, kind, variant), shards]


def _find_weights(part, name, variant):
    """Finds the file to read: safetensors before .bin before msgpack, whole before shards; None if there is none."""
    names = [file for kind in ("safetensors", "bin", "msgpack") for file in _weight_files(name, kind, variant)]
    return next((part / file for file in names if (part / file).is_file()), None)


def _has_variant(folder, variant):
    """Whether any network of a diffusers folder has files of the variant."""
    return any(_find_weights(part, part.name, variant) for part in folder.iterdir() if part.is_dir())


def _nothing_found(part, name, variant):
    """Explains why a component has no weights to read, and what to do: another variant may be there."""
    wanted = " or ".join(_weight_files(name, kind, variant)[0] for kind in ("safetensors", "bin", "msgpack"))
    found = f"it has {_listing(part, Path.is_file)}"
    stems = "|".join(_stem(name, kind) for kind in ("safetensors", "bin"))
    pattern = re.compile(rf"(?:{stems})(?:\.(?:safetensors|bin)\.index)?\.([\w-]+?)(?:\.safetensors|\.bin|\.json)")
    matches = filter(None, (pattern.fullmatch(path.name) for path in part.iterdir()))
    others = sorted({match.group(1) for match in matches} - {variant})
    if others:
        return f"{part}: no {wanted}; {found}: pass " + " or ".join(f'variant="{other}"' for other in others)
    if variant and _find_weights(part, name, None):
        return f"{part}: no {wanted}; {found}: leave out variant={variant!r}"
    return f"{part}: no {wanted}; {found}"


def read_shards(index: Path, read: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Reads all files that an index names, each by `read`.

    Raises:
        FileNotFoundError: a file that it names is absent. StorageError: a file lacks tensors that it should hold, or
            the index is broken.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f'{index}: no "weight_map" that says which file holds which tensor')
    tensors = {}
    for shard in sorted({single_name(file, f"{index}: weight_map") for file in weight_map.values()}):
        path = index.parent / shard
        if not path.is_file():
            raise FileNotFoundError(f"{path}: this file is named in {index.name} but is not there; fetch it again")
        found = read(path)
        absent = sorted(key for key, file in weight_map.items() if file == shard and key not in found)
        if absent:
            raise WeightsError(f"{path}: lacks tensors that {index.name} says it holds: {', '.join(absent[:10])}")
        tensors |= {key: array for key, array in found.items() if weight_map.get(key) == shard}
    return tensors


def _listing(folder, keep):
    return ", ".join(sorted(path.name for path in folder.iterdir() if keep(path))) or "nothing"


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies the `TOKENIZER_FILES` of a folder in a model's, following links that stay in the model's folder.

    Raises:
        FileNotFoundError: there are none. StorageError: a link leads out of the model's folder.
    """
    found = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    if not found:
        raise FileNotFoundError(f"{source}: no such folder of tokenizer files")
    target.mkdir(exist_ok=True)
    for path in found:
        shutil.copyfile(resolve_inside(path, source.parent), target / path.name)


def _write_json(path, value):
    path.write_text(json.dumps(value, indent=2, sort_keys=True, default=_plain) + "\n", encoding="utf-8")


def _plain(value):
    """Converts NumPy numbers, which configs may hold and JSON may not."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{value!r} cannot be written as JSON")
