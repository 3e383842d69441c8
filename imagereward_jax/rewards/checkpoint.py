"""Finds, reads and caches the weights of the ImageReward scorer."""

import dataclasses
import difflib
import hashlib
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np

from imagereward_jax.models.blip_config import BlipScoreConfig, ImageRewardConfig, TextConfig
from imagereward_jax.rewards.base import held_params, named_dtype
from imagereward_jax.rewards.imagereward import CONFIG_FILE, VOCAB_FILE, WEIGHTS_FILE, ImageReward, abstract_module
from imagereward_jax.rewards.tokens import PromptTokenizer
from imagereward_jax.storage.errors import StorageError
from imagereward_jax.terminal import escape
from imagereward_jax.weights import files, hub, mapping

SizedConfig = TypeVar("SizedConfig", ImageRewardConfig, BlipScoreConfig)
V1 = ImageRewardConfig()
HUB_REPO = "THUDM/ImageReward"
HUB_MODELS = {"ImageReward-v1.0": "ImageReward.pt"}
MED_CONFIG_FILE = "med_config.json"
VOCAB_REPO = "bert-base-uncased"
DEFAULT_ROOT = "~/.cache/ImageReward"
IGNORED_KEYS = (r"(^|\.)position_ids$",)


def available_models() -> list[str]:
    """Returns the names that `load` knows: ImageReward on the hub, and the rewards built into the package."""
    return [*HUB_MODELS, *hub.builtin_rewards()]


def load(
    name_or_path: str | os.PathLike = "ImageReward-v1.0",
    device: str | jax.Device | None = None,
    download_root: str | os.PathLike | None = None,
    med_config: str | os.PathLike | None = None,
    *,
    tokenizer: str | os.PathLike | None = None,
    dtype: str = "float32",
    batch_size: int = 16,
    image_rule: str = "shown",
) -> ImageReward:
    """Loads an ImageReward scorer.

    A PyTorch checkpoint is converted once. The `.safetensors` copy in `download_root` makes the next load fast; it is
    rewritten when the checkpoint changes.

    Args:
        name_or_path: a name of `available_models()`, the path of an `ImageReward.pt`, or a folder that
            `ImageReward.save` or `convert/imagereward.py` wrote, here or on the hub ("owner/name").
        device: None for all local devices, "cpu", "gpu", "cuda:1", a `jax.Device`.
        download_root: folder for downloads; ~/.cache/ImageReward by default.
        med_config: path of the text encoder's `med_config.json`; by default the one beside the checkpoint, else the
            sizes are those of v1.0.
        tokenizer: path of a BERT vocab.txt or its folder. By default the one beside the checkpoint, else that of
            bert-base-uncased from the hub.
        dtype: "float32" or "bfloat16".
        batch_size: images per batch.
        image_rule: how images are read that are not plain RGB: "shown" (as a viewer shows them) or "original" (as
            ImageReward's own code reads them); see `data.images`.

    Returns:
        An `ImageReward`.

    Raises:
        FileNotFoundError: the model, a file or the vocabulary does not exist (`hub.ModelNotFound`).
        ValueError: the files do not match each other, or are broken.
    """
    options = {"device": device, "dtype": dtype, "batch_size": batch_size, "image_rule": image_rule}
    root = Path(os.path.expanduser(download_root or DEFAULT_ROOT))
    path = _find(str(name_or_path), root)
    if path.is_dir():
        return _load_folder(path, tokenizer, options)
    if med_config is None:
        med_config = _find_med_config(path, name_or_path, root)
    config = V1 if med_config is None else with_text(V1, med_config)
    prompt_tokenizer = PromptTokenizer.from_file(tokenizer or find_vocab_near(path.parent), config.max_prompt_tokens)
    return _build(config, read_cached(path, root), path, prompt_tokenizer, options)


def read_cached(path: Path, root: Path) -> dict[str, np.ndarray]:
    """Reads a file of tensors; a pickle from its safetensors copy if one for the same size and time exists."""
    if path.suffix not in files.PICKLES:
        return files.read_tensors(path)
    status = path.stat()
    stamp = f"{status.st_size}-{status.st_mtime_ns}"
    place = _copy_of(path, root)
    if _stamp(place) == stamp:
        return files.read_tensors(place)
    tensors = files.read_tensors(path)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        files.write_safetensors(place, tensors, {"format": "pt", "source": stamp})
    except (OSError, StorageError) as error:
        # The text is always the same, so that Python's default filter shows it once per process.
        told = escape(f"cannot store a converted copy of {path} ({error}): it is converted at each load")
        warnings.warn(told, stacklevel=3)
    return tensors


def _copy_of(path, root):
    """In the package's own folder: beside the checkpoint it could replace a file of another tool."""
    digest = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]
    return root / "converted" / f"{path.stem}-{digest}.safetensors"


def _stamp(place):
    """Returns the source stamp of a copy; None if there is no readable one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(place, framework="np") as file:
            return (file.metadata() or {}).get("source")
    except (OSError, SafetensorError):
        return None


def _builtin_folder(name):
    return hub.ASSETS / name / "reward"


def _find(name, root):
    """Finds the folder or file of a model."""
    path = Path(os.path.expanduser(name))
    if name in HUB_MODELS:
        downloaded = root / HUB_MODELS[name]  # the original package's location, too
        return downloaded if downloaded.is_file() else hub.resolve_file(HUB_REPO, HUB_MODELS[name], cache_dir=root)
    if path.is_dir() and not (path / CONFIG_FILE).is_file() and (path / "ImageReward.pt").is_file():
        return path / "ImageReward.pt"
    if path.exists():
        return path
    if name in available_models():
        return _builtin_folder(name)
    if is_repository(name):
        return hub.resolve_model(name, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE, VOCAB_FILE], cache_dir=root)
    raise unknown_model(name, available_models())


def is_repository(name: str) -> bool:
    """Whether `name` can be that of a scorer on the hub, as `imagereward push` uploads it."""
    return hub.is_repository(name) and Path(name).suffix not in (*files.PICKLES, ".safetensors")


def unknown_model(name: str, known: Sequence[str]) -> hub.ModelNotFound:
    """Makes the `hub.ModelNotFound` for a name that is neither a path nor `known`; it suggests the nearest name."""
    if hub.looks_like_path(name) or Path(name).suffix in (*files.PICKLES, ".safetensors"):
        return hub.ModelNotFound(f"{name}: no such file or folder")
    lower = {one.lower(): one for one in known}
    close = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.4)
    hint = f" (did you mean {lower[close[0]]!r}?)" if close else ""
    if ":" in name:
        hint = " (a function of yours is named module:function, or jax:module:function; it is at its module's top)"
    return hub.ModelNotFound(f"no model {name!r}{hint}; known: {', '.join(known)}, or the path of one")


def _find_med_config(path, name, root):
    beside = path.with_name(MED_CONFIG_FILE)
    if beside.is_file():
        return beside
    return hub.resolve_file(HUB_REPO, MED_CONFIG_FILE, cache_dir=root) if name in HUB_MODELS else None


def with_text(config: SizedConfig, med_config: str | os.PathLike) -> SizedConfig:
    """Replaces the text encoder's sizes of a config by those of a med_config.json."""
    return dataclasses.replace(config, text=TextConfig.from_dict(files.read_json(med_config), str(med_config)))


def config_of(name: str) -> ImageRewardConfig:
    """Reads the sizes of an ImageReward without its weights: from the config.json of a folder or built-in reward.

    A file has the sizes of v1.0, with the text encoder of the med_config.json beside it.
    """
    if is_repository(name):
        path = hub.resolve_model(name, allow_patterns=[CONFIG_FILE])
    else:
        path = _builtin_folder(name) if name in hub.builtin_rewards() else Path(os.path.expanduser(name))
    if (path / CONFIG_FILE).is_file():
        return ImageRewardConfig.from_dict(files.read_json(path / CONFIG_FILE), str(path / CONFIG_FILE))
    if path.name and (text := path.with_name(MED_CONFIG_FILE)).is_file():
        return with_text(V1, text)
    return V1


def find_vocab_near(folder: Path) -> Path:
    """Finds the BERT vocabulary in a checkpoint's folder, else bert-base-uncased's on the hub."""
    beside = folder / VOCAB_FILE
    if beside.is_file():
        return beside
    try:
        return hub.resolve_file(VOCAB_REPO, VOCAB_FILE)
    except hub.ModelNotFound as error:
        raise hub.ModelNotFound(
            f"no vocabulary: {beside} does not exist, and bert-base-uncased cannot be downloaded; pass "
            f"`tokenizer=`, the path of a vocab.txt ({error})"
        ) from error


def _load_folder(folder, tokenizer, options):
    if not (folder / CONFIG_FILE).is_file() or not (folder / WEIGHTS_FILE).is_file():
        raise hub.ModelNotFound(
            f"{folder}: not a reward model; expected {CONFIG_FILE} and {WEIGHTS_FILE} (or an ImageReward.pt) in it"
        )
    path = folder / CONFIG_FILE
    config = ImageRewardConfig.from_dict(files.read_json(path), str(path))
    prompt_tokenizer = PromptTokenizer.from_file(tokenizer or folder, config.max_prompt_tokens)
    path = folder / WEIGHTS_FILE
    return _build(config, files.read_tensors(path), path, prompt_tokenizer, options)


def _build(config, tensors, path, tokenizer, options):
    module = abstract_module(config, named_dtype(options["dtype"]))
    params = mapping.from_torch(
        module, tensors, what=str(path), ignore=IGNORED_KEYS, target=held_params(module, options["dtype"])
    )
    return ImageReward(config, params, tokenizer, **options)
