"""BERT's lower-case WordPiece tokens for prompts, with the two tokens that BLIP adds."""

from pathlib import Path

import numpy as np

ADDED_TOKENS = ("[DEC]", "[ENC]")
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class TokenizerError(ValueError):
    """The vocabulary cannot be used; the message names the file and says why."""


def find_vocab(path):
    """`path` itself, or the vocab.txt in it when it is a folder.

    Raises:
        FileNotFoundError: there is no such file.
    """
    path = Path(path).expanduser()
    file = path / "vocab.txt" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; expected a vocab.txt of BERT, or its folder")
    return file


class PromptTokenizer:
    """Prompts -> ids, equal to those of transformers' `BertTokenizer` with `[DEC]` and `[ENC]` added.

    Args:
        vocab: text of a vocab.txt, one token a line.
        max_length: prompts are padded and cut to this many tokens, `[CLS]` and `[SEP]` included.
        name: how an error names the vocabulary.

    Raises:
        TokenizerError: a special token is missing, a line is empty or repeated, or `[PAD]` is not the first.
    """

    def __init__(self, vocab, max_length, name="vocab.txt"):
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
            raise TokenizerError(f"{name}: the token {repeated!r} is there more than once")
        if ids["[PAD]"] != 0:
            raise TokenizerError(f"{name}: [PAD] must be the first token, it is number {ids['[PAD]']}")
        self._tokenizer = BertWordPieceTokenizer(ids, lowercase=True)
        self._tokenizer.add_special_tokens(list(ADDED_TOKENS))
        self._tokenizer.enable_truncation(max_length)
        self._tokenizer.enable_padding(length=max_length)

    @classmethod
    def from_file(cls, path, max_length):
        """Reads a vocab.txt, or the one in a folder."""
        file = find_vocab(path)
        try:
            return cls(file.read_text(encoding="utf-8"), max_length, name=str(file))
        except UnicodeDecodeError as error:
            raise TokenizerError(f"{file}: not a text file in UTF-8") from error

    @property
    def vocab_size(self):
        """Number of tokens, the added ones included."""
        return self._tokenizer.get_vocab_size()

    def __call__(self, prompts):
        """{"input_ids", "attention_mask"}: int32 [B, max_length] each.

        Raises:
            ValueError: a prompt is not text.
        """
        for index, prompt in enumerate(prompts):
            if not isinstance(prompt, str):
                raise ValueError(f"prompt {index} must be text, not {type(prompt).__name__}: {prompt!r}")
        # Lone surrogates (halves of characters, as broken JSON escapes give) are dropped, as BertTokenizer does.
        prompts = [prompt.encode("utf-8", "ignore").decode("utf-8") for prompt in prompts]
        encodings = self._tokenizer.encode_batch(prompts)
        return {
            "input_ids": np.array([encoding.ids for encoding in encodings], np.int32),
            "attention_mask": np.array([encoding.attention_mask for encoding in encodings], np.int32),
        }
