"""T5's tokenizer from its slow and fast files, against transformers' own reading of them; broken files of CLIP's."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from imagereward_jax.data.shapes.tokenizers import write_clip_tokenizer
from imagereward_jax.pipelines.prompt_ids import count_cut, cut_off, encode, open_tokenizer
from imagereward_jax.weights.files import WeightsError
from imagereward_jax.weights.tokenizer_files import read_sentencepiece, tokenizer_class

transformers = pytest.importorskip("transformers")
REAL = Path(__file__).parents[3] / "shared/real"
TEXT = "a red circle and two big blue squares at the top left of an oil painting, highly detailed"
PROMPTS = [
    "",
    "a red circle",
    "  A big\tblue square,\n at the TOP ",
    "an unknown word: 日本語 naïve",
    "a <extra_id_3> b </s> c",
    "two red circles " * 200,
]
LENGTHS = [77, 256, 512]


WITHOUT_TORCH = """
import importlib.util, os
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *package: None if name == "torch" else found(name, *package)
from imagereward_jax.weights.tokenizer_files import import_tokenizer
print(import_tokenizer("CLIPTokenizer").__name__, os.environ.get("TRANSFORMERS_NO_ADVISORY_WARNINGS"))
import transformers
print(transformers.utils.is_torch_available())
transformers.logging.get_logger("transformers").warning_advice("advice")
"""


def test_a_missing_pytorch_is_no_news():
    """Neither a line of it, nor fewer lines of advice for a program that uses transformers itself."""
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "CLIPTokenizer None\nFalse\n")
    assert done.stderr == "[transformers] advice\n"


@pytest.fixture(scope="module")
def pieces():
    """[(piece, log probability)] of a small Unigram vocabulary trained here; T5's special tokens are the first."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    rng = np.random.default_rng(0)
    tokenizer.train_from_iterator((" ".join(rng.choice(TEXT.split(), 12)) for _ in range(300)), trainer)
    return [tuple(piece) for piece in json.loads(tokenizer.to_str())["model"]["vocab"]]


def spiece(pieces, **normalizer):
    """The bytes of a `.model` file, written by the protocol-buffer library."""
    pytest.importorskip("google.protobuf")
    from transformers.utils import sentencepiece_model_pb2_new as protocol

    model = protocol.ModelProto(trainer_spec={"model_type": 1, "vocab_size": len(pieces), "unk_id": 2})
    kinds = {"<pad>": 3, "</s>": 3, "<unk>": 2}
    for piece, score in pieces:
        model.pieces.add(piece=piece, score=score, type=kinds.get(piece, 1))
    model.normalizer_spec.CopyFrom(protocol.NormalizerSpec(name="nmt_nfkc", **normalizer))
    return model.SerializeToString()


@pytest.fixture(scope="module")
def reference(pieces):
    """transformers' tokenizer of the same vocabulary."""
    extra = [(f"<extra_id_{number}>", 0.0) for number in reversed(range(100))]
    return transformers.T5Tokenizer(vocab=[*pieces, *extra], model_max_length=512)


@pytest.fixture(scope="module", params=["slow", "fast"])
def folder(request, pieces, reference, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    if request.param == "fast":
        reference.save_pretrained(path)
    else:
        (path / "spiece.model").write_bytes(spiece(pieces))
        (path / "tokenizer_config.json").write_text(json.dumps({"extra_ids": 100, "model_max_length": 512}))
    return path


def open_t5(folder, vocab_size=32128):
    return open_tokenizer(folder, "text_encoder_3", vocab_size, "T5EncoderModel")


@pytest.mark.parametrize("length", LENGTHS)
def test_ids_are_those_of_transformers(folder, reference, length):
    """Padded with 0 after the end (1), which is last in a prompt that is cut."""
    tokenizer = open_t5(folder)
    assert (len(tokenizer), tokenizer.model_max_length) == (len(reference), 512)
    ids = encode(tokenizer, PROMPTS, length)
    assert (ids.dtype, ids.shape) == (np.int32, (len(PROMPTS), length))
    expected = reference(PROMPTS, padding="max_length", max_length=length, truncation=True)["input_ids"]
    np.testing.assert_array_equal(ids, expected)
    assert ids[0].tolist() == [1] + [0] * (length - 1)
    assert ids[-1, -1] == 1
    assert 2 in ids[3] and 2 not in ids[1]


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the real prompts beside the checkout, shared/real")
def test_ids_of_real_prompts_are_those_of_transformers(folder, reference):
    prompts = [row["text"] for row in json.loads((REAL / "refl_data.json").read_text())][::10]
    prompts += [row["prompt"] for row in json.loads((REAL / "benchmark-prompts.json").read_text())]
    assert len(prompts) == 1100
    tokenizer = open_t5(folder)
    for length in LENGTHS:
        expected = reference(prompts, padding="max_length", max_length=length, truncation=True)["input_ids"]
        np.testing.assert_array_equal(encode(tokenizer, prompts, length), expected)


def test_what_is_cut_off_is_counted_and_told(folder, reference):
    tokenizer, red = open_t5(folder), len(reference.tokenize("red"))
    length = 9 * red + 1  # with the end
    prompts = ["red " * 9, "red " * 10, "red " * 9 + "blue squares", ""]
    assert count_cut(tokenizer, prompts, length).tolist() == [0, red, len(reference.tokenize("blue squares")), 0]
    assert [cut_off(tokenizer, prompt, length) for prompt in prompts] == ["", "red", "blue squares", ""]


def test_the_library_of_sentencepiece_gives_the_same_ids(tmp_path):
    """A vocabulary trained by SentencePiece, its normaliser (full-width letters, ligatures) included."""
    library = pytest.importorskip("sentencepiece")
    rng = np.random.default_rng(0)
    (tmp_path / "text").write_text("\n".join(" ".join(rng.choice(TEXT.split(), 12)) for _ in range(300)))
    library.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "spiece"), vocab_size=40, minloglevel=2,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, pad_piece="<pad>",
    )  # fmt: skip
    theirs = library.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    assert len(open_t5(tmp_path)) == 140
    for prompt in [*PROMPTS[:4], "\uff52\uff45\uff44 \ufb01t \u2460 two"]:
        assert open_t5(tmp_path)(prompt)["input_ids"] == [*theirs.encode(prompt), 1]


def test_the_normaliser_of_a_slow_file_is_kept(pieces, tmp_path):
    """Bytes of the charsmap as they are in the file, and pieces with scores rounded to float32."""
    (tmp_path / "spiece.model").write_bytes(spiece(pieces, precompiled_charsmap=b"\x00\xff rules"))
    model = read_sentencepiece(tmp_path / "spiece.model")
    assert model.charsmap == b"\x00\xff rules"
    assert model.pieces == [(piece, float(np.float32(score))) for piece, score in pieces]


def test_files_say_which_tokenizer_they_are(folder, tmp_path):
    from imagereward_jax.data.shapes.tokenizers import write_clip_tokenizer

    assert tokenizer_class(folder) == "T5TokenizerFast"
    write_clip_tokenizer(tmp_path / "slow")
    transformers.CLIPTokenizer.from_pretrained(tmp_path / "slow").save_pretrained(tmp_path / "fast")
    for name in ("slow", "fast"):
        assert tokenizer_class(tmp_path / name) == "CLIPTokenizer"
    with pytest.raises(FileNotFoundError, match=r"no tokenizer of T5; expected tokenizer.json or spiece.model"):
        open_t5(tmp_path / "slow")
    with pytest.raises(ValueError, match="not a tokenizer of T5"):
        open_t5(tmp_path / "fast")


def test_broken_and_foreign_slow_files_are_refused(pieces, tmp_path):
    file = tmp_path / "spiece.model"
    whole = spiece(pieces)
    for content, message in (
        (b"", "without pieces"),
        (whole[:-3], "not a complete SentencePiece model"),
        (whole[: len(whole) // 2], "not a complete SentencePiece model"),
        (b"version https://git-lfs", "not a complete SentencePiece model"),
        (spiece(pieces[1:]), "first pieces should be <pad>, </s>, <unk>"),
    ):
        file.write_bytes(content)
        with pytest.raises(WeightsError, match=message):
            open_t5(tmp_path)


def test_more_tokens_than_the_encoder_knows_are_refused(folder):
    with pytest.raises(ValueError, match="text_encoder_3 knows only vocab_size=100"):
        open_t5(folder, vocab_size=100)


def test_files_of_clip_that_would_give_other_tokens_are_refused(tmp_path):
    """A merges.txt that was cut, and marks of a prompt's begin and end that are others, still make a tokenizer."""
    vocab_size = write_clip_tokenizer(tmp_path)
    open_clip = functools.partial(open_tokenizer, tmp_path, "text_encoder", vocab_size, "CLIPTextModel")
    open_clip()
    merges, marks = tmp_path / "merges.txt", tmp_path / "special_tokens_map.json"
    whole = merges.read_text()
    for part in ("", whole[: len(whole) // 2]):
        merges.write_text(part)
        with pytest.raises(WeightsError, match=r"merges\.txt: \d+ of the 75 words in vocab\.json cannot be made"):
            open_clip()
    merges.write_text(whole)
    for name in ("bos_token", "eos_token"):
        marks.write_text(json.dumps(json.loads(marks.read_text()) | {name: "x"}))
        with pytest.raises(WeightsError, match=r"expected .*correct special_tokens_map\.json"):
            open_clip()
        write_clip_tokenizer(tmp_path)
