"""The ImageReward network against the published key names and against Hugging Face's BLIP in PyTorch."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from imagereward_jax.models.blip import ImageRewardModel, RewardHead
from imagereward_jax.models.blip_config import ImageRewardConfig, TextConfig
from imagereward_jax.weights import mapping

MANIFEST = Path(__file__).parents[3] / "shared" / "manifests" / "imagereward_v1.0.json"


def test_keys_and_shapes_are_those_of_the_published_checkpoint():
    if not MANIFEST.is_file():
        pytest.skip(f"needs the list of the checkpoint's keys, {MANIFEST}")
    published = {key: tuple(shape) for key, shape in json.loads(MANIFEST.read_text()).items()}
    assert len(published) == 625
    assert published.pop("blip.text_encoder.embeddings.position_ids") == (1, 512)
    module = mapping.abstract(lambda: ImageRewardModel(ImageRewardConfig(), rngs=nnx.Rngs(0)))
    assert {key: leaf.torch_shape for key, leaf in mapping.torch_layout(module).items()} == published


def random_tensors(config, seed=0):
    """PyTorch-named weights of about unit gain, so that errors are not hidden by small numbers."""
    rng = np.random.default_rng(seed)
    module = mapping.abstract(lambda: ImageRewardModel(config, rngs=nnx.Rngs(0)))
    tensors = {}
    for key, leaf in mapping.torch_layout(module).items():
        noise = rng.standard_normal(leaf.torch_shape).astype(np.float32)
        if len(noise.shape) == 1:
            tensors[key] = (1 if "norm" in key.lower() and key.endswith("weight") else 0) + 0.2 * noise
        else:
            tensors[key] = noise * (noise[0].size ** -0.5 if key.endswith("weight") else 0.3)
    return module, tensors


def torch_reference(config, tensors):
    """The same network out of Hugging Face's BLIP modules: a function (pixels NCHW, ids, mask) -> (embeds, scores)."""
    torch = pytest.importorskip("torch")
    from transformers import BlipTextConfig, BlipVisionConfig
    from transformers.models.blip.modeling_blip import BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    vision = BlipVisionModel(
        BlipVisionConfig(
            hidden_size=config.vision.width,
            intermediate_size=config.vision.width * config.vision.mlp_ratio,
            num_hidden_layers=config.vision.depth,
            num_attention_heads=config.vision.heads,
            image_size=config.vision.image_size,
            patch_size=config.vision.patch_size,
            layer_norm_eps=config.vision.layer_norm_eps,
            hidden_act="gelu",
        )
    )
    # `is_decoder` gives it cross-attention; it masks causally only where the call asks for that.
    fixed = {"hidden_act": "gelu", "is_decoder": True, "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
    sizes = {field: getattr(config.text, field) for field in TextConfig.__dataclass_fields__}
    text = BlipTextModel(
        BlipTextConfig(
            **sizes, **fixed, bos_token_id=1, sep_token_id=1, eos_token_id=1, encoder_hidden_size=config.vision.width
        ),
        add_pooling_layer=False,
    )
    features, sizes = config.text.hidden_size, (*config.head_sizes, 1)
    head = torch.nn.Sequential()
    for index, size in zip((0, 2, 4, 6, 7), sizes):
        head.add_module(str(index), torch.nn.Linear(features, size))
        features = size

    tensors = {key: torch.from_numpy(value) for key, value in tensors.items()}
    renamed = {
        "visual_encoder.cls_token": "embeddings.class_embedding",
        "visual_encoder.pos_embed": "embeddings.position_embedding",
        "visual_encoder.patch_embed.proj": "embeddings.patch_embedding",
        "visual_encoder.blocks": "encoder.layers",
        ".attn.proj": ".self_attn.projection",
        ".attn.": ".self_attn.",
        ".norm1": ".layer_norm1",
        ".norm2": ".layer_norm2",
        "visual_encoder.norm": "post_layernorm",
    }
    vision_tensors = {}
    for key, value in tensors.items():
        if key.startswith("blip.visual_encoder."):
            name = key.removeprefix("blip.")
            for old, new in renamed.items():
                name = name.replace(old, new)
            vision_tensors[name] = value
    vision.load_state_dict(vision_tensors)
    prefix = "blip.text_encoder."
    text_tensors = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    missing, unexpected = text.load_state_dict(text_tensors, strict=False)
    assert not unexpected and set(missing) <= {"embeddings.position_ids"}
    head.load_state_dict({k.removeprefix("mlp.layers."): v for k, v in tensors.items() if k.startswith("mlp.")})
    vision.eval(), text.eval()

    def run(pixels, ids, mask):
        embeds = vision(pixel_values=pixels).last_hidden_state
        hidden = text(
            input_ids=torch.from_numpy(ids).long(),
            attention_mask=torch.from_numpy(mask).long(),
            encoder_hidden_states=embeds,
            encoder_attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
        ).last_hidden_state
        return embeds, (head(hidden[:, 0])[:, 0] - config.score_mean) / config.score_std

    return torch, run


def inputs(config, batch=3):
    rng = np.random.default_rng(5)
    size = config.vision.image_size
    pixels = rng.standard_normal((batch, size, size, 3)).astype(np.float32)
    ids = rng.integers(0, config.text.vocab_size, (batch, config.max_prompt_tokens)).astype(np.int32)
    lengths = [2, config.max_prompt_tokens, 5][:batch]
    mask = (np.arange(config.max_prompt_tokens) < np.array(lengths)[:, None]).astype(np.int32)
    return pixels, ids, mask


def test_embeddings_scores_and_gradients_agree_with_pytorch(tiny_reward_config):
    """Image embeddings, scores and the gradient by the pixels within 2e-5 of Hugging Face's BLIP in float32."""
    config = tiny_reward_config
    module, tensors = random_tensors(config)
    torch, reference = torch_reference(config, tensors)
    params, graphdef = mapping.from_torch(module, tensors), nnx.graphdef(module)
    pixels, ids, mask = inputs(config)
    torch_pixels = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()).requires_grad_()
    expected_embeds, expected_scores = reference(torch_pixels, ids, mask)
    expected_scores.sum().backward()

    def score(pixels):
        scores = nnx.merge(graphdef, params)(pixels, ids, mask)
        return scores.sum(), scores

    embeds = jax.jit(lambda x: nnx.merge(graphdef, params).encode_images(x))(pixels)
    (_, scores), gradient = jax.jit(jax.value_and_grad(score, has_aux=True))(pixels)
    np.testing.assert_allclose(embeds, expected_embeds.detach(), atol=2e-5)
    np.testing.assert_allclose(scores, expected_scores.detach(), atol=2e-5)
    expected = torch_pixels.grad.numpy().transpose(0, 2, 3, 1)
    assert np.abs(expected).max() > 1e-3, "the reference gradient must be worth comparing"
    np.testing.assert_allclose(gradient, expected, atol=2e-5 * np.abs(expected).max())
    assert np.ptp(scores) > 0.1, "the scores must differ for the comparison to mean something"


@pytest.fixture(scope="module")
def scorer(tiny_reward_config):
    """(encode, score_prompts, score) of one network with random weights, compiled."""
    module, tensors = random_tensors(tiny_reward_config)
    params, graphdef = mapping.from_torch(module, tensors), nnx.graphdef(module)
    methods = ("encode_images", "score_prompts", "__call__")
    return [jax.jit(lambda *args, name=name: getattr(nnx.merge(graphdef, params), name)(*args)) for name in methods]


def test_an_image_encoded_once_gives_the_scores_of_many_prompts(scorer, tiny_reward_config):
    encode, score_prompts, score = scorer
    pixels, ids, mask = inputs(tiny_reward_config)
    pixels = np.repeat(pixels[:1], 3, axis=0)
    embeds = np.repeat(encode(pixels[:1]), 3, axis=0)
    np.testing.assert_allclose(score_prompts(embeds, ids, mask), score(pixels, ids, mask), atol=1e-5)


def test_what_the_mask_hides_does_not_count(scorer, tiny_reward_config):
    score = scorer[-1]
    pixels, ids, mask = inputs(tiny_reward_config)
    hidden, seen = np.where(mask == 1, ids, 7), np.where(mask == 1, 7, ids)
    np.testing.assert_array_equal(score(pixels, hidden, mask), score(pixels, ids, mask))
    assert np.abs(score(pixels, seen, mask) - score(pixels, ids, mask)).min() > 1e-3


def test_bfloat16_stays_near_float32_and_scores_are_float32(scorer, tiny_reward_config):
    module, tensors = random_tensors(tiny_reward_config)
    params, (pixels, ids, mask) = mapping.from_torch(module, tensors), inputs(tiny_reward_config)
    half = mapping.abstract(lambda: ImageRewardModel(tiny_reward_config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    exact = scorer[-1](pixels, ids, mask)
    rounded = jax.jit(lambda *args: nnx.merge(nnx.graphdef(half), params)(*args))(pixels, ids, mask)
    assert rounded.dtype == jnp.float32
    np.testing.assert_allclose(rounded, exact, atol=0.1)
    assert np.abs(rounded - exact).max() > 0, "bfloat16 was asked for but not used"


def test_the_head_starts_as_published():
    """Weights N(0, 1 / (hidden + 1)), biases 0."""
    first = RewardHead(768, (1024, 128, 64, 16), rngs=nnx.Rngs(0)).layers[0]
    np.testing.assert_allclose(np.std(first.kernel[...]), 1 / 769, rtol=0.01)
    assert not np.any(first.bias[...])


def test_configs_survive_json(tiny_reward_config):
    for config in (ImageRewardConfig(), tiny_reward_config):
        assert ImageRewardConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_the_published_med_config_is_understood():
    published = {
        "architectures": ["BertModel"], "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1, "hidden_size": 768, "initializer_range": 0.02, "intermediate_size": 3072,
        "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "model_type": "bert", "num_attention_heads": 12,
        "num_hidden_layers": 12, "pad_token_id": 0, "type_vocab_size": 2, "vocab_size": 30524,
        "encoder_width": 768, "add_cross_attention": True,
    }  # fmt: skip
    assert TextConfig.from_dict(published) == TextConfig()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text": {"hidden_act": "relu"}}, "hidden_act must be 'gelu'"),
        ({"text": {"add_cross_attention": False}}, "add_cross_attention must be True"),
        ({"text": {"position_embedding_type": "relative_key"}}, "position_embedding_type must be 'absolute'"),
        ({"text": {"layers": 3}}, "unknown field 'layers'"),
        ({"text": {"hidden_size": 100}}, "hidden_size 100 is not a multiple"),
        ({"text": {"vocab_size": 0}}, "vocab_size must be a positive whole number, not 0"),
        ({"vision": {"image_size": 225}}, "image_size 225 is not a multiple of patch_size 16"),
        ({"vision": {"depth": "24"}}, "depth='24': expected a whole number"),
        ({"vision": {"drop_path": 0.1}}, "unknown field 'drop_path'"),
        ({"model_type": "clip"}, "model_type must be 'imagereward', not 'clip'"),
        ({"head_sizes": [1, 2]}, "head_sizes must hold 4 numbers"),
        ({"max_prompt_tokens": 600}, "max_prompt_tokens 600 is more than the 512 positions"),
        ({"score_std": 0}, "score_std must be above 0"),
    ],
)
def test_configs_that_are_not_implemented_are_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message):
        ImageRewardConfig.from_dict(values)
