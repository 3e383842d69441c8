"""CLIP's prompt tokens against those of OpenCLIP's own tokenizer, which HPSv2 carries, and of transformers."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")
from transformers import CLIPTokenizer

from imagereward_jax.rewards import scores
from imagereward_jax.rewards.tokens import CLIPPromptTokenizer
from imagereward_jax.weights.tokenizer_files import CLIP_BPE, read_clip_bpe

# Tokens that open_clip 3.3's SimpleTokenizer gives with ftfy 6.3 and the whole vocabulary, and the merges that it used
# for them, in their order, which give the same tokens.
EXCERPT = json.loads(Path(__file__).with_name("openai_tokens.json").read_text(encoding="utf-8"))
PROMPTS = list(EXCERPT["tokens"])


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / CLIP_BPE
    path.write_bytes(gzip.compress("\n".join(["#version: 0.2", *EXCERPT["merges"], ""]).encode()))
    return path


def as_folder(bpe, folder):
    vocab, merges = read_clip_bpe(bpe)
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]), encoding="utf-8")
    return folder


@pytest.mark.parametrize("form", ["gzipped", "folder"])
def test_prompts_are_read_as_openclip_reads_them(form, bpe, tmp_path):
    """Curly quotes, full-width signs, HTML entities, broken encodings, accents, capitals: the same tokens."""
    tokenizer = CLIPPromptTokenizer(bpe if form == "gzipped" else as_folder(bpe, tmp_path), 40)
    names = {index: token for token, index in read_clip_bpe(bpe)[0].items()}
    for prompt, row in zip(PROMPTS, tokenizer(PROMPTS)["input_ids"]):
        start, *tokens = [names[index] for index in row.tolist()]
        assert start == "<|startoftext|>" and tokens[: tokens.index("<|endoftext|>")] == EXCERPT["tokens"][prompt]


def test_pickscore_reads_prompts_as_transformers_does(bpe):
    """CLIP and HPSv2.1, whose authors did not use it, read more than ten of these prompts otherwise."""
    vocab, merges = read_clip_bpe(bpe)
    expected = CLIPTokenizer(vocab=vocab, merges=merges)(PROMPTS, padding="max_length", max_length=40)["input_ids"]
    found = {name: CLIPPromptTokenizer(bpe, 40, clip.cleaning)(PROMPTS) for name, clip in scores.CLIPS.items()}
    np.testing.assert_array_equal(found["PickScore"]["input_ids"], expected)
    for name in ("CLIP", "HPSv2.1"):
        assert (found[name]["input_ids"] != expected).any(axis=1).sum() > 10
