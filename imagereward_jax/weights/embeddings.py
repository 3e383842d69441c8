"""Files of textual-inversion embeddings (arXiv 2208.01618), as diffusers, web UIs and trainers for SDXL write them."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from imagereward_jax.weights import files, hub
from imagereward_jax.weights.files import WeightsError

FILE = "learned_embeds.safetensors"  # diffusers' name
# Keys that say which text encoder their vectors are for, by its name in a diffusers folder.
ENCODERS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5xxl": "text_encoder_3"}


class Embedding(NamedTuple):
    """The vectors that stand for a word in prompts.

    path: the file. token: the word. vectors: [n, d] by text encoder; by "" if the file does not say for which.
    """

    path: Path
    token: str
    vectors: dict[str, np.ndarray]


def read_embedding(name_or_path: str | Path, token: str | None = None) -> Embedding:
    """Reads an embedding.

    Args:
        name_or_path: a file (.safetensors, .bin, .pt), a folder or a hub repository with diffusers' learned_embeds. It
            holds {word: [n, d] or [d]} (diffusers), `string_to_param` or `emb_params` (web UIs), `clip_l` and `clip_g`
            (SDXL; SD 3 with `t5xxl`), or one tensor.
        token: the word; by default the one in the file, or else the file's name.

    Raises:
        FileNotFoundError: there is no such file.
        WeightsError: it is damaged, no embedding, or a pickle with more than tensors.
    """
    path = hub.find_file(name_or_path, FILE, "embedding")
    read = files.load_pickle if path.suffix in files.PICKLES else files.read_tensors
    stored, vectors = _vectors(path, read(path))
    token = token or stored or path.stem
    if not token.strip() or any(character.isspace() for character in token):
        raise WeightsError(f"{path}: the word {token!r} should have no spaces; choose another: FILE=WORD")
    return Embedding(path, token, {name: _checked(path, name, array) for name, array in vectors.items()})


def parse_embedding(text: str) -> tuple[str, str | None]:
    """Parses PATH[=WORD] into (path, word or None); a file whose name holds "=" is taken as it is.

    Raises:
        WeightsError: there is no word after the "=".
    """
    path, equals, word = text.rpartition("=")
    if not equals or os.path.exists(text):
        return text, None
    if not path or not word:
        raise WeightsError(f"{text!r} should be the path of an embedding, or PATH=WORD")
    return path, word


def _vectors(path, content) -> tuple[str | None, dict[str, Any]]:
    """(word or None, vectors by text encoder) of a file's content."""
    if not isinstance(content, Mapping):
        return None, {"": content}
    if "string_to_param" in content:
        stored = content["string_to_param"]
        stored = getattr(stored, "_parameters", stored)  # of a ParameterDict
        if not isinstance(stored, Mapping) or "*" not in stored:
            raise WeightsError(f"{path}: string_to_param should hold the vectors of '*'")
        name = content.get("name")
        return name if isinstance(name, str) else None, {"": stored["*"]}
    if content and set(content) <= set(ENCODERS):
        return None, {ENCODERS[key]: array for key, array in content.items()}
    if len(content) == 1:
        ((name, array),) = content.items()
        return None if name == "emb_params" else str(name), {"": array}
    shown = ", ".join(map(str, list(content)[:4])) + (", ..." if len(content) > 4 else "")
    raise WeightsError(
        f"{path}: no textual-inversion embedding; expected one word with its vectors, string_to_param, emb_params or "
        f"{', '.join(ENCODERS)}, found {shown or 'nothing'} (adapters are passed with --lora)"
    )


def _checked(path, name, array):
    """Vectors [n, d] in float32."""
    what = name or "its tensor"
    if not isinstance(array, np.ndarray):
        if not hasattr(array, "untyped_storage"):
            raise WeightsError(f"{path}: {what} should be a tensor, not a {type(array).__name__}")
        array = files.torch_to_numpy(path, what, array)
    array = np.atleast_2d(array)
    if array.ndim != 2 or not array.size or array.dtype.kind in "biuc":
        raise WeightsError(f"{path}: {what} should be vectors [n, d], not {array.dtype} {list(array.shape)}")
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise WeightsError(f"{path}: {what} has values that are not finite numbers")
    return array
