"""Tokenizers of prompts: BERT's lower-case WordPiece with BLIP's two added tokens, and CLIP's byte pairs."""

import html
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from imagereward_jax.weights.tokenizer_files import CLIP_BPE, import_tokenizer, read_clip_bpe

ADDED_TOKENS = ("[DEC]", "[ENC]")
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class TokenizerError(ValueError):
    """The vocabulary cannot be used; the message names the file and the reason."""


def find_vocab(path: str | os.PathLike) -> Path:
    """Returns `path` itself, or the vocab.txt in it if it is a folder.

    Raises:
        FileNotFoundError: there is no such file.
    """
    path = Path(os.path.expanduser(path))
    file = path / "vocab.txt" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; expected a vocab.txt of BERT, or its folder")
    return file


def check_prompts(prompts: Sequence[str]) -> list[str]:
    """Removes lone surrogates (from broken JSON escapes) from prompts, as BertTokenizer does.

    Raises:
        ValueError: a prompt is not text.
    """
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ValueError(f"prompt {index} must be text, not {type(prompt).__name__}: {prompt!r}")
    return [prompt.encode("utf-8", "ignore").decode("utf-8") for prompt in prompts]


class PromptTokenizer:
    """Prompts -> ids, equal to those of transformers' `BertTokenizer` with `[DEC]` and `[ENC]` added.

    Args:
        vocab: text of a vocab.txt, one token per line.
        max_length: prompts are padded or truncated to this many tokens, `[CLS]` and `[SEP]` included.
        name: name of the vocabulary in errors.

    Raises:
        TokenizerError: a special token is missing, a line is empty or repeated, or `[PAD]` is not the first.
    """

    def __init__(self, vocab: str, max_length: int, name: str = "vocab.txt") -> None:
        from tokenizers import BertWordPieceTokenizer

        self.vocab = vocab
        self.max_length = max_length
        tokens = vocab.split("\n")
        tokens = [token.rstrip("\r") for token in (tokens[:-1] if tokens[-1] == "" else tokens)]
        ids = {token: index for index, token in enumerate(tokens)}
        missing = [token for token in SPECIAL_TOKENS if token not in ids]
        if missing:
            raise TokenizerError(f"{name}: not a BERT vocabulary; it lacks {', '.join(missing)}")
        if len(ids) != len(tokens):
            repeated = next(token for index, token in enumerate(tokens) if ids[token] != index)
            raise TokenizerError(f"{name}: the token {repeated!r} appears more than once")
        if ids["[PAD]"] != 0:
            raise TokenizerError(f"{name}: [PAD] must be the first token, it is number {ids['[PAD]']}")
        self._tokenizer = BertWordPieceTokenizer(ids, lowercase=True)
        self._tokenizer.add_special_tokens(list(ADDED_TOKENS))
        self._tokenizer.enable_truncation(max_length)
        self._tokenizer.enable_padding(length=max_length)

    @classmethod
    def from_file(cls, path: str | os.PathLike, max_length: int) -> "PromptTokenizer":
        """Reads a vocab.txt, or the one in a folder."""
        file = find_vocab(path)
        try:
            return cls(file.read_text(encoding="utf-8"), max_length, name=str(file))
        except UnicodeDecodeError as error:
            raise TokenizerError(f"{file}: not a text file in UTF-8") from error

    @property
    def vocab_size(self) -> int:
        """Number of tokens, including the added ones."""
        return self._tokenizer.get_vocab_size()

    def __call__(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """{"input_ids", "attention_mask"}: int32 [B, max_length] each.

        Raises:
            ValueError: a prompt is not text.
        """
        encodings = self._tokenizer.encode_batch(check_prompts(prompts))
        return {
            "input_ids": np.array([encoding.ids for encoding in encodings], np.int32),
            "attention_mask": np.array([encoding.attention_mask for encoding in encodings], np.int32),
        }


CLIP_FILES = ("vocab.json", "merges.txt")


def find_clip_vocab(path: str | os.PathLike) -> Path:
    """Finds the CLIP vocabulary at `path`: a folder with vocab.json and merges.txt, or OpenAI's gzipped list of merges.

    Raises:
        FileNotFoundError: `path` is neither, nor a folder with such a file.
    """
    path = Path(os.path.expanduser(path))
    if path.is_dir() and all((path / name).is_file() for name in CLIP_FILES):
        return path
    file = path / CLIP_BPE if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"{path}: no CLIP vocabulary; expected a folder with {' and '.join(CLIP_FILES)}, or {CLIP_BPE}"
        )
    return file


class CLIPPromptTokenizer:
    """Prompts -> ids of CLIP: lower case, byte pairs, truncated to `max_length` with the end-of-text token last.

    Args:
        path: as for `find_clip_vocab`.
        max_length: prompts are padded (with the end-of-text token) or truncated to this length.
        cleaning: "openai", as OpenAI's and OpenCLIP's own tokenizers read prompts: ftfy repairs them (curly quotes
            become straight, full-width letters plain), and HTML entities are resolved; or "transformers", as its
            `CLIPTokenizer` does: characters are composed (NFC).

    Raises:
        FileNotFoundError: the vocabulary does not exist.
        TokenizerError: it cannot be used.
    """

    def __init__(self, path: str | os.PathLike, max_length: int, cleaning: str = "openai") -> None:
        from tokenizers.normalizers import Sequence

        CLIPTokenizer = import_tokenizer("CLIPTokenizer")
        self.max_length, self.cleaning = max_length, cleaning
        file = find_clip_vocab(path)
        try:
            if file.is_dir():
                self._tokenizer = CLIPTokenizer.from_pretrained(file)
            else:
                vocab, merges = read_clip_bpe(file)
                self._tokenizer = CLIPTokenizer(vocab=vocab, merges=merges)
        except (OSError, ValueError) as error:
            raise TokenizerError(f"{file}: not a CLIP vocabulary ({error})") from error
        if cleaning == "openai":
            self._tokenizer.backend_tokenizer.normalizer = Sequence([])

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return len(self._tokenizer)

    def __call__(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """{"input_ids"}: int32 [B, max_length].

        Raises:
            ValueError: a prompt is not text.
        """
        prompts = check_prompts(prompts)
        if self.cleaning == "openai":
            prompts = [clean_as_openai(prompt) for prompt in prompts]
        encoded = self._tokenizer(prompts, padding="max_length", truncation=True, max_length=self.max_length)
        return {"input_ids": np.array(encoded["input_ids"], np.int32)}


def clean_as_openai(prompt: str) -> str:
    """Cleans a prompt as OpenAI's `SimpleTokenizer` does (CLIP's and OpenCLIP's `basic_clean`, `whitespace_clean`)."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return " ".join(text.split()).lower()


class NoTokens:
    """Tokenizer of a score that ignores prompts: no arrays."""

    def __call__(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """Checks that the prompts are texts; returns {}."""
        check_prompts(prompts)
        return {}
