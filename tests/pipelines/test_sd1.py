"""The Stable Diffusion 1.x pipeline against diffusers' StableDiffusionPipeline with the same weights."""

import gzip
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_sd1

from imagereward_jax.data.shapes.tokenizers import write_clip_tokenizer
from imagereward_jax.diffusion.samplers import make_sampler
from imagereward_jax.models import vae
from imagereward_jax.pipelines import load_pipeline
from imagereward_jax.pipelines.sd1 import StableDiffusion1
from imagereward_jax.weights import mapping
from imagereward_jax.weights.mapping import CheckpointMismatch

torch = pytest.importorskip("torch", reason="the reference is PyTorch diffusers")
diffusers = pytest.importorskip("diffusers", reason="the reference is PyTorch diffusers")

CLIP_BPE = Path(__file__).parents[2].parent / "shared" / "real" / "clip-bpe" / "bpe_simple_vocab_16e6.txt.gz"
PROMPTS = ["a red circle", "a big blue square at the top left"]
NEGATIVE = "green"
SCHEDULERS = {
    "ddpm": diffusers.DDPMScheduler,
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny_sd1.make(tmp_path_factory.mktemp("tokenizer"))


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
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def nchw(array):
    return torch.tensor(np.moveaxis(np.asarray(array), -1, 1).copy())


def sample_both(made, reference, monkeypatch, name, *, steps=6, eta=0.0, guidance_scale=7.5, size=(16, 16)):
    """Images [2, H, W, 3] of this pipeline and of diffusers' from the same noise."""
    pipeline, params = made
    shape = (2, *pipeline.latent_shape(*size))
    noise = jax.random.normal(jax.random.key(1), shape)
    keys = jax.random.split(jax.random.key(2), 2)
    sampler = make_sampler(name, pipeline.scheduler_config, steps, eta=eta)
    ids = pipeline.tokenize(PROMPTS)
    negative_ids = pipeline.tokenize([NEGATIVE] * 2) if guidance_scale > 1 else None

    @jax.jit
    def sample(params, ids, negative_ids, noise, keys):
        return pipeline.sample(
            params, ids, negative_ids, noise, sampler=sampler, guidance_scale=guidance_scale, key=keys
        )

    actual = sample(params, ids, negative_ids, noise, keys)

    step_noise = iter(
        nchw(jnp.stack([jax.random.normal(jax.random.fold_in(key, step), shape[1:]) for key in keys]))
        for step in range(steps)
    )
    reference.scheduler = SCHEDULERS[name].from_config(pipeline.scheduler_config)
    monkeypatch.setattr(f"{SCHEDULERS[name].__module__}.randn_tensor", lambda *_, **__: next(step_noise))
    expected = reference(
        PROMPTS, height=size[0], width=size[1], negative_prompt=[NEGATIVE] * 2, num_inference_steps=steps,
        guidance_scale=guidance_scale, eta=eta, latents=nchw(noise), output_type="np",
    ).images  # fmt: skip
    assert expected.std() > 0.05, "a flat picture would say nothing"
    assert ((expected > 0) & (expected < 1)).mean() > 0.5, "a clipped picture would say little"
    return np.asarray(actual), expected


@pytest.mark.parametrize(("name", "eta"), [("ddpm", 0.0), ("ddim", 1.0), ("euler", 0.0), ("dpmpp_2m", 0.0)])
def test_guided_pictures_are_those_of_diffusers(made, reference, monkeypatch, name, eta):
    """Whole generations, largest difference of any value under 1e-4 (of 1). The folder read by diffusers is ours."""
    actual, expected = sample_both(made, reference, monkeypatch, name, eta=eta)
    np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_without_guidance_and_not_square(made, reference, monkeypatch):
    """16 x 24 pixels; height and width are not mixed up."""
    actual, expected = sample_both(made, reference, monkeypatch, "ddim", guidance_scale=1.0, size=(16, 24), steps=3)
    np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_reads_what_diffusers_writes(made, reference, tmp_path):
    """The weights come back bit for bit through diffusers' own files."""
    reference.save_pretrained(tmp_path / "theirs")
    pipeline, params = load_pipeline(tmp_path / "theirs")
    jax.tree.map(np.testing.assert_array_equal, params, made[1])
    assert pipeline.default_size == 16
    assert pipeline.configs == made[0].configs


def test_latents_of_images(made, reference):
    """Mean plus standard deviation times noise, scaled, within 1e-5 of diffusers' VAE."""
    pipeline, params = made
    images = jax.random.uniform(jax.random.key(5), (2, 16, 16, 3))
    actual = jax.jit(pipeline.encode)(params, images, jax.random.key(6))
    with torch.no_grad():
        moments = reference.vae.encode(nchw(images) * 2 - 1).latent_dist
    noise = nchw(jax.random.normal(jax.random.key(6), actual.shape))
    expected = (moments.mean + moments.std * noise) * reference.vae.config.scaling_factor
    np.testing.assert_allclose(np.moveaxis(np.asarray(actual), -1, 1), expected, atol=1e-5)


def test_steps_may_differ_in_a_batch(made):
    """Timesteps [B] give, row by row, what one timestep gives; so does guidance of one prompt at a time."""
    pipeline, params = made
    latents = jax.random.normal(jax.random.key(7), (2, *pipeline.latent_shape(16, 16)))
    encode = jax.jit(pipeline.encode_prompts)
    cond, negative = (encode(params, pipeline.tokenize(texts)) for texts in (PROMPTS, [""] * 2))
    denoise = jax.jit(pipeline.denoise)
    together = denoise(params, latents, jnp.array([981, 21]), cond, negative, 3.0)
    for row, timestep in enumerate((981, 21)):
        one = [{"prompt_embeds": c["prompt_embeds"][row : row + 1]} for c in (cond, negative)]
        alone = denoise(params, latents[row : row + 1], timestep, *one, 3.0)
        np.testing.assert_allclose(together[row : row + 1], alone, atol=2e-5)


def test_tokens_are_those_of_diffusers(made, reference):
    """Padding, cutting, lower case, Unicode and nothing at all."""
    prompts = ["", "A RED circle", "a red circle " * 20, "naïve café — 画像 🎨", "  two   spaces\nand a line "]
    expected = reference.tokenizer(prompts, padding="max_length", max_length=16, truncation=True)["input_ids"]
    ids = made[0].tokenize(prompts)
    assert ids.keys() == {"text_encoder"} and ids["text_encoder"].dtype == np.int32
    np.testing.assert_array_equal(ids["text_encoder"], expected)


def test_a_vae_with_a_shift_and_sixteen_channels_agrees_with_diffusers(tmp_path):
    """As Stable Diffusion 3 has it: latents are (sample - 0.0609) * 1.5305, and no 1x1 convolutions. Within 1e-4."""
    parts = tiny_sd1.configs(write_clip_tokenizer(tmp_path))
    sizes = {name: tiny_sd1.VAE[name] for name in ("block_out_channels", "down_block_types", "up_block_types")}
    parts["vae"] = tiny_sd1.VAE | vae.SD3 | sizes | {"layers_per_block": 1}
    parts["unet"] = tiny_sd1.UNET | {"in_channels": 16, "out_channels": 16}
    pipeline = StableDiffusion1.from_configs(parts, tiny_sd1.SCHEDULER, tmp_path)
    params = tiny_sd1.random_params(pipeline)
    theirs = diffusers.AutoencoderKL.from_config(pipeline.component_config("vae"))
    tensors = mapping.to_torch(pipeline.networks["vae"], params["vae"])
    theirs.load_state_dict({name: torch.tensor(value) for name, value in tensors.items()})
    images = np.random.default_rng(0).random((2, 16, 16, 3), np.float32)
    mean, _ = jax.jit(pipeline.encode_moments)(params, images)
    latents = pipeline.scale_latents(mean)
    decoded = jax.jit(pipeline.decode)(params, latents)
    with torch.no_grad():
        scaled = (theirs.encode(nchw(images) * 2 - 1).latent_dist.mean - 0.0609) * 1.5305
        expected = theirs.decode(scaled / 1.5305 + 0.0609).sample / 2 + 0.5
    assert latents.shape == (2, *pipeline.latent_shape(16, 16)) == (2, 8, 8, 16)
    np.testing.assert_allclose(nchw(latents), scaled, atol=1e-4 * float(scaled.abs().max()))
    np.testing.assert_allclose(nchw(decoded), expected, atol=1e-4 * float(expected.abs().max()))


def test_what_is_cut_off_is_told(made):
    pipeline, _ = made
    assert pipeline.cut_off("a red circle") == ""
    assert pipeline.cut_off("red " * 14) == ""
    assert pipeline.cut_off("red " * 14 + "blue square") == "blue square"


@pytest.mark.skipif(not CLIP_BPE.exists(), reason="needs CLIP's vocabulary beside the checkout, shared/real/clip-bpe")
def test_tokens_of_the_real_vocabulary(tmp_path):
    """Ids that OpenAI's tokenizer gives."""
    merges = gzip.decompress(CLIP_BPE.read_bytes()).decode("utf-8").split("\n")[1 : 49152 - 256 - 2 + 1]
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    characters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = characters + [c + "</w>" for c in characters] + ["".join(merge.split()) for merge in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    text = tiny_sd1.text_encoder(49408) | {"max_position_embeddings": 77}
    parts = tiny_sd1.configs(49408) | {"text_encoder": text}
    pipeline = StableDiffusion1.from_configs(parts, tiny_sd1.SCHEDULER, tmp_path)
    ids = pipeline.tokenize(["a photograph of an astronaut riding a horse", "a photo of a cat"])["text_encoder"]
    assert ids.shape == (2, 77)
    assert ids[0, :10].tolist() == [49406, 320, 8853, 539, 550, 18376, 6765, 320, 4558, 49407]
    assert ids[1, :7].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert (ids[:, 10:] == 49407).all()


def test_random_weights_have_the_networks_shapes(made):
    pipeline, _ = made
    params = pipeline.init(jax.random.key(0))
    shapes = jax.tree.map(lambda leaf: leaf.shape, pipeline.abstract_params())
    assert jax.tree.map(lambda leaf: leaf.shape, params) == shapes
    kernel = params["unet"]["conv_in"]["kernel"]
    assert 0.5 < np.abs(kernel).max() * np.sqrt(4 * 9) <= 1


def test_old_schedulers_are_corrected(tmp_path):
    """As diffusers' pipeline does for checkpoints without steps_offset and clip_sample."""
    old = {key: value for key, value in tiny_sd1.SCHEDULER.items() if key not in ("steps_offset", "clip_sample")}
    pipeline, _ = tiny_sd1.make(tmp_path, old)
    assert (pipeline.scheduler_config["steps_offset"], pipeline.scheduler_config["clip_sample"]) == (1, False)


def test_a_model_is_not_saved_over_another(made, folder):
    with pytest.raises(FileExistsError):
        made[0].save(folder, made[1])
    made[0].save(folder, made[1], overwrite=True)


def test_sizes(made):
    assert made[0].latent_shape(16, 18) == (8, 9, 4)
    with pytest.raises(ValueError, match="width=15 should be a positive multiple of 2"):
        made[0].latent_shape(16, 15)
    with pytest.raises(ValueError, match="height=0"):
        made[0].latent_shape(0, 16)


@pytest.mark.parametrize(
    ("part", "fields", "message"),
    [
        ("unet", {"in_channels": 9}, "in_channels=9"),
        ("unet", {"cross_attention_dim": 32}, "cross_attention_dim=32"),
        ("unet", {"sample_size": None}, "sample_size=None"),
        ("unet", {"class_embed_type": "timestep"}, "class_embed_type='timestep'"),
        (
            "unet",
            {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 72,
            },
            "Stable Diffusion XL",
        ),
        ("text_encoder", {"vocab_size": 100}, "vocab_size=100"),
        ("scheduler", {"prediction_type": "flow"}, "prediction_type='flow'"),
    ],
)
def test_parts_that_do_not_fit_are_refused(made, part, fields, message):
    pipeline, _ = made
    vocab_size = pipeline.configs["text_encoder"].vocab_size
    parts = tiny_sd1.configs(vocab_size) | {"scheduler": tiny_sd1.SCHEDULER}
    parts[part] = parts[part] | fields
    scheduler = parts.pop("scheduler")
    with pytest.raises(ValueError) as caught:
        StableDiffusion1.from_configs(parts, scheduler, pipeline.tokenizer_folders)
    assert message in str(caught.value)


def test_broken_folders_are_named(made, folder, tmp_path):
    pipeline, params = made
    with pytest.raises(FileNotFoundError, match=r"vocab\.json"):
        StableDiffusion1.from_configs(tiny_sd1.configs(1000), tiny_sd1.SCHEDULER, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"model_index\.json"):
        load_pipeline(tmp_path)
    pipeline.save(tmp_path / "other", params)
    index = tmp_path / "other" / "model_index.json"
    before = index.read_text()
    index.write_text(json.dumps({"_class_name": "KandinskyPipeline"}))
    with pytest.raises(ValueError, match="KandinskyPipeline"):
        load_pipeline(tmp_path / "other")
    index.write_text(before)
    config = tmp_path / "other" / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"layers_per_block": 2}))
    with pytest.raises(CheckpointMismatch, match="missing"):
        load_pipeline(tmp_path / "other")
