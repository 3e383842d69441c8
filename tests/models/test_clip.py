"""CLIP's text encoder against PyTorch transformers on the same random weights, float32 unless said otherwise."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import assert_same_layout, functional, randomise, relative_error, tensors_of
from flax import nnx
from published_parts import CLIP as SD1

from imagereward_jax.models.clip import (
    VIT_BIG_G,
    VIT_L_PROJECTED,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
)
from imagereward_jax.weights import mapping

torch = pytest.importorskip("torch")

transformers = pytest.importorskip("transformers")

BIGG = {
    **SD1,
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}
# The first encoder of Stable Diffusion 3; the second is BIGG.
SD3 = {**SD1, "architectures": ["CLIPTextModelWithProjection"], "projection_dim": 768}
TINY = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 3}
SMALL = {
    "legacy": {**SD1, **TINY},
    "today": {**SD1, **TINY, "eos_token_id": 58, "bos_token_id": 57, "layer_norm_eps": 1e-3},
    "projected": {**BIGG, **TINY, "projection_dim": 20},
    "sd3": {**SD3, **TINY, "projection_dim": 32},
}
CLASSES = {
    "CLIPTextModel": CLIPTextModel,
    "CLIPTextModelWithProjection": CLIPTextModelWithProjection,
}


def published(key):
    """The name in published checkpoints of a key of transformers' module, which has lost its prefix since version 5."""
    return key if key.startswith(("text_model.", "text_projection.")) else f"text_model.{key}"


def torch_model(config):
    (name,) = config["architectures"]
    values = {key: value for key, value in config.items() if key not in ("torch_dtype", "dropout")}
    return getattr(transformers, name)(transformers.CLIPTextConfig(**values))


def build(config, dtype=jnp.float32):
    parsed = CLIPTextConfig.from_dict(config)
    return mapping.abstract(lambda: CLASSES[parsed.architectures[0]](parsed, dtype=dtype, rngs=nnx.Rngs(0)))


@functools.cache
def reference(name):
    torch.manual_seed(0)
    return randomise(torch_model(SMALL[name]))


def published_tensors(name):
    return {published(key): value for key, value in tensors_of(reference(name)).items()}


@functools.cache
def network(name, dtype=jnp.float32):
    return functional(build(SMALL[name], dtype), published_tensors(name))


def prompts():
    """Token ids of two prompts: begin, words, end (58), and padding: with the end's id, and with others."""
    return np.array([[57, 3, 9, 20, 58, 58, 58, 58, 58], [57, 31, 58, 0, 0, 2, 0, 0, 0]], np.int32)


@pytest.mark.parametrize("name", SMALL)
def test_outputs_agree_with_transformers(name):
    with torch.no_grad():
        expected = reference(name)(input_ids=torch.from_numpy(prompts()).long(), output_hidden_states=True)
    graphdef, params = network(name)
    actual = jax.jit(lambda p: nnx.merge(graphdef, p)(prompts()))(params)
    pooled = expected.text_embeds if "text_embeds" in expected else expected.pooler_output
    assert actual.pooled.shape == ((2, 20) if name == "projected" else (2, 32))
    assert relative_error(actual.last_hidden_state, expected.last_hidden_state) < 1e-5
    assert relative_error(actual.penultimate_hidden_state, expected.hidden_states[-2]) < 1e-5
    assert relative_error(actual.pooled, pooled) < 1e-5


@pytest.mark.parametrize(("eos_token_id", "positions"), [(2, (4, 2)), (58, (4, 2)), (9, (2, 0))])
def test_pooling_takes_the_end_of_text(eos_token_id, positions):
    """Id 2 stands for "the largest id"; any other for its first place, or the first token where it is missing."""
    config = {**SMALL["legacy"], "eos_token_id": eos_token_id}
    graphdef, params = functional(build(config), published_tensors("legacy"))
    output = nnx.merge(graphdef, params)(prompts())
    np.testing.assert_array_equal(output.pooled, np.asarray(output.last_hidden_state)[[0, 1], positions])


def test_later_tokens_do_not_change_earlier_ones():
    graphdef, params = network("legacy")
    model, changed = nnx.merge(graphdef, params), prompts()
    changed[:, 5:] = 7
    before, after = (np.asarray(model(ids).last_hidden_state) for ids in (prompts(), changed))
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert relative_error(before[:, 5:], after[:, 5:]) > 1e-2


def test_an_identity_projection_leaves_the_pooled_state():
    """As Stable Diffusion 3 stores it for its first encoder: OpenAI's own projection is not part of that model."""
    tensors = published_tensors("sd3")
    projected = functional(build(SMALL["sd3"]), {**tensors, "text_projection.weight": np.eye(32, dtype=np.float32)})
    plain = functional(build(SMALL["legacy"]), {key: tensors[key] for key in published_tensors("legacy")})
    with_identity, without, with_matrix = (nnx.merge(*one)(prompts()) for one in (projected, plain, network("sd3")))
    np.testing.assert_array_equal(with_identity.pooled, without.pooled)
    assert relative_error(with_matrix.pooled, without.pooled) > 0.1


def test_bfloat16_is_close_to_float32():
    outputs = [nnx.merge(*network("projected", dtype))(prompts()) for dtype in (jnp.float32, jnp.bfloat16)]
    for exact, rounded in zip(*outputs):
        assert rounded.dtype == jnp.bfloat16
        assert 1e-5 < relative_error(rounded, exact) < 0.05


@pytest.mark.parametrize("name", SMALL)
def test_weights_survive_the_round_trip_to_the_bit(name):
    tensors, module = published_tensors(name), nnx.merge(*network(name))
    back = mapping.to_torch(module, mapping.from_torch(module, tensors))
    assert back.keys() == tensors.keys()
    assert all(back[key].tobytes() == tensors[key].tobytes() for key in tensors)


@pytest.mark.parametrize(
    ("config", "count"), [(SD1, 123_060_480), (SD3, 123_650_304), (BIGG, 694_659_840)], ids=["sd1", "sd3", "bigg"]
)
def test_full_size_keys_and_shapes_are_transformers(config, count):
    with torch.device("meta"):
        expected = torch_model(config)
    assert assert_same_layout(build(config), expected, published) == count


@pytest.mark.parametrize("config", [SD1, BIGG, SD3, *SMALL.values()])
def test_config_goes_to_transformers_and_back(config, tmp_path):
    parsed = CLIPTextConfig.from_dict(config)
    saved = transformers.CLIPTextConfig.from_dict(parsed.to_dict())
    assert CLIPTextConfig.from_dict(saved.to_dict()) == parsed
    assert CLIPTextConfig.from_dict(parsed.to_dict()) == parsed
    for name in ("hidden_size", "projection_dim", "eos_token_id", "hidden_act", "layer_norm_eps"):
        assert getattr(saved, name) == getattr(parsed, name)


def test_sizes_of_sd3_are_the_published_ones():
    for sizes, published in ((VIT_L_PROJECTED, SD3), (VIT_BIG_G, BIGG)):
        ours, theirs = (CLIPTextConfig.from_dict(config) for config in (sizes, published))
        assert dataclasses.replace(ours, bos_token_id=0, eos_token_id=2) == theirs


def test_config_that_transformers_saves_today_is_read(tmp_path):
    import json

    reference("projected").save_pretrained(tmp_path)
    parsed = CLIPTextConfig.from_dict(json.loads((tmp_path / "config.json").read_text()))
    assert parsed == CLIPTextConfig.from_dict(SMALL["projected"])


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "relu"},
        {"model_type": "clip"},
        {"architectures": ["CLIPModel"]},
        {"attention_dropout": 0.1},
        {"eos_token_id": [1, 2]},
        {"eos_token_id": -1},
        {"eos_token_id": 49408},
        {"layer_norm_eps": -1},
        {"num_attention_heads": 7},
        {"num_hidden_layers": 0},
        {"some_new_field": 3},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_config_refuses_what_is_not_implemented(changes):
    name = next(iter(changes))
    with pytest.raises(ValueError, match=name):
        CLIPTextConfig.from_dict({**SD1, **changes})


def test_inputs_that_do_not_fit_are_refused():
    model = nnx.merge(*network("legacy"))
    for ids in (prompts()[0], np.zeros((1, 78), np.int32), prompts().astype(np.float32)):
        with pytest.raises(ValueError, match="input_ids should be"):
            model(ids)
