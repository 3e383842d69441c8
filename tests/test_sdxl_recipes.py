"""The SDXL recipes, scaled down: a tiny SDXL from nothing, then ReFL on it with its pairs from a cache."""

import numpy as np
import pytest

pytestmark = pytest.mark.slow  # some minutes: four programs are compiled

for package in ("orbax.checkpoint", "grain", "ml_collections"):
    pytest.importorskip(package)

from test_recipes import SMALL_SAMPLES, train

from imagereward_jax.weights.files import read_tensors

SMALL = [
    "--config.steps=2",
    "--config.batch_size=2",
    "--config.eval.num_prompts=2",
    "--config.eval.batch_size=2",
    "--config.checkpoint.best_only=True",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Workdirs of the two recipes, the second fed by the first."""
    root = tmp_path_factory.mktemp("runs")
    unet = "--config.model.architecture.unet"
    small_unet = [f"{unet}.block_out_channels=(16, 32)", f"{unet}.norm_num_groups=8"]
    train("shapes_pretrain_sdxl", root / "pretrain", *SMALL_SAMPLES, *SMALL, *small_unet)
    rows = train(
        "refl_sdxl_tiny",
        root / "refl",
        *SMALL_SAMPLES,
        *SMALL,
        f"--config.model.path={root / 'pretrain/export'}",
        f"--config.data.cache={root / 'cache'}",
        "--config.method.num_steps=2",
        "--config.method.stop_min=0",
        "--config.method.stop_max=1",
        "--config.method.guidance_scale=2.0",
        "--config.method.snr_gamma=5.0",
    )
    return root, rows


def test_all_of_the_pretrained_model_is_exported_and_the_autoencoder_is_tiny_shapes_own(runs):
    from imagereward_jax.pipelines import load_pipeline

    pipeline, params = load_pipeline(runs[0] / "pretrain/export")
    _, tiny = load_pipeline("tiny-shapes")
    assert pipeline.family == "sdxl" and pipeline.default_size == 32
    np.testing.assert_array_equal(
        params["vae"]["decoder"]["conv_in"]["kernel"], tiny["vae"]["decoder"]["conv_in"]["kernel"]
    )


def test_refl_tunes_the_unet_alone_and_logs_both_losses(runs):
    root, rows = runs
    assert {"refl/reward", "refl/loss", "denoising/mse", "eval/reward_mean"} <= rows[-1].keys()
    assert np.isfinite(list(rows[-1].values())).all()
    for name, file in (("text_encoder_2", "model"), ("unet", "diffusion_pytorch_model")):
        base, tuned = (read_tensors(root / run / f"export/{name}/{file}.safetensors") for run in ("pretrain", "refl"))
        assert all(np.array_equal(base[key], tuned[key]) for key in base) == (name != "unet")
