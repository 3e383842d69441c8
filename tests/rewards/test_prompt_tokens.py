"""Prompt tokens against transformers' BertTokenizer, and vocabularies that are refused."""

from pathlib import Path

import numpy as np
import pytest

from imagereward_jax.rewards.tokens import PromptTokenizer, TokenizerError

VOCAB = Path(__file__).parents[3] / "shared" / "real" / "bert-base-uncased" / "vocab.txt"
PROMPTS = [
    "a painting of an ocean with clouds and birds, day time, low depth field effect",
    "", " \n\t", "naïve Café Ångström ÉTÉ", "日本の猫, 少女", "Σίσυφος İstanbul ß", "😀🎨 👩‍🎨 art",
    "[ENC] a cat [DEC]", "[CLS] x [SEP] [MASK]", "don't; 'quoted' — “dashes”…", "x" * 101, "x" * 100, "word " * 60,
    "e\u0301a\u0308 cat\u200dcat\u00adx\ufeffy", "a\x00b\x07c", "한국어 고양이 हिन्दी العَرَبِيَّة",
]  # fmt: skip


def test_ids_are_those_of_bert_tokenizer():
    """Equal ids and masks for 16 awkward prompts, with the real vocabulary and the two added tokens."""
    if not VOCAB.is_file():
        pytest.skip(f"needs the vocabulary of bert-base-uncased, {VOCAB}")
    from transformers import BertTokenizer

    reference = BertTokenizer.from_pretrained(str(VOCAB.parent))
    reference.add_special_tokens({"bos_token": "[DEC]"})
    reference.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    expected = reference(PROMPTS, padding="max_length", truncation=True, max_length=35)
    tokenizer = PromptTokenizer.from_file(VOCAB, 35)
    assert tokenizer.vocab_size == len(reference) == 30524
    tokens = tokenizer(PROMPTS)
    for name in ("input_ids", "attention_mask"):
        assert tokens[name].dtype == np.int32
        np.testing.assert_array_equal(tokens[name], expected[name])
    assert tokens["input_ids"][7].tolist()[:6] == [101, 30523, 1037, 4937, 30522, 102]


def test_lone_surrogates_are_dropped(vocab_file):
    tokenizer = PromptTokenizer.from_file(vocab_file, 12)
    np.testing.assert_array_equal(tokenizer(["a \ud83d cat"])["input_ids"], tokenizer(["a cat"])["input_ids"])


def test_prompts_that_are_not_text_are_named(vocab_file):
    with pytest.raises(ValueError, match="prompt 1 must be text, not int: 3"):
        PromptTokenizer.from_file(vocab_file, 12)(["a cat", 3])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "lacks .PAD., .UNK., .CLS., .SEP., .MASK."),
        (b"[PAD]\n[UNK]\n[CLS]\n[SEP]\ncat\n", "lacks .MASK."),
        (b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\ncat\ncat\n", "'cat' appears more than once"),
        (b"[UNK]\n[PAD]\n[CLS]\n[SEP]\n[MASK]\n", "must be the first token, it is number 1"),
        (b"\xff\xfe[PAD]", "not a text file in UTF-8"),
    ],
)
def test_broken_vocabularies_are_refused(tmp_path, content, message):
    (tmp_path / "vocab.txt").write_bytes(content)
    with pytest.raises(TokenizerError, match=rf"vocab.txt: .*{message}"):
        PromptTokenizer.from_file(tmp_path, 12)


def test_a_missing_vocabulary_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"vocab.txt: no such file; expected a vocab.txt of BERT"):
        PromptTokenizer.from_file(tmp_path, 12)


def test_windows_line_ends_change_nothing(vocab_file, tmp_path):
    other = tmp_path / "vocab.txt"
    other.write_bytes(vocab_file.read_bytes().replace(b"\n", b"\r\n"))
    tokens = [PromptTokenizer.from_file(path, 12)(["a red cube, 1 zq"])["input_ids"] for path in (vocab_file, other)]
    np.testing.assert_array_equal(*tokens)
