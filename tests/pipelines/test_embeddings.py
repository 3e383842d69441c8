"""Textual-inversion embeddings against diffusers' `load_textual_inversion` with the same weights."""

import json
import os
import pickle
import re
import shutil

import numpy as np
import pytest
import tiny_sd1
import tiny_sd3
import tiny_sdxl
from PIL import Image

from imagereward_jax import generate
from imagereward_jax.pipelines import open_pipeline
from imagereward_jax.pipelines.embeddings import embedding_notes, with_embeddings
from imagereward_jax.weights.embeddings import parse_embedding, read_embedding
from imagereward_jax.weights.files import WeightsError, write_safetensors

torch = pytest.importorskip("torch", reason="the reference is PyTorch diffusers")
diffusers = pytest.importorskip("diffusers", reason="the reference is PyTorch diffusers")

# The first is cut between the word's vectors.
PROMPTS = [
    "a red circle in the style of <cat-toy>, a square",
    "<cat-toy>a <cat-toy>",
    "a <cat-toy> " * 9,
    "a blue square",
]


@pytest.fixture(scope="module")
def sd1(tmp_path_factory):
    return tiny_sd1.save_one_level(tmp_path_factory.mktemp("sd1"))


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdxl")
    pipeline, params = tiny_sdxl.make(folder)
    pipeline.save(folder / "model", params)
    return folder / "model"


def vectors(count, width, seed=0):
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)


def write(path, content):
    """Writes an embedding as its program does."""
    if path.suffix == ".safetensors":
        write_safetensors(path, content)
    else:
        torch.save(content, path)
    return path


def encoded(folder, embeddings, prompts):
    """(ids, conditions) of prompts."""
    pipeline = with_embeddings(open_pipeline(str(folder)), embeddings)
    params = pipeline.load_params({name: pipeline.abstract_params()[name] for name in pipeline.text_encoders})
    ids = pipeline.tokenize(prompts)
    return ids, pipeline.encode_prompts(params, ids)


def web_ui(array, container=dict):
    """As the web UI saves it; the first trainers of embeddings had a ParameterDict."""
    tensor = torch.nn.Parameter(torch.from_numpy(array))
    return {
        "string_to_token": {"*": 265},
        "string_to_param": container({"*": tensor}),
        "name": "<cat-toy>",
        "step": 1499,
        "sd_checkpoint": "a" * 8,
        "sd_checkpoint_name": None,
    }


FORMATS = {
    "learned_embeds.safetensors": lambda array: {"<cat-toy>": array},
    "learned_embeds.bin": lambda array: {"<cat-toy>": torch.from_numpy(array)},
    "one_vector.bin": lambda array: {"<cat-toy>": torch.from_numpy(array[0])},
    "webui.pt": web_ui,
    "first_trainers.pt": lambda array: web_ui(array, torch.nn.ParameterDict),
    "webui.safetensors": lambda array: {"emb_params": array},
    "tensor.pt": torch.from_numpy,
    "half.safetensors": lambda array: {"<cat-toy>": array.astype(np.float16)},
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_read(name, tmp_path):
    """Vectors to the bit of the file's dtype, and the word that the file states, or else its own name."""
    array = vectors(3, 24)
    path = write(tmp_path / name, FORMATS[name](array))
    embedding = read_embedding(path)
    expected = array[:1] if name == "one_vector.bin" else array
    np.testing.assert_array_equal(embedding.vectors[""], expected.astype(np.float16) if "half" in name else expected)
    nameless = name in ("webui.safetensors", "tensor.pt")
    assert embedding.token == (path.stem if nameless else "<cat-toy>") and read_embedding(path, "x").token == "x"


@pytest.mark.parametrize("name", ["learned_embeds.safetensors", "one_vector.bin", "webui.pt"])
def test_prompt_embeds_are_those_of_diffusers(name, sd1, tmp_path):
    """From the same file: ids equal, embeddings within 1e-5, also of prompts that are cut between a word's vectors."""
    path = write(tmp_path / name, FORMATS[name](vectors(3, 24)))
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(sd1)
    pipe.load_textual_inversion(str(tmp_path), weight_name=name)
    ids, cond = encoded(sd1, [read_embedding(path)], PROMPTS)
    converted = pipe.maybe_convert_prompt(PROMPTS, pipe.tokenizer)
    expected = pipe.tokenizer(converted, padding="max_length", max_length=16, truncation=True)["input_ids"]
    np.testing.assert_array_equal(ids["text_encoder"], expected)
    with torch.no_grad():
        embeds = pipe.encode_prompt(PROMPTS, "cpu", 1, False)[0]
    np.testing.assert_allclose(cond["prompt_embeds"], embeds.numpy(), atol=1e-5)
    plain = encoded(sd1, [], PROMPTS)[1]["prompt_embeds"]
    difference = np.abs(np.asarray(cond["prompt_embeds"]) - np.asarray(plain)).max(axis=(1, 2))
    assert (difference[:3] > 0.1).all() and difference[3] == 0


@pytest.mark.parametrize("files", [1, 2])
def test_both_encoders_of_sdxl(files, sdxl, tmp_path):
    """One file of clip_l and clip_g, or diffusers' two files of one word: embeddings, also pooled, within 1e-5."""
    first, second = vectors(2, 24), vectors(3, 32, seed=1)
    if files == 1:
        paths = [write(tmp_path / "<cat-toy>.safetensors", {"clip_l": first, "clip_g": second})]
    else:
        parts = {"learned_embeds": first, "learned_embeds_2": second}
        paths = [write(tmp_path / f"{name}.safetensors", {"<cat-toy>": array}) for name, array in parts.items()]
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(sdxl)
    for array, part in ((first, ""), (second, "_2")):
        options = {name: getattr(pipe, f"{name}{part}") for name in ("tokenizer", "text_encoder")}
        pipe.load_textual_inversion(torch.from_numpy(array), token="<cat-toy>", **options)
    cond = encoded(sdxl, [read_embedding(path) for path in paths], PROMPTS)[1]
    with torch.no_grad():
        embeds, _, pooled, _ = pipe.encode_prompt(PROMPTS, device="cpu", do_classifier_free_guidance=False)
    np.testing.assert_allclose(cond["prompt_embeds"], embeds.numpy(), atol=1e-5)
    np.testing.assert_allclose(cond["pooled_prompt_embeds"], pooled.numpy(), atol=1e-5)


def test_the_end_of_text_is_pooled_where_a_config_states_the_wrong_id(sdxl, tmp_path):
    """SDXL's own files do (eos_token_id=2): the new words' ids are larger than the one of the end."""
    folder = shutil.copytree(sdxl, tmp_path / "model")
    path = folder / "text_encoder_2" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 2}))
    embedding = read_embedding(
        write(tmp_path / "<cat-toy>.safetensors", {"clip_l": vectors(1, 24), "clip_g": vectors(1, 32)})
    )
    found, expected = (encoded(model, [embedding], PROMPTS)[1]["pooled_prompt_embeds"] for model in (folder, sdxl))
    np.testing.assert_array_equal(found, expected)


def test_stable_diffusion_3_with_and_without_vectors_for_t5(tmp_path):
    """T5's table has spare rows, one of which the word takes; without vectors T5 reads the word as text."""
    folder = tiny_sd3.save_small(tmp_path)
    pipeline = open_pipeline(str(folder))
    parts = {"clip_l": vectors(2, 24), "clip_g": vectors(2, 32)}
    notes, width = {}, pipeline.configs["text_encoder_3"].d_model
    for name, more in (("without", {}), ("with", {"t5xxl": vectors(1, width)})):
        path = write(tmp_path / f"{name}.safetensors", parts | more)
        extended = with_embeddings(pipeline, [read_embedding(path, "<cat-toy>")])
        (notes[name],) = embedding_notes(extended, PROMPTS)
    assert "plain text for text_encoder_3" in notes["without"]
    assert "1 vector for text_encoder_3" in notes["with"] and "plain text" not in notes["with"]
    (row,) = extended.tokenizers["text_encoder_3"].ids("<cat-toy>")
    assert row in extended.tokenize(["<cat-toy>"])["text_encoder_3"]
    target = {"text_encoder_3": extended.abstract_params()["text_encoder_3"]}
    table = extended.load_params(target)["text_encoder_3"]["shared"]["embedding"]
    np.testing.assert_array_equal(table[row], more["t5xxl"][0])
    stored = pipeline.load_params({"text_encoder_3": pipeline.abstract_params()["text_encoder_3"]})
    others = np.delete(np.arange(len(table)), row)
    np.testing.assert_array_equal(table[others], stored["text_encoder_3"]["shared"]["embedding"][others])


def test_images_with_embeddings(sd1, tmp_path, capsys):
    """Two words, one by the name of its file, with a base model beside; a prompt without the second makes another image
    from the same noise. The file says what made it."""
    noise = str(tmp_path / "noise.npy")
    np.save(noise, np.random.default_rng(0).standard_normal((1, 8, 8, 4)).astype(np.float32))
    one = write(tmp_path / "dots.safetensors", {"emb_params": vectors(1, 24)})
    two = write(tmp_path / "two.bin", {"<cat-toy>": torch.from_numpy(vectors(2, 24, seed=1))})
    flags = ["--embedding", str(one), "--embedding", f"{two}=<s>", "--tuned-weight", "0.5", "--base", str(sd1)]
    arguments = ["--model", str(sd1), "--steps", "2", *flags, "--prompt"]
    for name, prompt in (("a", "a dots <s>"), ("b", "a dots <t>")):
        assert generate.main([*arguments, prompt, "--out", str(tmp_path / name), "--noise", noise]) == 0
    said = capsys.readouterr().out
    assert "embedding dots: 1 vector for text_encoder\nembedding <s>: 2 vectors for text_encoder\n" in said
    assert "embedding <s>: 2 vectors for text_encoder, no prompt has the word <s>\n" in said
    images = [Image.open(tmp_path / name / "0_0.png") for name in ("a", "b")]
    assert np.abs(np.subtract(*(np.asarray(image, float) for image in images))).max() > 3
    assert images[0].text["embedding"] == f"{one} {two}=<s>"


def test_a_model_with_embeddings_is_not_saved(sd1, tmp_path):
    embedding = read_embedding(write(tmp_path / "e.safetensors", {"<e>": vectors(1, 24)}))
    with pytest.raises(ValueError, match="with the embeddings <e> is for sampling"):
        with_embeddings(open_pipeline(str(sd1)), [embedding]).save(tmp_path / "out", {})


class Runs:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


BAD = {
    "of SD 1.x": ({"<e>": vectors(1, 768)}, r"of 768 features, but .*text_encoder 24 .*made for Stable Diffusion 1\.x"),
    "of SDXL": ({"clip_l": vectors(1, 24), "clip_g": vectors(1, 1280)}, "for text_encoder_2 of 1280 .*encoder of SDXL"),
    "an adapter": ({"unet.a.lora_A.weight": vectors(1, 24), "b": vectors(1, 24)}, "no textual-inversion .*--lora"),
    "a known word": ({"circle</w>": vectors(1, 24)}, "'circle</w>' is a token of text_encoder already; .*FILE=WORD"),
    "a word of two": ({"a cat": vectors(1, 24)}, "the word 'a cat' should have no spaces; .*FILE=WORD"),
    "many vectors": ({"<e>": vectors(15, 24)}, "15 vectors, but a prompt has 14 tokens"),
    "not finite": ({"<e>": np.full((1, 24), np.inf, np.float32)}, "not finite"),
    "whole numbers": ({"<e>": np.ones((1, 24), np.int32)}, r"should be vectors \[n, d\], not int32"),
    "three axes": ({"<e>": np.ones((1, 2, 24), np.float32)}, r"should be vectors \[n, d\], not float32 \[1, 2, 24\]"),
    "nothing": ({}, "found nothing"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_named(case, sd1, tmp_path, capsys):
    content, message = BAD[case]
    path = write(tmp_path / "e.safetensors", content)
    arguments = ["--model", str(sd1), "--prompt", "a", "--out", str(tmp_path / "out"), "--embedding", str(path)]
    assert generate.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and re.search(f"^error: {re.escape(str(path))}: .*{message}", said), said


def test_a_pickle_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "e.pt").write_bytes(pickle.dumps({"<e>": Runs()}))
    with pytest.raises(WeightsError, match=r"e\.pt: refused: it holds Python objects"):
        read_embedding(tmp_path / "e.pt")
    assert not (tmp_path / "ran").exists()


def test_sdxl_wants_vectors_for_both_encoders(sdxl, tmp_path):
    embedding = read_embedding(write(tmp_path / "e.safetensors", {"<e>": vectors(1, 24)}))
    pipeline = open_pipeline(str(sdxl))
    with pytest.raises(WeightsError, match=r"'<e>' has no vectors for text_encoder_2 \(of 32 features\)"):
        with_embeddings(pipeline, [embedding])
    with pytest.raises(WeightsError, match="'<e>' has vectors for text_encoder already"):
        with_embeddings(pipeline, [embedding, embedding])


def test_words_do_not_share_tokens(sd1, tmp_path):
    """A word of two vectors is two tokens, the second WORD_1; embeddings are added once."""
    path = write(tmp_path / "e.safetensors", {"<e>": vectors(2, 24)})
    pipeline = open_pipeline(str(sd1))
    with pytest.raises(WeightsError, match="'<e>_1' is a vector of '<e>' and a word itself"):
        with_embeddings(pipeline, [read_embedding(path), read_embedding(path, "<e>_1")])
    with pytest.raises(WeightsError, match="added, all at once"):
        with_embeddings(with_embeddings(pipeline, [read_embedding(path)]), [read_embedding(path, "<f>")])


def test_path_and_word(tmp_path):
    (tmp_path / "a=b.pt").touch()
    assert parse_embedding(f"{tmp_path}/a=b.pt") == (f"{tmp_path}/a=b.pt", None)
    assert parse_embedding("x.pt") == ("x.pt", None) and parse_embedding("x.pt=<s>") == ("x.pt", "<s>")
    with pytest.raises(WeightsError, match="should be the path of an embedding, or PATH=WORD"):
        parse_embedding("x.pt=")
    with pytest.raises(FileNotFoundError, match=r"no\.pt: no such embedding"):
        read_embedding("no.pt")
