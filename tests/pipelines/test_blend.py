"""A tuned model together with its base, against diffusers: scales, callbacks, and two UNets in a loop."""

import jax
import numpy as np
import pytest
import tiny_sd1
import tiny_sdxl
from jax.sharding import Mesh
from PIL import Image

from imagereward_jax.diffusion.samplers import make_sampler
from imagereward_jax.generate import main
from imagereward_jax.models import lora
from imagereward_jax.pipelines import open_pipeline
from imagereward_jax.pipelines.adapted import load_base, load_params
from imagereward_jax.pipelines.blend import Blend, blended_denoiser, make_blend
from imagereward_jax.pipelines.sample import ImageSampler
from imagereward_jax.weights import adapters, mapping

torch = pytest.importorskip("torch", reason="the reference is PyTorch diffusers")
diffusers = pytest.importorskip("diffusers", reason="the reference is PyTorch diffusers")
pytest.importorskip("peft", reason="diffusers loads adapters with it")

PROMPT, STEPS, GUIDANCE = "a small blue cross in the center", 4, 3.0
NOISE = np.random.default_rng(5).standard_normal((1, 8, 8, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a model."""
    return tiny_sd1.save_one_level(tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """The folder of an adapter of it."""
    pipeline = open_pipeline(base)
    pipeline = pipeline.with_lora("unet", pipeline.lora_targets, rank=3, alpha=3.0)
    rng = np.random.default_rng(0)
    shapes = mapping.params_of(pipeline.networks["unet"], lora.LoRAParam)
    own = {"unet": jax.tree.map(lambda leaf: 1.2 * rng.standard_normal(leaf.shape).astype(np.float32), shapes)}
    path = tmp_path_factory.mktemp("adapter")
    adapters.write_adapter(path, pipeline.networks, own, rank=3, alpha=3.0)
    return path


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    """The folder of the model with another UNet and text encoder."""
    pipeline, params = open_pipeline(base), open_pipeline(base).load_params()
    rng = np.random.default_rng(7)

    def change(leaf):
        return leaf * (1 + 0.3 * rng.standard_normal(leaf.shape).astype(np.float32))

    path = tmp_path_factory.mktemp("saved") / "tuned"
    pipeline.save(path, {**params, **{name: jax.tree.map(change, params[name]) for name in ("unet", "text_encoder")}})
    return path


def torch_pipeline(folder, adapter=None):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    if adapter:
        pipe.load_lora_weights(adapter, adapter_name="tuned")
    return pipe


def torch_image(pipe, **options):
    latents = torch.from_numpy(np.moveaxis(NOISE, -1, 1).copy())
    options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "np", **options}
    return pipe(PROMPT, latents=latents, **options).images


@torch.no_grad()
def torch_blend(base, tuned, positive, negative):
    """The image of two pipelines, whose four predictions of each step are mixed by weights of the tuned one."""
    pipes, latents = (base, tuned), torch.from_numpy(np.moveaxis(NOISE, -1, 1).copy())
    embeds = [pipe.encode_prompt(PROMPT, "cpu", 1, True) for pipe in pipes]
    tuned.scheduler.set_timesteps(STEPS)
    for timestep, *weights in zip(tuned.scheduler.timesteps, positive, negative):
        mixed = []
        for weight, prompt in zip(weights, (0, 1)):  # encode_prompt gives (positive, negative)
            theirs, ours = (pipe.unet(latents, timestep, one[prompt]).sample for pipe, one in zip(pipes, embeds))
            mixed.append((1 - weight) * theirs + weight * ours)
        output = mixed[1] + GUIDANCE * (mixed[0] - mixed[1])
        latents = tuned.scheduler.step(output, timestep, latents).prev_sample
    decoded = tuned.vae.decode(latents / tuned.vae.config.scaling_factor).sample
    return (decoded / 2 + 0.5).clamp(0, 1).numpy().transpose(0, 2, 3, 1)


def image(pipeline, params, base=None, blend=None):
    sampler = make_sampler("ddim", pipeline.scheduler_config, STEPS)
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    size = {"height": 8, "width": 8}
    sample = ImageSampler(pipeline, sampler, mesh, 1, **size, guidance_scale=GUIDANCE, blend=blend)
    return sample(params, [PROMPT], noise=NOISE, base=base)


def test_a_scale_of_an_adapter(base, adapter, tmp_path):
    """`--lora-scale` beside a weight: diffusers' scale within 1e-4, and a level of the file, which says so."""
    pipeline = open_pipeline(base)
    expected = torch_image(torch_pipeline(base, adapter), cross_attention_kwargs={"scale": 0.3})
    ours = image(pipeline, load_params(pipeline, [(str(adapter), 0.3)], "float32")[0])
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    np.save(tmp_path / "noise.npy", NOISE)
    flags = ["--model", str(base), "--prompt", PROMPT, "--out", str(tmp_path / "out"), "--steps", str(STEPS)]
    flags += ["--noise", str(tmp_path / "noise.npy"), "--guidance-scale", str(GUIDANCE)]
    flags += ["--lora", f"{adapter}:0.5", "--lora-scale", "0.6", "--height", "8", "--width", "8"]
    assert main(flags) == 0
    written = Image.open(tmp_path / "out/0_0.png")
    assert np.abs(np.asarray(written) / 255 - expected).max() < 1 / 255 and written.text["lora_scale"] == "0.6"


def test_a_range_of_steps_is_diffusers_with_a_callback(base, adapter):
    """The base model's first two of four steps, then the adapter's; within 1e-4, and far from either alone."""
    pipe = torch_pipeline(base, adapter)
    pipe.set_adapters("tuned", 0.0)

    def switch(pipe, step, timestep, tensors):
        pipe.set_adapters("tuned", float(step + 1 >= 2))
        return tensors

    expected = torch_image(pipe, callback_on_step_end=switch)
    pipeline = open_pipeline(base)
    params, untuned = load_params(pipeline, [(str(adapter), 1.0)], "float32", keep_base=True)
    ours = image(pipeline, params, untuned, make_blend(STEPS, steps=(0.5, 1.0)))
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    for alone in (image(pipeline, params), image(pipeline, {**params, **untuned})):
        assert np.abs(alone - ours).mean() > 0.01


@pytest.mark.parametrize(
    ("options", "positive", "negative"),
    [
        ({"weight": (0.0, 1.0)}, [0, 0.25, 0.5, 0.75], [0, 0.25, 0.5, 0.75]),
        ({"base_negative": True}, [1, 1, 1, 1], [0, 0, 0, 0]),
        ({"weight": (0.5, 1.5), "steps": (0.25, 1.0), "base_negative": True}, [0, 0.5, 5 / 6, 7 / 6], [0, 0, 0, 0]),
    ],
    ids=["annealed", "combined", "both"],
)
def test_two_models_are_mixed_as_two_unets_in_a_loop(base, tuned, options, positive, negative):
    """Within 1e-4, for models that differ in UNet and text encoder; the tuned one alone is far from it."""
    expected = torch_blend(torch_pipeline(base), torch_pipeline(tuned), positive, negative)
    pipeline = open_pipeline(tuned)
    params, _ = load_params(pipeline, [], "float32")
    untuned = load_base(pipeline, open_pipeline(base), params, "float32", "base")
    assert sorted(untuned) == ["text_encoder", "unet"]
    ours = image(pipeline, params, untuned, make_blend(STEPS, **options))
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    assert np.abs(ours - image(pipeline, params)).mean() > 0.01


def test_the_command_mixes_two_models(base, tuned, tmp_path):
    """The weights of NeMo-Aligner's annealed guidance from flags, and what the file says of them."""
    np.save(tmp_path / "noise.npy", NOISE)
    flags = ["--model", str(tuned), "--prompt", PROMPT, "--out", str(tmp_path / "out"), "--steps", str(STEPS)]
    flags += ["--noise", str(tmp_path / "noise.npy"), "--guidance-scale", str(GUIDANCE), "--height", "8"]
    flags += ["--base", str(base), "--tuned-weight", "0:1:2", "--tuned-steps", "0.25:1", "--width", "8"]
    assert main(flags) == 0
    weights = np.array([0, 0, 1 / 3, 2 / 3]) ** 2
    expected = torch_blend(torch_pipeline(base), torch_pipeline(tuned), weights, weights)
    written = Image.open(tmp_path / "out/0_0.png")
    assert np.abs(np.asarray(written) / 255 - expected).max() < 1 / 255
    said = {name: written.text.get(name) for name in ("base", "tuned_weight", "tuned_steps", "base_negative", "lora")}
    assert list(said.values()) == [str(base), "0:1:2", "0.25:1", None, None]


def test_weights_are_those_of_the_papers():
    """i / N, its square, and 1 from a fifth of the steps on."""
    index = np.arange(50) / 50
    np.testing.assert_allclose(make_blend(50, weight=(0, 1)).positive, index, rtol=1e-6)
    np.testing.assert_allclose(make_blend(50, weight=(0, 1), power=2).negative, index**2, rtol=1e-6)
    np.testing.assert_array_equal(make_blend(50, steps=(0.2, 1)).positive, index >= 0.2)
    np.testing.assert_array_equal(make_blend(10, steps=(0.3, 0.7)).positive, [0] * 3 + [1] * 4 + [0] * 3)
    assert not make_blend(3, base_negative=True).negative.any()


class Counted:
    """A pipeline whose predictions are its parameters, and which counts the rows that it was asked for."""

    guided = staticmethod(lambda negative, positive, scale: negative + scale * (positive - negative))

    def predict_each(self, params, latents, timesteps, conds):
        jax.debug.callback(lambda: self.rows.append(len(conds)))
        return [params * cond * latents for cond in conds]


@pytest.mark.parametrize(
    ("blend", "rows"),
    [
        (make_blend(4, steps=(0.5, 1.0)), [2, 2, 2, 2]),
        (make_blend(4, base_negative=True), [1, 1] * 4),
        (make_blend(4, weight=(0.0, 1.0), steps=(0.25, 1.0)), [2, 2, 2, 2, 2, 2]),
    ],
    ids=["range", "combined", "annealed"],
)
def test_a_step_asks_for_what_has_a_weight(blend, rows):
    """A range and combined guidance cost an ordinary step; a weight of 0 no call of the tuned model."""
    pipeline = Counted()
    pipeline.rows = []
    denoise = jax.jit(blended_denoiser(pipeline, blend, ((1.0, 2.0), (1.0, 2.0)), 3.0))
    for step, (negative, positive) in enumerate(zip(*blend)):
        found = denoise((10.0, 20.0), np.ones((1, 1)), None, np.array([step]))
        mixed = 10 + 10 * negative, 2 * (10 + 10 * positive)
        np.testing.assert_allclose(found, [[mixed[0] + 3 * (mixed[1] - mixed[0])]], rtol=1e-6)
    jax.effects_barrier()
    assert pipeline.rows == rows


def test_a_base_of_another_kind_is_refused(base, tmp_path):
    pipeline = open_pipeline(base)
    with pytest.raises(ValueError, match="it predicts v_prediction, the tuned model epsilon"):
        load_base(pipeline, open_pipeline(base, prediction_type="v_prediction"), {}, "float32", "it")
    with pytest.raises(ValueError, match="it is of the family sdxl, the tuned model of sd1"):
        load_base(pipeline, tiny_sdxl.make(tmp_path)[0], {}, "float32", "it")


def test_what_does_not_fit_is_refused(base):
    for options, said in (
        ({"steps": (0.5, 0.5)}, "0.5:0.5 should be two positions"),
        ({"steps": (0.0, 1.1)}, "0:1.1 should be two positions"),
        ({"steps": (0.3, 0.4)}, "0.3:0.4 hold none of 4 steps"),
        ({"weight": (0.0, 1e39)}, "0:1e\\+39 is too large for float32"),
        ({"power": 0.0}, "1:1:0 should be two finite numbers and a power above 0"),
    ):
        with pytest.raises(ValueError, match=said):
            make_blend(4, **options)
    pipeline = open_pipeline(base)
    with pytest.raises(ValueError, match="blend is made for 3 steps, the sampler has 4"):
        image(pipeline, {}, blend=Blend(np.ones(3), np.ones(3)))
    with pytest.raises(ValueError, match="pass both or neither"):
        image(pipeline, {}, blend=make_blend(STEPS))
