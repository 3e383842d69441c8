"""The small tokenizers, read by transformers' own classes."""

import pytest
import transformers

from imagereward_jax.data import shapes

TEXTS = ["Zebra crossing, 42!", "naïve café — 日本", "it's (a) test_case", "   spaces   everywhere "]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    shapes.write_clip_tokenizer(folder)
    return folder


@pytest.mark.parametrize("name", ["CLIPTokenizer", "CLIPTokenizerFast"])
def test_clip_has_one_token_a_caption_word(clip_folder, name):
    tokenizer = getattr(transformers, name).from_pretrained(clip_folder)
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert tokenizer.model_max_length == 16 and tokenizer.pad_token_id == end
    assert (start, end) == (len(tokenizer) - 2, len(tokenizer) - 1) and len(tokenizer) < 620
    for word in shapes.caption_words():
        assert len(tokenizer(word)["input_ids"]) == 3, word
    for caption in shapes.all_captions():
        ids = tokenizer(caption.text, padding="max_length", truncation=True)["input_ids"]
        words = len(caption.text.split())
        assert ids[0] == start and ids[words + 1 :] == [end] * (15 - words)
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == caption.text


def test_clip_encodes_any_text(clip_folder):
    tokenizer = transformers.CLIPTokenizer.from_pretrained(clip_folder)
    for text in TEXTS:
        ids = tokenizer(text, truncation=False)["input_ids"]
        decoded = tokenizer.decode(ids, skip_special_tokens=True)
        assert "".join(decoded.split()) == "".join(text.lower().split())
        assert tokenizer.unk_token_id not in ids[1:-1]


def test_clip_saves_and_loads_again(clip_folder, tmp_path):
    tokenizer = transformers.CLIPTokenizer.from_pretrained(clip_folder)
    tokenizer.save_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "a large red circle at the top left"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_bert_has_one_token_a_caption_word(tmp_path):
    size = shapes.write_bert_vocab(tmp_path)
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"), do_lower_case=True)
    assert len(tokenizer) == size < 200
    assert tokenizer.convert_tokens_to_ids(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]) == [0, 1, 2, 3, 4]
    for caption in shapes.all_captions():
        assert tokenizer.tokenize(caption.text) == caption.text.split()
    every = "".join(chr(i) for i in range(32, 127)) + " Zebra 42"
    assert "[UNK]" not in tokenizer.tokenize(every)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    assert tokenizer.convert_tokens_to_ids(["[DEC]", "[ENC]"]) == [size, size + 1]


def test_t5_has_one_token_a_caption_word(tmp_path):
    size = shapes.write_t5_tokenizer(tmp_path)
    tokenizer = transformers.T5Tokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == size < 200 and tokenizer.model_max_length == 16
    assert tokenizer.convert_tokens_to_ids(["<pad>", "</s>", "<unk>"]) == [0, 1, 2]
    for caption in shapes.all_captions():
        ids = tokenizer(caption.text, padding="max_length", truncation=True)["input_ids"]
        words = len(caption.text.split())
        assert ids[words:] == [1] + [0] * (15 - words)
        assert tokenizer.decode(ids, skip_special_tokens=True) == caption.text
    every = "".join(chr(i) for i in range(33, 127))
    assert tokenizer.unk_token_id not in tokenizer(f"{every} Zebra 42")["input_ids"]
