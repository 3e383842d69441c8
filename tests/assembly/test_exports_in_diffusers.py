"""What each method tunes, opened by PyTorch diffusers: the image is ours, from the same noise."""

from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_sd1
import tiny_sdxl

for package in ("orbax.checkpoint", "grain", "ml_collections"):
    pytest.importorskip(package)
torch = pytest.importorskip("torch", reason="the reference is PyTorch diffusers")
diffusers = pytest.importorskip("diffusers", reason="the reference is PyTorch diffusers")
pytest.importorskip("peft", reason="diffusers loads adapters with it")

from imagereward_jax.diffusion.samplers import make_sampler
from imagereward_jax.pipelines import open_pipeline
from imagereward_jax.pipelines.adapted import load_params
from imagereward_jax.train import main

CONFIGS = Path(__file__).parents[2] / "configs"
PROMPT, STEPS, GUIDANCE = "a small blue cross in the center", 3, 3.0
# Recipes and what makes them small.
METHODS = {
    "refl": ("refl_tiny", ["stop_min=0", "stop_max=2", "pretrain=off"]),
    "draft": ("draft_tiny", ["gradient_steps=1"]),
    "alignprop": ("alignprop_tiny", []),
    "drtune": ("drtune_tiny", ["gradient_steps=2", "stop_min=1"]),
    "ddpo": ("ddpo_tiny", ["round_size=2", "rounds=1"]),
}
FAMILIES = {"sd1": tiny_sd1.make_one_level, "sdxl": tiny_sdxl.make}
CHOSEN = ("sd1", "refl")  # what a method writes does not depend on the method; SDXL compiles three times as long


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The folder of a model by family."""
    folders = {}
    for family, make in FAMILIES.items():
        pipeline, params = make(tmp_path_factory.mktemp("tokenizer"))
        folders[family] = tmp_path_factory.mktemp("saved") / family
        pipeline.save(folders[family], params)
    return folders


def tune(model, reward, workdir, method, *options):
    """The export of two steps of a recipe, at a learning rate that shows in images."""
    recipe, own = METHODS[method]
    flags = ["steps=2", "batch_size=2", "ema_decay=0", "optimizer.learning_rate=0.3", "optimizer.warmup_steps=0"]
    flags += [f"method.{field}" for field in ("num_steps=3", "guidance_scale=3.0", "height=8", "width=8", *own)]
    flags += [f"eval.{field}" for field in ("num_prompts=1", "images_per_prompt=1", "batch_size=1", "num_steps=3")]
    flags += ["writers=('jsonl',)", f"model.path={model}", f"reward.path={reward}", *options]
    command = ["train", f"--config={CONFIGS / recipe}.py", f"--workdir={workdir}"]
    assert main([*command, *(f"--config.{flag}" for flag in flags)]) == 0
    return workdir / "export"


def image(folder, *loras):
    """Our image, and the noise that it is made of."""
    pipeline = open_pipeline(folder)
    params, _ = load_params(pipeline, [(str(lora), 1.0) for lora in loras], "float32")
    sampler = make_sampler("ddim", pipeline.scheduler_config, STEPS)
    ids, negative = pipeline.tokenize([PROMPT]), pipeline.tokenize([""])
    noise = np.random.default_rng(5).standard_normal((1, *pipeline.latent_shape(8, 8))).astype(np.float32)
    sample = jax.jit(
        lambda params, noise: pipeline.sample(params, ids, negative, noise, sampler=sampler, guidance_scale=GUIDANCE)
    )
    return np.asarray(sample(params, noise)), noise


def torch_image(folder, noise, *loras):
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    for lora in loras:
        pipe.load_lora_weights(lora)
    latents = torch.from_numpy(np.moveaxis(noise, -1, 1).copy())
    options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "np"}
    return pipe(PROMPT, latents=latents, height=8, width=8, **options).images


@pytest.mark.parametrize(
    ("family", "method"),
    [
        pytest.param(family, method, marks=() if (family, method) == CHOSEN else pytest.mark.slow)
        for family in FAMILIES
        for method in METHODS
    ],
)
def test_an_adapter_of_each_method_gives_the_same_image(models, tiny_reward_folder, tmp_path, family, method):
    """Within 1e-4 of 1, where tuning moved the image by 0.02 on average."""
    model = models[family]
    export = tune(model, tiny_reward_folder, tmp_path / "run", method, "lora.rank=2")
    ours, noise = image(model, export)
    theirs = torch_image(model, noise, export)
    moved, difference = np.abs(ours - image(model)[0]).mean(), np.abs(ours - theirs)
    print(f"moved by {moved:.3f}, difference {difference.mean():.1e} on average, {difference.max():.1e} at most")
    assert moved > 0.02
    assert difference.max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("method", ["draft", "ddpo"])
def test_a_model_tuned_in_full_gives_the_same_image(models, tiny_reward_folder, tmp_path, method):
    """As above, of the exported folder."""
    export = tune(models["sd1"], tiny_reward_folder, tmp_path / "run", method, "optimizer.learning_rate=1e-2")
    ours, noise = image(export)
    moved, difference = np.abs(ours - image(models["sd1"])[0]).mean(), np.abs(ours - torch_image(export, noise))
    print(f"moved by {moved:.3f}, difference {difference.mean():.1e} on average, {difference.max():.1e} at most")
    assert moved > 0.02
    assert difference.max() < 1e-4
