"""Tokenizers of checkpoints, CLIP's and T5's, and token ids of prompts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from imagereward_jax.weights.files import WeightsError, read_json
from imagereward_jax.weights.tokenizer_files import (
    SPIECE,
    check_merges,
    import_tokenizer,
    read_sentencepiece,
    tokenizer_class,
)

_CLIP_MARKS = ("<|startoftext|>", "<|endoftext|>")  # without them a prompt has no begin and no end
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
    if not is_path(given):
        tokenizer = given
    else:
        try:
            tokenizer = load(Path(given))
        except (FileNotFoundError, WeightsError):
            raise
        except Exception as error:  # of a library's many readers, for a broken file
            reason = (str(error).strip().splitlines() or [""])[0]
            raise WeightsError(f"{given}: no tokenizer that can be read ({type(error).__name__}: {reason})") from error
    if len(tokenizer) > vocab_size:
        raise ValueError(f"{given}: {len(tokenizer)} tokens, but {encoder} knows only vocab_size={vocab_size}")
    _check_ids(given, tokenizer, encoder, vocab_size)
    return tokenizer


def _check_ids(given, tokenizer, encoder, vocab_size):
    """Refuses ids that the encoder has no row for, or that several tokens share, and a length that is no number."""
    ids = tokenizer.get_vocab().values() if hasattr(tokenizer, "get_vocab") else ()
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        raise ValueError(f"{given}: ids up to {max(ids)}, but {encoder} knows only vocab_size={vocab_size}")
    if len(set(ids)) < len(ids):
        raise ValueError(f"{given}: {len(ids) - len(set(ids))} of its tokens share an id with another; fetch it again")
    length = tokenizer.model_max_length
    if isinstance(length, bool) or not isinstance(length, int | float) or not length >= 3:
        raise ValueError(f"{given}: tokenizer_config.json: model_max_length={length!r} should be a number above 2")


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
    encoded = tokenizer(_characters(prompts), padding="max_length", max_length=length, truncation=True)
    return np.asarray(encoded["input_ids"], np.int32).reshape(-1, length)


def count_cut(tokenizer: Any, prompts: Sequence[str], length: int) -> np.ndarray:
    """Number of tokens of each prompt that `encode` cuts off, int [B]; 0 for those that fit."""
    encoded = tokenizer(_characters(prompts), verbose=False)["input_ids"]
    return np.array([max(0, len(ids) - length) for ids in encoded], int)


def cut_off(tokenizer: Any, prompt: str, length: int) -> str:
    """The end of a prompt that `encode` cuts off because the prompt is too long; "" if it fits."""
    ids = tokenizer(*_characters([prompt]), add_special_tokens=False, verbose=False)["input_ids"]
    return tokenizer.decode(ids[length - tokenizer.num_special_tokens_to_add() :]).strip()


def _characters(prompts):
    """Without halves of characters, from broken JSON escapes, which tokenizers refuse."""
    return [prompt.encode("utf-8", "ignore").decode("utf-8") for prompt in prompts]


def _load_clip(folder):
    """Loads a CLIP tokenizer from vocab.json and merges.txt or from tokenizer.json."""
    slow = all((folder / name).is_file() for name in ("vocab.json", "merges.txt"))
    if not slow and not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{folder}: no tokenizer; expected vocab.json and merges.txt, or tokenizer.json")
    if slow:
        check_merges(folder)
    tokenizer = import_tokenizer("CLIPTokenizer").from_pretrained(folder)
    if (marks := (tokenizer.bos_token, tokenizer.eos_token)) != _CLIP_MARKS:
        raise WeightsError(
            f"{folder}: bos_token and eos_token are {marks}, expected {_CLIP_MARKS}: correct special_tokens_map.json "
            "and tokenizer_config.json"
        )
    return tokenizer


def _load_t5(folder):
    """Loads a T5 tokenizer from tokenizer.json, or from spiece.model without the library of SentencePiece."""
    fast, slow = folder / "tokenizer.json", folder / SPIECE
    if not fast.is_file() and not slow.is_file():
        raise FileNotFoundError(f"{folder}: no tokenizer of T5; expected tokenizer.json or {SPIECE}")
    T5Tokenizer = import_tokenizer("T5Tokenizer")
    if fast.is_file():
        if tokenizer_class(folder) != "T5TokenizerFast":
            raise ValueError(f"{fast}: not a tokenizer of T5, whose model is Unigram; pass the folder of T5's files")
        return T5Tokenizer.from_pretrained(folder)
    pieces, charsmap = read_sentencepiece(slow)
    if [piece for piece, _ in pieces[:3]] != _T5_FIRST:
        raise WeightsError(f"{slow}: not a vocabulary of T5; its first pieces should be {', '.join(_T5_FIRST)}")
    settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    extra = settings.get("extra_ids", _T5_EXTRA)
    if type(extra) is not int or not 0 <= extra <= 10_000:
        raise WeightsError(f"{folder}/tokenizer_config.json: extra_ids={extra!r} should be a whole number up to 10,000")
    vocab = [*pieces, *((f"<extra_id_{number}>", 0.0) for number in reversed(range(extra)))]
    options = {name: settings[name] for name in ("model_max_length",) if name in settings}
    return T5Tokenizer(vocab=vocab, _spm_precompiled_charsmap=charsmap, extra_ids=extra, **options)
