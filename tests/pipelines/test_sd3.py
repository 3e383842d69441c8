"""The Stable Diffusion 3.5 pipeline against diffusers' StableDiffusion3Pipeline with the same weights."""

import json
import shutil

import jax
import numpy as np
import pytest
import tiny_sd3

from imagereward_jax.pipelines import load_pipeline, open_pipeline
from imagereward_jax.pipelines.sample import ImageSampler
from imagereward_jax.pipelines.sd3 import StableDiffusion3
from imagereward_jax.training.mesh import make_mesh
from imagereward_jax.weights import hub
from imagereward_jax.weights.generation import Generation

torch = pytest.importorskip("torch", reason="the reference is PyTorch diffusers")
diffusers = pytest.importorskip("diffusers", reason="the reference is PyTorch diffusers")

PROMPTS = ["a red circle", "a big blue square at the top left of a prompt that is longer than the tokens of CLIP"]
STEPS, GUIDANCE = 6, 5.0


@pytest.fixture(scope="module", params=["t5", "without t5"])
def with_t5(request):
    return request.param == "t5"


@pytest.fixture(scope="module")
def reference(with_t5, tmp_path_factory):
    return tiny_sd3.make(tmp_path_factory.mktemp("tokenizers"), with_t5=with_t5)


@pytest.fixture(scope="module")
def folder(reference, tmp_path_factory):
    """The tiny model as diffusers saves it."""
    path = tmp_path_factory.mktemp("theirs") / "tiny"
    reference.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def opened(folder):
    """(pipeline, params) of the saved folder."""
    return load_pipeline(folder)


@pytest.fixture(scope="module")
def cond(opened):
    """Conditions of the prompts and of empty ones, [2 + 2]."""
    pipeline, params = opened
    return jax.jit(pipeline.encode_prompts)(params, pipeline.tokenize([*PROMPTS, "", ""]))


def nchw(array):
    return torch.tensor(np.moveaxis(np.asarray(array), -1, 1).copy())


def test_the_family_and_its_defaults(opened, with_t5):
    pipeline = opened[0]
    assert type(pipeline) is StableDiffusion3 and pipeline.family == "sd3"
    assert pipeline.default_size == 16
    assert pipeline.generation == Generation("euler", 28, 7.0)
    assert ("text_encoder_3" in pipeline.components) == ("text_encoder_3" in pipeline.tokenizers) == with_t5
    assert pipeline.max_tokens == (256 if with_t5 else 16)


def test_token_ids_are_those_of_diffusers(opened, reference, with_t5):
    prompts = ["", "A RED circle", "a red circle " * 60]
    ids = opened[0].tokenize(prompts)
    lengths = {"tokenizer": 16, "tokenizer_2": 16} | ({"tokenizer_3": 256} if with_t5 else {})
    assert list(ids) == ["text_encoder", "text_encoder_2", "text_encoder_3"][: len(lengths)]
    for ours, (name, length) in zip(ids.values(), lengths.items()):
        tokenizer = getattr(reference, name)
        theirs = tokenizer(prompts, padding="max_length", max_length=length, truncation=True)["input_ids"]
        np.testing.assert_array_equal(ours, theirs)


def test_encoded_prompts_are_those_of_diffusers(cond, reference, with_t5):
    """Within 1e-4; the empty negative prompt is encoded, and zeros stand for T5."""
    with torch.no_grad():
        embeds, negative, pooled, negative_pooled = reference.encode_prompt(PROMPTS, None, None)
    assert cond["prompt_embeds"].shape == (4, 16 + 256, tiny_sd3.WIDTH)
    np.testing.assert_allclose(cond["prompt_embeds"], torch.cat([embeds, negative]), atol=1e-4)
    np.testing.assert_allclose(cond["pooled_prompt_embeds"], torch.cat([pooled, negative_pooled]), atol=1e-4)
    assert np.any(cond["prompt_embeds"][:, 16:]) == with_t5


def test_the_velocity_is_that_of_diffusers(opened, reference, cond):
    """Of latents that are not square, at a timestep that is no whole number; within 1e-4 of the largest value."""
    pipeline, params = opened
    latents = jax.random.normal(jax.random.key(3), (4, *pipeline.latent_shape(16, 24)))
    actual = jax.jit(pipeline.denoise)(params, latents, 668.33, cond)
    embeds, pooled = (torch.tensor(np.asarray(cond[name])) for name in ("prompt_embeds", "pooled_prompt_embeds"))
    with torch.no_grad():
        timesteps = torch.full((4,), 668.33)
        expected = reference.transformer(nchw(latents), embeds, pooled, timesteps).sample.numpy()
    np.testing.assert_allclose(np.moveaxis(np.asarray(actual), -1, 1), expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("size", [(16, 16), (24, 16)])
def test_guided_images_are_those_of_diffusers(opened, reference, size):
    """Six steps of FlowMatchEuler with guidance 5 from the same noise, and the decoded images: within 1e-4 of 1."""
    pipeline, params = opened
    noise = jax.random.normal(jax.random.key(1), (2, *pipeline.latent_shape(*size)))
    sampler = pipeline.make_sampler("euler", STEPS, 0.0, *size)
    ids, negative_ids = pipeline.tokenize(PROMPTS), pipeline.tokenize(["", ""])
    sample = jax.jit(
        lambda params, noise: pipeline.sample(
            params, ids, negative_ids, noise, sampler=sampler, guidance_scale=GUIDANCE
        )
    )
    expected = reference(
        PROMPTS, height=size[0], width=size[1], num_inference_steps=STEPS, guidance_scale=GUIDANCE,
        latents=nchw(noise), output_type="np",
    ).images  # fmt: skip
    assert expected.std() > 0.05, "a flat image would say nothing"
    assert ((expected > 0) & (expected < 1)).mean() > 0.5, "a clipped image would say little"
    actual = np.asarray(sample(params, noise))
    assert actual.shape == (2, *size, 3)
    np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_encoded_images_are_shifted_and_scaled(opened, reference):
    """The mean of the latents as diffusers' trainers scale it, within 1e-4."""
    pipeline, params = opened
    images = jax.random.uniform(jax.random.key(2), (2, 16, 16, 3))
    actual = pipeline.scale_latents(jax.jit(pipeline.encode_moments)(params, images)[0])
    with torch.no_grad():
        mean = reference.vae.encode(nchw(images) * 2 - 1).latent_dist.mean
    expected = (mean - tiny_sd3.VAE["shift_factor"]) * tiny_sd3.VAE["scaling_factor"]
    np.testing.assert_allclose(np.moveaxis(np.asarray(actual), -1, 1), expected, atol=1e-4)


def test_an_export_opens_in_diffusers_with_the_same_weights(opened, reference, with_t5, tmp_path):
    """Every tensor of every network to the bit, the position table and T5's shared embedding included. Without T5
    diffusers wants to be told so, also for folders that it saved."""
    pipeline, params = opened
    pipeline.save(tmp_path / "ours", params)
    told = {} if with_t5 else {"text_encoder_3": None, "tokenizer_3": None}
    back = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "ours", **told)
    assert type(back) is diffusers.StableDiffusion3Pipeline
    assert back.scheduler.config.shift == 3.0
    assert (back.text_encoder_3 is None) == (back.tokenizer_3 is None) == (not with_t5)
    for name in pipeline.components:
        theirs, ours = (getattr(pipe, name).state_dict() for pipe in (reference, back))
        assert theirs.keys() == ours.keys()
        for key in theirs:
            assert torch.equal(theirs[key], ours[key]), (name, key)
    again, weights = load_pipeline(tmp_path / "ours")
    assert again.components == pipeline.components and again.configs == pipeline.configs
    jax.tree.map(np.testing.assert_array_equal, weights, params)


def test_the_length_of_t5s_prompts_can_be_set(folder, reference):
    """77, as diffusers' trainers have it."""
    pipeline = open_pipeline(folder, max_sequence_length=77)
    with torch.no_grad():
        expected = reference.encode_prompt(PROMPTS, None, None, max_sequence_length=77)[0]
    actual = jax.jit(pipeline.encode_prompts)(pipeline.load_params(), pipeline.tokenize(PROMPTS))
    np.testing.assert_allclose(actual["prompt_embeds"], expected, atol=1e-4)
    with pytest.raises(ValueError, match="max_sequence_length=513 should be 1 to 512"):
        open_pipeline(folder, max_sequence_length=513)


@pytest.mark.parametrize(
    ("size", "message"),
    [((16, 18), "width=18 should be a positive multiple of 4"), ((28, 16), "height=28 should be at most 24")],
)
def test_sizes_that_the_transformer_cannot_make_are_refused(opened, size, message):
    with pytest.raises(ValueError, match=message):
        opened[0].latent_shape(*size)


@pytest.fixture
def copied(folder, tmp_path):
    """A copy of the folder without weights, to be changed."""
    shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("*.safetensors"))
    return tmp_path / "copy"


def change(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        ("transformer/config.json", {"joint_attention_dim": 50}, "joint_attention_dim=50 is less than the 56"),
        ("transformer/config.json", {"pooled_projection_dim": 40}, "pooled_projection_dim=40 is not the 44"),
        ("transformer/config.json", {"in_channels": 4}, "transformer: in_channels=4 is not the VAE's"),
        ("text_encoder_2/config.json", {"max_position_embeddings": 12}, "different lengths"),
        ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "'DDIMScheduler' is not of a flow"),
        ("model_index.json", {"text_encoder_3": ["transformers", "UMT5EncoderModel"]}, "text_encoder_3 is of no class"),
        ("model_index.json", {"transformer": ["diffusers", "FluxTransformer2DModel"]}, "transformer is of no class"),
    ],
)
def test_parts_that_do_not_fit_are_refused(copied, file, fields, message):
    change(copied / file, **fields)
    with pytest.raises(ValueError, match=message):
        open_pipeline(copied)


def test_a_t5_of_another_width_is_refused(copied, with_t5):
    if not with_t5:
        pytest.skip("there is no T5")
    change(copied / "text_encoder_3" / "config.json", d_model=64)
    with pytest.raises(ValueError, match="joint_attention_dim=72 is not text_encoder_3's d_model=64"):
        open_pipeline(copied)


# `target_modules` of diffusers' train_dreambooth_lora_sd3.py, endings of names.
TRAINED = [f"attn.{name}" for name in ("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out")]
TRAINED += [f"attn.{name}" for name in ("to_k", "to_out.0", "to_q", "to_v")]


def test_adapters_are_of_the_layers_that_diffusers_adapts(opened, reference):
    """The second attention has none, and the last layer no to_add_out; layers are named as in diffusers."""
    pipeline = opened[0]
    adapted = pipeline.with_lora("transformer", pipeline.lora_targets, rank=2, alpha=2.0).adapted["transformer"]
    names = [name for name, _ in reference.transformer.named_modules()]
    expected = {name for name in names if any(name.endswith(f".{target}") for target in TRAINED)}
    assert len(expected) == 8 + 8 + 7
    assert set(adapted) == expected


def test_the_built_in_model_makes_diffusers_image():
    """`tiny-shapes-sd3`, 20 steps with guidance, from the same noise: within 1e-5 of diffusers' image."""
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(hub.ASSETS / "tiny-shapes-sd3", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipeline, params = load_pipeline("tiny-shapes-sd3")
    noise = np.random.default_rng(0).standard_normal((1, 8, 8, 16)).astype(np.float32)
    prompt, options = "a small blue triangle in the center", {"height": 32, "width": 32}
    theirs = pipe(
        prompt, num_inference_steps=20, guidance_scale=2.0, latents=nchw(noise), output_type="np",
        max_sequence_length=pipeline.max_sequence_length, **options,
    ).images  # fmt: skip
    sampler = pipeline.make_sampler("euler", 20, 0.0, 32, 32)
    sample = ImageSampler(pipeline, sampler, make_mesh(1, 1, jax.devices()[:1]), 1, guidance_scale=2.0, **options)
    np.testing.assert_allclose(sample(params, [prompt], noise=noise), theirs, atol=1e-5)
