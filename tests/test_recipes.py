"""The recipes of the built-in model, scaled down: pictures -> autoencoder -> diffusion model, ranked pictures ->
reward -> ReFL."""

import html
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

for package in ("orbax.checkpoint", "grain", "ml_collections"):
    pytest.importorskip(package)

from imagereward_jax.assembly.run import assemble
from imagereward_jax.pipelines import load_pipeline
from imagereward_jax.recipes import recipe_beside, validate
from imagereward_jax.train import main
from imagereward_jax.training.metric_writers import read_rows
from imagereward_jax.training.samples import read_samples
from imagereward_jax.weights.files import read_tensors

CONFIGS = Path(__file__).parents[1] / "configs"
QUICK = ["--config.writers=('jsonl',)", "--config.log_every=5", "--config.optimizer.warmup_steps=0"]
SMALL_NETWORKS = [
    f"--config.model.architecture.{field}"
    for field in (
        "unet.block_out_channels=(16,)",
        "unet.down_block_types=('DownBlock2D',)",
        "unet.up_block_types=('UpBlock2D',)",
        "unet.norm_num_groups=8",
        "vae.sample_size=16",
        "vae.block_out_channels=(8, 16)",
        "vae.down_block_types=('DownEncoderBlock2D', 'DownEncoderBlock2D')",
        "vae.up_block_types=('UpDecoderBlock2D', 'UpDecoderBlock2D')",
        "vae.norm_num_groups=4",
    )
]
SMALL_IMAGES = "--config.data.image_size=16"
SMALL_SAMPLES = [
    f"--config.eval.{field}" for field in ("num_prompts=4", "images_per_prompt=1", "batch_size=4", "num_steps=2")
]


def train(name, workdir, *options):
    """Runs a recipe's command; returns the rows of its metrics."""
    status = main(["train", f"--config={CONFIGS / name}.py", f"--workdir={workdir}", *QUICK, *options])
    assert status == 0
    return read_rows(workdir / "metrics.jsonl")


def evaluations(rows, name):
    return [row[name] for row in rows if name in row]


@pytest.mark.parametrize(
    ("name", "trained"),
    [
        ("sd15_full", 859_520_964),
        ("sdxl_lora", 5_806_080),
        ("dreambooth_sdxl_lora", 5_806_080),
        ("sd35_full", 2_243_171_520),
        ("sd35_lora", 2_347_008),
        ("dreambooth_sd35_lora", 2_347_008),
        ("refl_sd35_lora", 2_347_008),
        ("drtune_sd35_lora", 8 * 2_347_008),
    ],
)
def test_recipes_of_published_models_train_as_many_parameters_as_diffusers_scripts(name, trained):
    """Counts of the original scripts, at rank 4 (DRTune: 32); a step of each reads what its recipe names."""
    config = recipe_beside(CONFIGS / f"{name}.py", name)
    validate(config)
    if config.reward.path:
        config.reward.path = "ImageReward-v1.0"  # of the others no shapes are known
    run = assemble(config, AbstractMesh((1, 1), ("data", "fsdp")), abstract=True)
    assert sum(leaf.size for leaf in jax.tree.leaves(run.trainable)) == trained
    rows = {leaf.shape[0] for phase in run.method.phases for leaf in jax.tree.leaves(phase.source.spec())}
    assert rows == {config.batch_size}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Workdirs and metrics of the four recipes, each fed by the ones before."""
    root = tmp_path_factory.mktemp("runs")
    rows = {}
    rows["vae"] = train(
        "shapes_vae",
        root / "vae",
        "--config.steps=60",
        "--config.batch_size=8",
        "--config.eval.num_images=8",
        SMALL_IMAGES,
        *SMALL_NETWORKS,
    )
    model = f"--config.model.path={root / 'vae/export'}"
    rows["pretrain"] = train(
        "shapes_pretrain",
        root / "pretrain",
        "--config.steps=40",
        "--config.batch_size=8",
        model,
        SMALL_IMAGES,
        *SMALL_SAMPLES,
    )
    rows["reward"] = train(
        "shapes_reward",
        root / "reward",
        "--config.steps=60",
        "--config.batch_size=8",
        "--config.eval.num_groups=16",
        "--config.reward.architecture.vision.depth=1",
        "--config.reward.architecture.vision.width=32",
        "--config.reward.architecture.text.num_hidden_layers=1",
    )
    terms = [f"--config.reward.terms.{name}" for name in ("builtin", "trained")]
    rows["refl"] = train(
        "refl_tiny_mix",
        root / "refl",
        "--config.log_every=1",
        "--config.steps=4",
        "--config.batch_size=4",
        "--config.method.height=16",
        "--config.method.width=16",
        "--config.method.num_steps=3",
        "--config.method.stop_min=0",
        "--config.method.stop_max=2",
        "--config.method.guidance_max=1.0",
        "--config.eval.guidance_scales=(1.0,)",
        f"--config.model.path={root / 'pretrain/export'}",
        *(f"{term}.path={root / 'reward/export'}" for term in terms),
        *(f"{term}.clip=0.0" for term in terms),
        SMALL_IMAGES,
        *SMALL_SAMPLES,
    )
    return root, rows


def test_the_autoencoder_learns_to_reconstruct(runs):
    psnr = evaluations(runs[1]["vae"], "eval/psnr")
    assert psnr[-1] > psnr[0] + 3


def test_the_autoencoder_is_exported_with_latents_of_unit_variance(runs):
    pipeline, params = load_pipeline(runs[0] / "vae/export")
    from imagereward_jax.data.shapes import ShapesPairs

    images = np.stack([ShapesPairs(16, seed=9, image_size=16)[i]["image"] for i in range(16)])
    import jax

    latents = np.asarray(pipeline.encode(params, images, jax.random.key(0)))
    assert 0.7 < latents.std() < 1.4


def test_the_denoising_loss_falls(runs):
    losses = evaluations(runs[1]["pretrain"], "denoising/loss")
    assert losses[-1] < 0.8 * losses[0]


def test_the_reward_learns_to_rank(runs):
    """The held-out loss falls below ln 2, where a reward that knows nothing stands."""
    losses = evaluations(runs[1]["reward"], "eval/loss")
    assert losses[-1] < min(losses[0], np.log(2))


def test_refl_tunes_the_unet_alone(runs):
    """The exported text encoder and VAE are the base model's bit for bit; the UNet is not."""
    root = runs[0]
    for name, file in (
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
        ("unet", "diffusion_pytorch_model"),
    ):
        base, tuned = (read_tensors(root / run / f"export/{name}/{file}.safetensors") for run in ("pretrain", "refl"))
        assert base.keys() == tuned.keys()
        same = all(np.array_equal(base[key], tuned[key]) for key in base)
        assert same == (name != "unet")


def test_refl_logs_reward_loss_speed_and_progress(runs):
    first, last = runs[1]["refl"][0], runs[1]["refl"][-1]
    for row in (first, last):
        assert {"step", "time", "eval/reward_mean", "eval/reward_std", "eval/checker_rate"} <= row.keys()
        assert {"eval/reward_mean@1", "eval/checker_rate@1"} <= row.keys()
        assert row["eval/reward_mean@1"] != row["eval/reward_mean"]  # no guidance, beside that of use
    assert {"refl/reward", "refl/loss", "denoising/loss", "skipped", "images_per_second"} <= last.keys()


def test_every_reward_of_a_mixture_is_logged_at_every_step_and_in_the_evaluation(runs):
    """Weights 1 and 0.5 of the same reward: the mixture is one and a half of it."""
    rows = runs[1]["refl"]
    for row in (rows[0], rows[-1]):
        assert {"eval/reward_mean", "eval/reward_builtin", "eval/reward_trained"} <= row.keys()
        np.testing.assert_allclose(row["eval/reward_mean"], 1.5 * row["eval/reward_trained"], atol=1e-4)
    assert len(rows) == 5
    for row in rows[1:]:
        np.testing.assert_allclose(row["refl/reward_builtin"], row["refl/reward_trained"], atol=1e-5)
        np.testing.assert_allclose(row["refl/reward"], 1.5 * row["refl/reward_trained"], atol=1e-4)


def page_of(workdir):
    return html.unescape((workdir / "report.html").read_text())


def test_an_evaluation_leaves_its_scores_and_images_by_prompt(runs):
    """Their means over prompts are the evaluation's metrics within 1e-5."""
    rows = {row["step"]: row for row in runs[1]["refl"] if "eval/reward_mean" in row}
    found = read_samples(runs[0] / "refl", rows)
    assert found.keys() == rows.keys()
    started = json.loads((runs[0] / "refl/started.json").read_text())
    unet = read_tensors(runs[0] / "refl/export/unet/diffusion_pytorch_model.safetensors")
    assert started["trained"] == {"unet": sum(tensor.size for tensor in unet.values())}
    assert str(runs[0] / "refl") in started["command"] and started["command"] in page_of(runs[0] / "refl")
    for step, prompts in found.items():
        assert all(prompt.images for prompt in prompts.values())
        for name in ("eval/reward_mean", "eval/checker_rate"):
            mean = np.mean([prompt.mean(name) for prompt in prompts.values()])
            np.testing.assert_allclose(mean, rows[step][name], atol=1e-5)


def test_the_report_draws_the_curve_of_every_reward(runs):
    page = (runs[0] / "refl" / "report.html").read_text()
    for name in ("refl/reward_builtin", "refl/reward_trained", "eval/reward_builtin", "eval/reward_trained"):
        assert f">{name}</code>" in page or f"The same numbers as {name}" in page, name
