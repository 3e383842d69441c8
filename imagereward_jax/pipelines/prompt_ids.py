"""CLIP tokenizers of checkpoints, and token ids of prompts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def is_path(given: Any) -> bool:
    """Whether a tokenizer is given as its folder."""
    return isinstance(given, str | Path)


def open_tokenizer(given: Any, encoder: str, vocab_size: int) -> Any:
    """Returns a given tokenizer, or loads it from a given folder; checks it against its text encoder.

    Raises:
        FileNotFoundError: the folder holds no tokenizer.
        ValueError: it has more tokens than the text encoder `encoder`.
    """
    tokenizer = _load(Path(given)) if is_path(given) else given
    if len(tokenizer) > vocab_size:
        raise ValueError(f"{given}: {len(tokenizer)} tokens, but {encoder} knows only vocab_size={vocab_size}")
    return tokenizer


def common_length(lengths: Mapping[str, int]) -> int:
    """The one length of prompts, from those of the tokenizers by name.

    Raises:
        ValueError: they differ.
    """
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the text encoders take prompts of different lengths: {dict(lengths)}; expected one")
    return next(iter(lengths.values()))


def encode(tokenizer: Any, prompts: Sequence[str], length: int) -> np.ndarray:
    """Token ids int32 [B, length] of prompts, padded and cut."""
    encoded = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True)
    return np.asarray(encoded["input_ids"], np.int32).reshape(-1, length)


def _load(folder):
    """Loads a CLIP tokenizer from vocab.json and merges.txt or from tokenizer.json."""
    slow = all((folder / name).is_file() for name in ("vocab.json", "merges.txt"))
    if not slow and not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{folder}: no tokenizer; expected vocab.json and merges.txt, or tokenizer.json")
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder)
