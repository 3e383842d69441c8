"""Ten ReFL steps on 8 virtual devices (data 4 x fsdp 2) against one device."""

import subprocess
import sys
from pathlib import Path

import child
import numpy as np
import pytest
import tiny_sd1

for package in ("orbax.checkpoint", "grain", "ml_collections"):
    pytest.importorskip(package)

from imagereward_jax.train import main
from imagereward_jax.training.metric_writers import read_rows

ROOT = Path(__file__).parents[2]


def arguments(folder, name, reward, *options):
    return [
        *(f"--config={ROOT / 'configs/refl_tiny.py'}", f"--workdir={folder / name}"),
        *(f"--config.model.path={folder / 'model'}", f"--config.reward.path={reward}"),
        *("--config.steps=10", "--config.log_every=1", "--config.batch_size=8", "--config.writers=('jsonl',)"),
        *("--config.method.num_steps=3", "--config.method.stop_min=0", "--config.method.stop_max=2"),
        *("--config.method.height=16", "--config.method.width=16", "--config.data.image_size=16"),
        *("--config.eval.num_prompts=8", "--config.eval.images_per_prompt=1", "--config.eval.num_steps=2"),
        *("--config.method.guidance_max=1.0", "--config.eval.guidance_scale=1.0", "--config.eval.guidance_scales=()"),
        *("--config.eval.batch_size=8", *options),
    ]


def test_eight_devices_give_the_losses_of_one(tmp_path, tiny_reward_folder):
    """Losses and rewards of 10 steps within 1e-5 relative."""
    pipeline, params = tiny_sd1.make_one_level(tmp_path / "tokenizer")
    pipeline.save(tmp_path / "model", params)
    assert main(["train", *arguments(tmp_path, "one", tiny_reward_folder, "--config.mesh.data=1")]) == 0
    sharded = arguments(tmp_path, "eight", tiny_reward_folder, "--config.mesh.data=4", "--config.mesh.fsdp=2")
    command = [sys.executable, "-m", "imagereward_jax.train", *sharded]
    done = subprocess.run(command, env=child.environment(8), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    one, eight = (read_rows(tmp_path / name / "metrics.jsonl") for name in ("one", "eight"))
    assert len(one) == 11
    for a, b in zip(one[1:], eight[1:], strict=True):
        for name in ("refl/loss", "denoising/loss"):
            np.testing.assert_allclose(b[name], a[name], rtol=1e-5, err_msg=f"{name} at step {a['step']}")
