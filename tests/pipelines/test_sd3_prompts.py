"""Prompt embeddings of Stable Diffusion 3 against diffusers' `StableDiffusion3Pipeline.encode_prompt`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_sdxl
from flax import nnx

from imagereward_jax.pipelines.prompt_ids import encode, open_tokenizer
from imagereward_jax.pipelines.sd3_prompts import join_text
from imagereward_jax.weights import components, diffusers, mapping

torch = pytest.importorskip("torch", reason="the reference is PyTorch diffusers")
reference_library = pytest.importorskip("diffusers", reason="the reference is PyTorch diffusers")
transformers = pytest.importorskip("transformers")

PROMPTS = ["a red circle", "a big blue square at the top left of a very long prompt that is cut at its end, and more"]
ENCODERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2", "text_encoder_3": "tokenizer_3"}
WIDTH, CLIP_TOKENS = 72, 16


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """diffusers' pipeline of tiny random networks: encoders of 24, 32 and 72 features."""
    folder = tmp_path_factory.mktemp("tokenizers")
    first, second = tiny_sdxl.text_encoders(tiny_sdxl.write_tokenizers(folder))
    t5 = {"d_kv": 6, "d_ff": 40, "num_layers": 2, "num_heads": 4, "vocab_size": 110, "feed_forward_proj": "gated-gelu"}
    torch.manual_seed(0)
    clips = [
        transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**{**config, "projection_dim": size}))
        for config, size in ((first, 24), (second, 20))
    ]
    letters = [(piece, -2.0 - index) for index, piece in enumerate("▁aeioul")]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pipe = reference_library.StableDiffusion3Pipeline(
        transformer=reference_library.SD3Transformer2DModel(
            sample_size=8, num_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=WIDTH,
            caption_projection_dim=16, pooled_projection_dim=44, pos_embed_max_size=8,
        ),
        scheduler=reference_library.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=reference_library.AutoencoderKL(),
        text_encoder=clips[0].eval(),
        text_encoder_2=clips[1].eval(),
        text_encoder_3=transformers.T5EncoderModel(transformers.T5Config(d_model=WIDTH, **t5)).eval(),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        tokenizer_2=transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
        tokenizer_3=transformers.T5Tokenizer(vocab=special + letters, extra_ids=0),
    )  # fmt: skip
    assert pipe.tokenizer_max_length == CLIP_TOKENS
    return pipe


@pytest.fixture(scope="module")
def encoders(reference, tmp_path_factory):
    """{encoder: (tokenizer, function of ids)} from the folder that diffusers saves."""
    folder = tmp_path_factory.mktemp("sd3")
    found = {}
    for name, tokenizer in ENCODERS.items():
        getattr(reference, name).save_pretrained(folder / name)
        getattr(reference, tokenizer).save_pretrained(folder / tokenizer)
        config, tensors = diffusers.load_component(folder, name)
        class_name = components.class_of(config, name)
        network = components.abstract_network(class_name, config)
        model = nnx.merge(nnx.split(network)[0], mapping.from_torch(network, tensors))
        found[name] = (open_tokenizer(folder / tokenizer, name, config["vocab_size"], class_name), model)
    return found


def conditions(encoders, prompts, third_length, *, with_t5=True):
    lengths = (CLIP_TOKENS, CLIP_TOKENS, third_length)
    ids = [encode(tokenizer, prompts, length) for (tokenizer, _), length in zip(encoders.values(), lengths)]

    @jax.jit
    def join(ids):
        first, second, third = (model(one) for (_, model), one in zip(encoders.values(), ids))
        return join_text(first, second, third if with_t5 else None, third_length=third_length, width=WIDTH)

    return join([jnp.asarray(one) for one in ids])


@pytest.mark.parametrize("third_length", [12, 40])
@pytest.mark.parametrize("with_t5", [True, False])
def test_embeddings_are_those_of_diffusers(reference, encoders, third_length, with_t5, monkeypatch):
    """Prompts, one of them longer than both lengths, and the empty negative prompt, which is encoded like any other."""
    if not with_t5:
        monkeypatch.setattr(reference, "text_encoder_3", None)
    with torch.no_grad():
        embeds, negative, pooled, negative_pooled = reference.encode_prompt(
            PROMPTS, None, None, max_sequence_length=third_length
        )
    cond = conditions(encoders, [*PROMPTS, ""], third_length, with_t5=with_t5)
    assert cond["prompt_embeds"].shape == (3, CLIP_TOKENS + third_length, WIDTH)
    assert cond["pooled_prompt_embeds"].shape == (3, 24 + 20)
    for name, theirs in (
        ("prompt_embeds", torch.cat([embeds, negative[:1]])),
        ("pooled_prompt_embeds", torch.cat([pooled, negative_pooled[:1]])),
    ):
        np.testing.assert_allclose(cond[name], theirs, atol=1e-4 * float(theirs.abs().max()))
    assert np.any(cond["prompt_embeds"][:, CLIP_TOKENS:]) == with_t5
    assert not np.any(cond["prompt_embeds"][:, :CLIP_TOKENS, 24 + 32 :])


def test_outputs_that_do_not_fit_are_refused(encoders):
    ids = jnp.ones((1, 4), jnp.int32)
    first, second, third = (model(ids) for _, model in encoders.values())
    with pytest.raises(ValueError, match="56 features, more than joint_attention_dim=50"):
        join_text(first, second, None, third_length=4, width=50)
    with pytest.raises(ValueError, match=r"should be \[1, 5, 72\], not \[1, 4, 72\]"):
        join_text(first, second, third, third_length=5, width=WIDTH)
