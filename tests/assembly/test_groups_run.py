"""GRPO and DPO from the command line on a tiny Stable Diffusion 1.x: trained, exported, cached, refused."""

import numpy as np
import pytest
import tiny_sd1
from PIL import Image

for package in ("orbax.checkpoint", "grain", "ml_collections"):
    pytest.importorskip(package)

from pathlib import Path

from imagereward_jax.train import main
from imagereward_jax.training.metric_writers import read_rows

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPE = f"""
from imagereward_jax.recipes import recipe_beside

def get_config():
    config = recipe_beside({str(CONFIGS / "x")!r}, NAME)
    config.steps, config.batch_size, config.writers = 2, 4, ("jsonl",)
    config.model.path, config.reward.path = "model", "jpeg-compressibility"
    config.eval.update({{"num_prompts": 2, "images_per_prompt": 2, "batch_size": 4, "num_steps": 2, "every": 2}})
    config.log_every = config.checkpoint.every = 1
    if NAME != "dpo_tiny":
        config.method.update({{"num_steps": 2, "height": 8, "width": 8, "group_size": 4}})
        config.method.update({{"round_size": 4, "guidance_scale": 1.0}})
    return config
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with a model, recipes, and pairs of images in chosen/ and rejected/ of which one image is bright."""
    folder = tmp_path_factory.mktemp("project")
    tiny_sd1.save_one_level(folder)
    for name in ("grpo_tiny", "dpo_tiny", "dpo_online_tiny"):
        (folder / f"{name}.py").write_text(RECIPE.replace("NAME", repr(name)))
    rng = np.random.default_rng(0)
    for kind, brightness in (("chosen", 200), ("rejected", 20)):
        (folder / "pairs" / kind).mkdir(parents=True)
        for i in range(5):
            pixels = rng.integers(brightness - 20, brightness + 20, (12, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"pairs/{kind}/{i}.png")
            (folder / f"pairs/chosen/{i}.txt").write_text(f"a red circle {i}")
    return folder


def numbers(workdir):
    ignored = ("time", "images_per_second")
    return [{k: v for k, v in row.items() if k not in ignored} for row in read_rows(workdir / "metrics.jsonl")]


def test_grpo_on_a_model_of_betas(here):
    """Two steps of one group and a penalty to the reference: ratios are 1 before the updates (1e-6), the penalty 0 at
    first (1e-9: the two sets of weights are rounded apart)."""
    command = ["train", "--config=grpo_tiny.py", "--config.method.penalty=kl", "--config.method.penalty_weight=0.01"]
    command += ["--config.method.rounds=1"]
    assert main([*command, f"--workdir={here / 'grpo'}"]) == 0
    rows = numbers(here / "grpo")
    assert [row["step"] for row in rows] == [0, 1, 2] and (here / "grpo/export/model_index.json").is_file()
    assert all(row["grpo/ratio_error"] < 1e-6 for row in rows[1:])
    assert rows[1]["grpo/penalty"] < 1e-9 < rows[2]["grpo/penalty"] and rows[1]["grpo/reward_std"] > 0


def test_dpo_on_folders_with_and_without_a_cache(here, capsys):
    """Begins at log 2, twice: images encoded at every step, or once. 1e-3: beta of 2000 magnifies the rounding."""
    command = ["train", "--config=dpo_tiny.py", "--config.data.preferences=pairs", "--config.data.image_size=8"]
    command += ["--config.eval.best=eval/reward_mean"]
    for name, options in (("plain", []), ("cached", ["--config.data.cache=cache"])):
        assert main([*command, *options, f"--workdir={here / name}"]) == 0
        first = numbers(here / name)[1]
        assert first["dpo/loss"] == pytest.approx(np.log(2), abs=1e-3) and 0 <= first["dpo/accuracy"] <= 1
        assert first["dpo/chosen_error"] == pytest.approx(first["dpo/chosen_error_before"], rel=1e-5)
        assert first["dpo/chosen_error"] > 0 and first["dpo/grad_norm"] > 0
    assert len(list((here / "cache").glob("shard_*"))) == 1
    assert main([*command, "--config.data.preferences=pears", f"--workdir={here / 'none'}"]) == 2
    assert "pears" in capsys.readouterr().err and not (here / "none").exists()


@pytest.mark.slow
def test_online_dpo(here):
    """Four groups of four: an update of four pairs of the best and the worst image."""
    command = ["train", "--config=dpo_online_tiny.py", "--config.method.rounds=4", f"--workdir={here / 'online'}"]
    assert main(command) == 0
    first = numbers(here / "online")[1]
    assert first["dpo_online/loss"] == pytest.approx(np.log(2), abs=1e-5) and first["dpo_online/reward_std"] > 0
