"""Folders of T5's encoder: whole, in shards, with the embedding under either name; transformers opens what is saved."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from imagereward_jax.weights import components, diffusers, mapping
from imagereward_jax.weights.files import WeightsError, read_tensors, write_safetensors

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SHARED, TIED = "shared.weight", "encoder.embed_tokens.weight"
IDS = np.array([[5, 9, 30, 1, 0, 0]], np.int32)


@pytest.fixture(scope="module")
def reference():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 40}
    config = transformers.T5Config(**sizes, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    return transformers.T5EncoderModel(config).eval()


@pytest.fixture
def folder(reference, tmp_path):
    reference.save_pretrained(tmp_path / "text_encoder_3")
    return tmp_path


def load(folder, **options):
    """(network, params) of text_encoder_3."""
    config, tensors = diffusers.load_component(folder, "text_encoder_3", **options)
    network = components.abstract_network(components.class_of(config, "text_encoder_3"), config)
    return network, mapping.from_torch(network, tensors)


def output(network, params):
    return nnx.merge(nnx.split(network)[0], params)(jnp.asarray(IDS))


def assert_agrees(network, params, reference):
    with torch.no_grad():
        expected = reference(input_ids=torch.from_numpy(IDS).long()).last_hidden_state
    np.testing.assert_allclose(output(network, params), expected, atol=1e-5)


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("max_shard_size", ["1GB", "4KB"])
def test_what_transformers_saves_is_read(reference, tmp_path, variant, max_shard_size):
    part = tmp_path / "text_encoder_3"
    reference.save_pretrained(part, variant=variant, max_shard_size=max_shard_size)
    assert (len(list(part.glob("*.safetensors"))) > 1) == (max_shard_size == "4KB")
    assert_agrees(*load(tmp_path, variant=variant), reference)


@pytest.mark.parametrize("names", [(SHARED,), (TIED,), (SHARED, TIED)], ids=["shared", "tied", "both"])
def test_the_embedding_is_read_under_either_name(reference, folder, names):
    file = folder / "text_encoder_3/model.safetensors"
    tensors = read_tensors(file)
    embedding = tensors.pop(SHARED)
    write_safetensors(file, {**tensors, **dict.fromkeys(names, embedding)})
    assert_agrees(*load(folder), reference)


def test_two_embeddings_that_differ_are_refused(folder):
    file = folder / "text_encoder_3/model.safetensors"
    tensors = read_tensors(file)
    write_safetensors(file, {**tensors, TIED: tensors[SHARED] + 1})
    with pytest.raises(WeightsError, match=r"text_encoder_3: shared\.weight and encoder\.embed_tokens\.weight differ"):
        load(folder)


def test_a_half_precision_file_comes_back_to_the_bit(reference, folder, tmp_path):
    """Through the network's parameters in bfloat16, as T5-XXL is held."""
    file = folder / "text_encoder_3/model.safetensors"
    half = {key: np.asarray(value, jnp.bfloat16) for key, value in read_tensors(file).items()}
    write_safetensors(file, half)
    network, params = load(folder)
    back = mapping.to_torch(network, params)
    assert back.keys() == half.keys()
    assert all(back[key].tobytes() == half[key].tobytes() for key in half)


def test_transformers_opens_what_is_saved(reference, folder, tmp_path):
    network, params = load(folder)
    config = json.loads((folder / "text_encoder_3/config.json").read_text())
    settings = components.read_settings("T5EncoderModel", config)
    diffusers.save_component(tmp_path / "out", "text_encoder_3", settings.to_dict(), mapping.to_torch(network, params))
    saved = transformers.T5EncoderModel.from_pretrained(tmp_path / "out/text_encoder_3")
    assert saved.config.feed_forward_proj == "gated-gelu"
    for key, value in saved.state_dict().items():
        np.testing.assert_array_equal(value, reference.state_dict()[key])


def test_an_export_names_the_class_of_each_tokenizer(reference, folder, tmp_path):
    from imagereward_jax.data.shapes.tokenizers import write_clip_tokenizer

    write_clip_tokenizer(tmp_path / "tokenizer")
    transformers.T5Tokenizer().save_pretrained(tmp_path / "tokenizer_3")
    diffusers.save_pipeline(
        tmp_path / "out",
        {"text_encoder_3": diffusers.load_component(folder, "text_encoder_3")},
        pipeline_class="StableDiffusion3Pipeline",
        scheduler_config={"_class_name": "FlowMatchEulerDiscreteScheduler"},
        tokenizers=diffusers.tokenizers_of(tmp_path),
    )
    index = json.loads((tmp_path / "out/model_index.json").read_text())
    assert index["tokenizer"] == ["transformers", "CLIPTokenizer"]
    assert index["tokenizer_3"] == ["transformers", "T5TokenizerFast"]
    assert index["text_encoder_3"] == ["transformers", "T5EncoderModel"]
    assert diffusers.read_index(tmp_path / "out").classes == {"text_encoder_3": "T5EncoderModel"}
