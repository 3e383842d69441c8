"""Files of tokenizers: which tokenizer a folder holds, OpenAI's list of merges, and SentencePiece's vocabulary, read
without its library."""

import gzip
import importlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from imagereward_jax.weights.files import WeightsError, read_json

SPIECE = "spiece.model"
CLIP_BPE = "bpe_simple_vocab_16e6.txt.gz"
# OpenAI's vocabulary file lists more merges than CLIP's tokenizer uses.
_CLIP_MERGES = 49152 - 256 - 2
# Numbers of protocol-buffer fields in sentencepiece_model.proto.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE, _SCORE = 1, 2
_MODEL_TYPE, _UNIGRAM = 3, 1
_CHARSMAP = 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types


class SentencePieceModel(NamedTuple):
    """A Unigram vocabulary.

    pieces: (piece, log probability) by id. charsmap: the compiled rules of the normaliser; None if it has none.
    """

    pieces: list[tuple[str, float]]
    charsmap: bytes | None


def import_tokenizer(name: str) -> Any:
    """Imports a tokenizer's class from transformers, without a word of PyTorch, which no tokenizer needs."""
    setting = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(setting)
    os.environ[setting] = "1"
    try:
        return getattr(importlib.import_module("transformers"), name)
    finally:
        os.environ.pop(setting)
        if before is not None:
            os.environ[setting] = before


def tokenizer_class(folder: str | Path) -> str:
    """The class in transformers of the tokenizer in `folder`: "T5TokenizerFast" (Unigram) or "CLIPTokenizer"."""
    folder = Path(folder)
    if (folder / SPIECE).is_file():
        return "T5TokenizerFast"
    file = folder / "tokenizer.json"
    model = read_json(file).get("model") if file.is_file() else None
    unigram = isinstance(model, dict) and model.get("type") == "Unigram"
    return "T5TokenizerFast" if unigram else "CLIPTokenizer"


def read_sentencepiece(path: str | Path) -> SentencePieceModel:
    """Reads a `.model` file of SentencePiece.

    Raises:
        FileNotFoundError: there is no such file.
        WeightsError: it is empty or broken, or its model is not Unigram.
    """
    path = Path(path)
    try:
        model = _parse(path.read_bytes())
    except (ValueError, IndexError, struct.error) as error:
        raise WeightsError(f"{path}: not a complete SentencePiece model ({error}); fetch it again") from error
    if not model.pieces:
        raise WeightsError(f"{path}: a SentencePiece model without pieces; fetch it again")
    return model


def read_clip_bpe(path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Reads (vocab, merges) of OpenAI's `bpe_simple_vocab_16e6.txt.gz`: token -> id, and pairs of tokens in order."""
    try:
        lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise WeightsError(f"{path}: not a complete gzipped vocabulary ({error})") from error
    merges = [tuple(line.split()) for line in lines[1 : _CLIP_MERGES + 1]]  # the first line is a version
    merges = [pair for pair in merges if len(pair) == 2]
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = 256 - len(printable)
    characters = [chr(byte) for byte in printable] + [chr(256 + index) for index in range(others)]
    tokens = [*characters, *(c + "</w>" for c in characters), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: index for index, token in enumerate(tokens)}, merges


def check_merges(folder: Path) -> None:
    """Raises WeightsError unless merges.txt makes every word and part of one in vocab.json, as a cut file does not."""
    path = folder / "merges.txt"
    try:
        made = {"".join(line.split()) for line in path.read_text(encoding="utf-8").splitlines()}
    except UnicodeDecodeError as error:
        raise WeightsError(f"{path}: not UTF-8 ({error}); fetch it again") from error
    words = [word for word in read_json(folder / "vocab.json") if len(word.removesuffix("</w>")) > 1]
    words = [word for word in words if not word.startswith("<|")]  # marks, such as <|endoftext|>
    lost = [word for word in words if word not in made]
    if lost:
        raise WeightsError(
            f"{path}: {len(lost)} of the {len(words)} words in vocab.json cannot be made of its merges, among them "
            f"{lost[0]!r}; fetch both again"
        )


def _parse(data):
    pieces, charsmap = [], None
    for number, value in _fields(data):
        if number == _PIECES:
            piece = dict(_fields(value))
            pieces.append((piece[_PIECE].decode("utf-8"), struct.unpack("<f", piece.get(_SCORE, bytes(4)))[0]))
        elif number == _TRAINER and dict(_fields(value)).get(_MODEL_TYPE, _UNIGRAM) != _UNIGRAM:
            raise ValueError("its model is not Unigram, T5's kind")
        elif number == _NORMALIZER:
            charsmap = dict(_fields(value)).get(_CHARSMAP) or None
    return SentencePieceModel(pieces, charsmap)


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yields (number, value) of each field of a protocol-buffer message; numbers with a fixed size as bytes."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        kind = tag & 7
        if kind == _VARINT:
            value, position = _varint(data, position)
            yield tag >> 3, value
            continue
        if kind == _BYTES:
            size, position = _varint(data, position)
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"field of wire type {kind} at byte {position}")
        if position + size > len(data):
            raise ValueError(f"it ends after {len(data)} bytes, within a field")
        yield tag >> 3, data[position : position + size]
        position += size


def _varint(data, position):
    """Reads a number of seven bits per byte; returns it and the position after it."""
    number = shift = 0
    while True:
        byte = data[position]
        number |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return number, position
