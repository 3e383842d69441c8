"""The Stable Diffusion XL pipeline against diffusers' StableDiffusionXLPipeline with the same weights."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_sdxl

from imagereward_jax.diffusion.samplers import make_sampler
from imagereward_jax.generate import main as generate
from imagereward_jax.pipelines import load_pipeline
from imagereward_jax.pipelines.sdxl import StableDiffusionXL, make_time_ids

torch = pytest.importorskip("torch", reason="the reference is PyTorch diffusers")
diffusers = pytest.importorskip("diffusers", reason="the reference is PyTorch diffusers")

PROMPTS = ["a red circle", "a big blue square at the top left"]
SCHEDULERS = {
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler_ancestral": diffusers.EulerAncestralDiscreteScheduler,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny_sdxl.make(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture(scope="module")
def folder(made, tmp_path_factory):
    """The tiny model as `save` writes it."""
    pipeline, params = made
    path = tmp_path_factory.mktemp("saved") / "tiny"
    pipeline.save(path, params)
    return path


@pytest.fixture(scope="module")
def reference(folder):
    """diffusers' pipeline of the saved folder."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    assert type(pipe) is diffusers.StableDiffusionXLPipeline
    pipe.set_progress_bar_config(disable=True)
    return pipe


def nchw(array):
    return torch.tensor(np.moveaxis(np.asarray(array), -1, 1).copy())


def sample_both(made, reference, monkeypatch, name, *, steps, guidance_scale, size, scheduler=None, negative=None):
    """Images [2, H, W, 3] of this pipeline and of diffusers' from the same noise."""
    pipeline, params = made
    scheduler = scheduler or pipeline.scheduler_config
    shape = (2, *pipeline.latent_shape(*size))
    noise, keys = jax.random.normal(jax.random.key(1), shape), jax.random.split(jax.random.key(2), 2)
    sampler = make_sampler(name, scheduler, steps)
    negative_ids = pipeline.tokenize([negative or ""] * 2) if guidance_scale > 1 else None

    @jax.jit
    def sample(params, ids, negative_ids, noise, keys):
        return pipeline.sample(
            params, ids, negative_ids, noise, sampler=sampler, guidance_scale=guidance_scale, key=keys
        )

    actual = sample(params, pipeline.tokenize(PROMPTS), negative_ids, noise, keys)
    step_noise = iter(
        nchw(jnp.stack([jax.random.normal(jax.random.fold_in(key, step), shape[1:]) for key in keys]))
        for step in range(steps)
    )
    reference.scheduler = SCHEDULERS[name].from_config(scheduler)
    monkeypatch.setattr(f"{SCHEDULERS[name].__module__}.randn_tensor", lambda *_, **__: next(step_noise))
    expected = reference(
        PROMPTS, height=size[0], width=size[1], negative_prompt=negative and [negative] * 2, output_type="np",
        num_inference_steps=steps, guidance_scale=guidance_scale, latents=nchw(noise),
    ).images  # fmt: skip
    assert expected.std() > 0.05, "a flat picture would say nothing"
    assert ((expected > 0) & (expected < 1)).mean() > 0.5, "a clipped picture would say little"
    return np.asarray(actual), expected


@pytest.mark.parametrize(
    ("name", "size", "negative"), [("euler", (16, 16), None), ("ddim", (16, 24), None), ("ddim", (24, 16), "green")]
)
def test_guided_pictures_are_those_of_diffusers(made, reference, monkeypatch, name, size, negative):
    """Whole guided generations at three aspect ratios, the negative prompt zeroed or not: largest difference of any
    value under 1e-4 (of 1)."""
    actual, expected = sample_both(
        made, reference, monkeypatch, name, steps=5, guidance_scale=5.0, size=size, negative=negative
    )
    assert actual.shape == (2, *size, 3)
    np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_few_steps_without_guidance_as_turbo(made, reference, monkeypatch):
    """The ancestral sampler with trailing timesteps and guidance 0, as SDXL-Turbo is run; within 1e-4 of 1."""
    actual, expected = sample_both(
        made, reference, monkeypatch, "euler_ancestral", steps=2, guidance_scale=0.0, size=(16, 16),
        scheduler=tiny_sdxl.TURBO,
    )  # fmt: skip
    np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_encoded_prompts_are_those_of_diffusers(made, reference):
    """Hidden states and pooled projection within 1e-5 of their largest value; an empty negative prompt is zero."""
    pipeline, params = made
    cond = jax.jit(pipeline.encode_prompts)(params, pipeline.tokenize([*PROMPTS, ""]))
    with torch.no_grad():
        embeds, zeros, pooled, zeros_pooled = reference.encode_prompt(PROMPTS, do_classifier_free_guidance=True)
    for ours, theirs, empty in (
        (cond["prompt_embeds"], embeds, zeros),
        (cond["pooled_prompt_embeds"], pooled, zeros_pooled),
    ):
        np.testing.assert_allclose(ours[:2], theirs, atol=1e-5 * float(theirs.abs().max()))
        assert not np.any(ours[2]) and not np.any(empty.numpy())


def test_the_unet_is_told_sizes_and_crop(made, reference):
    """Given time ids, and the default ones of a 16 x 24 picture, as diffusers' UNet takes them; relative 1e-4."""
    pipeline, params = made
    latents = jax.random.normal(jax.random.key(3), (2, *pipeline.latent_shape(16, 24)))
    cond = jax.jit(pipeline.encode_prompts)(params, pipeline.tokenize(PROMPTS))
    given = make_time_ids([[64, 48], [20, 30]], [[0, 4], [2, 0]], [[16, 24], [16, 24]])
    assert given.tolist() == [[64, 48, 0, 4, 16, 24], [20, 30, 2, 0, 16, 24]]
    whole = np.array([[16, 24, 0, 0, 16, 24]] * 2, np.float32)
    denoise = jax.jit(pipeline.denoise)
    outputs = []
    for ours, theirs in ((cond | {"time_ids": given}, given), (cond, whole)):
        added = {
            "text_embeds": torch.tensor(np.asarray(cond["pooled_prompt_embeds"])),
            "time_ids": torch.tensor(theirs),
        }
        with torch.no_grad():
            embeds = torch.tensor(np.asarray(cond["prompt_embeds"]))
            expected = reference.unet(nchw(latents), 501, embeds, added_cond_kwargs=added).sample.numpy()
        outputs.append(np.moveaxis(np.asarray(denoise(params, latents, 501, ours)), -1, 1))
        np.testing.assert_allclose(outputs[-1], expected, atol=1e-4 * np.abs(expected).max())
    assert np.abs(outputs[0] - outputs[1]).max() > 1e-2, "the time ids should matter"


def test_reads_what_diffusers_writes(made, reference, tmp_path):
    """Weights, settings and the zeroing of empty prompts come back through diffusers' own files."""
    reference.register_to_config(force_zeros_for_empty_prompt=False)
    try:
        reference.save_pretrained(tmp_path / "theirs")
    finally:
        reference.register_to_config(force_zeros_for_empty_prompt=True)
    pipeline, params = load_pipeline(tmp_path / "theirs")
    jax.tree.map(np.testing.assert_array_equal, params, made[1])
    assert (pipeline.family, pipeline.default_size) == ("sdxl", 16)
    assert pipeline.configs == made[0].configs
    assert not pipeline.force_zeros_for_empty_prompt and made[0].force_zeros_for_empty_prompt
    assert np.any(pipeline.encode_prompts(params, pipeline.tokenize([""]))["pooled_prompt_embeds"])


def test_both_tokenizers_are_those_of_diffusers(made, reference):
    """The second pads with "!"."""
    prompts = ["", "A RED circle", "a red circle " * 20]
    options = {"padding": "max_length", "max_length": 16, "truncation": True}
    expected = [pipe(prompts, **options)["input_ids"] for pipe in (reference.tokenizer, reference.tokenizer_2)]
    ids = made[0].tokenize(prompts)
    assert list(ids) == ["text_encoder", "text_encoder_2"]
    for ours, theirs in zip(ids.values(), expected):
        np.testing.assert_array_equal(ours, theirs)
    assert np.any(expected[0][1] != expected[1][1])


def test_the_vae_is_never_float16(tmp_path):
    pipeline, _ = tiny_sdxl.make(tmp_path, dtype=jnp.float16)
    assert pipeline.vae_dtype == jnp.float32
    assert tiny_sdxl.make(tmp_path, dtype=jnp.bfloat16)[0].vae_dtype == jnp.bfloat16
    assert tiny_sdxl.make(tmp_path, dtype=jnp.bfloat16, vae_dtype="float32")[0].vae_dtype == jnp.float32
    with pytest.raises(ValueError, match="vae_dtype=float16"):
        tiny_sdxl.make(tmp_path, vae_dtype="float16")


def test_the_generate_command(folder, tmp_path, capsys):
    """Pictures of another shape than square, with guidance, and as Turbo with one step and none."""
    command = ["--model", str(folder), "--prompt", "a red circle"]
    flags = ["--height", "24", "--width", "16", "--steps", "2", "--sampler", "euler"]
    assert generate([*command, "--out", str(tmp_path / "a"), *flags]) == 0
    turbo = ["--steps", "1", "--guidance-scale", "0", "--sampler", "euler_ancestral"]
    assert generate([*command, "--out", str(tmp_path / "b"), *turbo]) == 0
    from PIL import Image

    assert Image.open(tmp_path / "a" / "0_0.png").size == (16, 24)
    assert np.asarray(Image.open(tmp_path / "b" / "0_0.png")).std() > 5
    assert generate([*command, "--out", str(tmp_path / "c"), "--width", "15"]) == 2
    assert "width=15" in capsys.readouterr().err


def test_an_export_states_that_latents_are_not_clipped(made):
    """DDIM of diffusers, made from a folder's scheduler, clips: where no clip_sample is named, as in folders that
    diffusers makes of single files, where it is true or noted as a default. Made from ours it does not."""
    pipeline, named = made[0], tiny_sdxl.SCHEDULER
    unnamed = {key: value for key, value in named.items() if key != "clip_sample"}
    for config in (unnamed, named | {"clip_sample": True}, named | {"_use_default_values": ["clip_sample"]}):
        opened = StableDiffusionXL(pipeline.configs, config, pipeline.tokenizer_folders)
        assert diffusers.DDIMScheduler.from_config(config).config.clip_sample
        assert not diffusers.DDIMScheduler.from_config(opened.scheduler_config).config.clip_sample


def test_prediction_type_can_be_overridden(folder, tmp_path):
    """Schedule, samplers and export follow; a wrong one is refused."""
    pipeline, params = load_pipeline(folder, prediction_type="v_prediction")
    assert pipeline.schedule.prediction_type == "v_prediction"
    pipeline.save(tmp_path / "v", params)
    config = json.loads((tmp_path / "v/scheduler/scheduler_config.json").read_text())
    assert config["prediction_type"] == "v_prediction"
    with pytest.raises(ValueError, match="prediction_type='noise'"):
        load_pipeline(folder, prediction_type="noise")


@pytest.mark.parametrize(
    ("part", "fields", "message"),
    [
        ("unet", {"addition_embed_type": None}, "addition_embed_type=None"),
        ("unet", {"cross_attention_dim": 24}, "24 + 32"),
        ("unet", {"projection_class_embeddings_input_dim": 60}, "is not 68"),
        ("text_encoder_2", {"max_position_embeddings": 12}, "different lengths"),
        ("text_encoder_2", {"vocab_size": 100}, "eos_token_id=588 should be at least 0 and less than vocab_size=100"),
    ],
)
def test_parts_that_do_not_fit_are_refused(made, part, fields, message):
    folders = made[0].tokenizer_folders
    first, second = tiny_sdxl.text_encoders(made[0].configs["text_encoder"].vocab_size)
    parts = {
        "unet": tiny_sdxl.UNET,
        "vae": tiny_sdxl.VAE,
        "text_encoder": first,
        "text_encoder_2": second,
        "scheduler": tiny_sdxl.SCHEDULER,
    }
    parts[part] = parts[part] | fields
    scheduler = parts.pop("scheduler")
    with pytest.raises(ValueError) as caught:
        StableDiffusionXL.from_configs(parts, scheduler, folders)
    assert message in str(caught.value)
