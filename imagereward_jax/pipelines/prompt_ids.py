"""Tokenizers of checkpoints, CLIP's and T5's, and token ids of prompts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from imagereward_jax.weights.files import WeightsError, read_json
from imagereward_jax.weights.tokenizer_files import SPIECE, read_sentencepiece, tokenizer_class

_T5_FIRST = ["<pad>", "</s>", "<unk>"]
_T5_EXTRA = 100  # sentinels "<extra_id_0>", ... after the pieces, in reverse


def is_path(given: Any) -> bool:
    """Whether a tokenizer is given as its folder."""
    return isinstance(given, str | Path)


def open_tokenizer(given: Any, encoder: str, vocab_size: int, class_name: str) -> Any:
    """Returns a given tokenizer, or loads it from a given folder; checks it against its text encoder.

    Args:
        class_name: of the text encoder; it decides the kind of tokenizer that a folder should hold.

    Raises:
        FileNotFoundError: the folder holds no tokenizer of that kind.
        ValueError: it has more tokens than the text encoder `encoder`, or cannot be read.
    """
    load = _load_t5 if class_name == "T5EncoderModel" else _load_clip
    tokenizer = load(Path(given)) if is_path(given) else given
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


def count_cut(tokenizer: Any, prompts: Sequence[str], length: int) -> np.ndarray:
    """Number of tokens of each prompt that `encode` cuts off, int [B]; 0 for those that fit."""
    encoded = tokenizer(list(prompts), verbose=False)["input_ids"]
    return np.array([max(0, len(ids) - length) for ids in encoded], int)


def cut_off(tokenizer: Any, prompt: str, length: int) -> str:
    """The end of a prompt that `encode` cuts off because the prompt is too long; "" if it fits."""
    ids = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
    return tokenizer.decode(ids[length - tokenizer.num_special_tokens_to_add() :]).strip()


def _load_clip(folder):
    """Loads a CLIP tokenizer from vocab.json and merges.txt or from tokenizer.json."""
    slow = all((folder / name).is_file() for name in ("vocab.json", "merges.txt"))
    if not slow and not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{folder}: no tokenizer; expected vocab.json and merges.txt, or tokenizer.json")
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder)


def _load_t5(folder):
    """Loads a T5 tokenizer from tokenizer.json, or from spiece.model without the library of SentencePiece."""
    fast, slow = folder / "tokenizer.json", folder / SPIECE
    if not fast.is_file() and not slow.is_file():
        raise FileNotFoundError(f"{folder}: no tokenizer of T5; expected tokenizer.json or {SPIECE}")
    from transformers import T5Tokenizer

    if fast.is_file():
        if tokenizer_class(folder) != "T5TokenizerFast":
            raise ValueError(f"{fast}: not a tokenizer of T5, whose model is Unigram; pass the folder of T5's files")
        return T5Tokenizer.from_pretrained(folder)
    pieces, charsmap = read_sentencepiece(slow)
    if [piece for piece, _ in pieces[:3]] != _T5_FIRST:
        raise WeightsError(f"{slow}: not a vocabulary of T5; its first pieces should be {', '.join(_T5_FIRST)}")
    settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    extra = settings.get("extra_ids", _T5_EXTRA)
    vocab = [*pieces, *((f"<extra_id_{number}>", 0.0) for number in reversed(range(extra)))]
    options = {name: settings[name] for name in ("model_max_length",) if name in settings}
    return T5Tokenizer(vocab=vocab, _spm_precompiled_charsmap=charsmap, extra_ids=extra, **options)
