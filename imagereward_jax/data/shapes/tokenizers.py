"""Small tokenizers for the shapes world, in the file formats of CLIP, BERT and T5.

Every word of a caption is one token; any other text still encodes (CLIP: every byte; BERT and T5: ASCII characters).
"""

import itertools
import json
import os
from pathlib import Path

from imagereward_jax.data.shapes.drawing import all_captions
from imagereward_jax.weights.tokenizer_files import import_tokenizer

MAX_LENGTH = 16
BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
T5_SPECIAL = ("<pad>", "</s>", "<unk>")
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's mark of a word's start


def caption_words() -> list[str]:
    """Returns the distinct words of all captions, sorted."""
    return sorted({word for caption in all_captions() for word in caption.text.split()})


def _byte_characters():
    """Returns a printable character per byte, in the order of CLIP's vocabulary (GPT-2's `bytes_to_unicode`)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def _split_word(word, ranks):
    """Byte-pair encoding of an ASCII word with the merges in `ranks` (pair -> priority)."""
    parts = [*word[:-1], word[-1] + WORD_END]
    while len(parts) > 1:
        pairs = [(ranks.get(pair, len(ranks)), i) for i, pair in enumerate(itertools.pairwise(parts))]
        rank, i = min(pairs)
        if rank == len(ranks):
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def _merges(words):
    """Builds merges that make each word one token.

    A new merge has lower priority than earlier ones, so words that are one token already stay so.
    """
    ranks = {}
    for word in words:
        parts = _split_word(word, ranks)
        while len(parts) > 1:
            ranks.setdefault((parts[0], parts[1]), len(ranks))
            parts[:2] = [parts[0] + parts[1]]
    return list(ranks)


def write_clip_tokenizer(folder: str | os.PathLike) -> int:
    """Writes the files that `transformers.CLIPTokenizer` and `CLIPTokenizerFast` load; returns the vocabulary's size.

    As in CLIP's own vocabulary the start and end tokens are the last two, and padding is the end token.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    characters = _byte_characters()
    merges = _merges(caption_words())
    tokens = characters + [c + WORD_END for c in characters] + [a + b for a, b in merges] + [START, END]
    vocab = {token: i for i, token in enumerate(tokens)}
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MAX_LENGTH,
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
        **special,
    }
    _write(folder / "vocab.json", json.dumps(vocab, ensure_ascii=False))
    _write(folder / "merges.txt", "\n".join(["#version: 0.2", *(f"{a} {b}" for a, b in merges)]) + "\n")
    _write(folder / "tokenizer_config.json", json.dumps(config, indent=2))
    _write(folder / "special_tokens_map.json", json.dumps(special, indent=2))
    return len(vocab)


def write_bert_vocab(folder: str | os.PathLike) -> int:
    """Writes `vocab.txt` for a lower-casing BERT tokenizer; returns its size.

    [DEC] and [ENC] are not in it; the reward's tokenizer appends them, as to bert-base-uncased (30,522 -> 30,524).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    characters = [chr(i) for i in range(33, 127) if not chr(i).isupper()]
    pieces = [c for c in characters if c.isalnum()]
    words = [word for word in caption_words() if word not in characters]
    tokens = [*BERT_SPECIAL, *words, *characters, *("##" + c for c in pieces)]
    _write(folder / "vocab.txt", "\n".join(tokens) + "\n")
    return len(tokens)


def write_t5_tokenizer(folder: str | os.PathLike) -> int:
    """Writes the files that `transformers.T5Tokenizer` loads; returns the vocabulary's size."""
    characters = [chr(i) for i in range(33, 127)]
    pieces = [SPACE + word for word in caption_words()] + [SPACE, *characters]
    # Log probabilities: a word as one piece is far more likely than its letters.
    scores = [-2.0] * len(caption_words()) + [-10.0] * (1 + len(characters))
    vocab = [(token, 0.0) for token in T5_SPECIAL] + list(zip(pieces, scores))
    tokenizer = import_tokenizer("T5Tokenizer")(vocab=vocab, extra_ids=0, model_max_length=MAX_LENGTH)
    tokenizer.save_pretrained(folder)
    return len(vocab)


def _write(path, text):
    path.write_text(text, encoding="utf-8", newline="\n")
