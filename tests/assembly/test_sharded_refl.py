"""Ten ReFL steps on 8 virtual devices (data 4 x fsdp 2) against one device."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_sd1

from imagereward_jax.training.metric_writers import read_rows

for package in ("orbax.checkpoint", "grain", "ml_collections", "matplotlib"):
    pytest.importorskip(package)

ROOT = Path(__file__).parents[2]


def run(devices, folder, reward, *options):
    env = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    command = [
        *(sys.executable, "-m", "imagereward_jax.train", "--config", str(ROOT / "configs/refl_tiny.py")),
        *("--workdir", str(folder / f"on{devices}"), f"--config.model.path={folder / 'model'}"),
        *(f"--config.reward.path={reward}", "--config.steps=10", "--config.log_every=1", "--config.batch_size=8"),
        *(
            "--config.method.num_steps=3",
            "--config.method.stop_min=0",
            "--config.method.stop_max=2",
            "--config.writers=('jsonl',)",
        ),
        *("--config.eval.num_prompts=8", "--config.eval.images_per_prompt=1", "--config.eval.num_steps=2"),
        *("--config.eval.batch_size=8", *options),
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return read_rows(folder / f"on{devices}" / "metrics.jsonl")


def test_eight_devices_give_the_losses_of_one(tmp_path, tiny_reward_folder):
    """Losses and rewards of 10 steps within 1e-5 relative."""
    pipeline, params = tiny_sd1.make(tmp_path / "tokenizer")
    pipeline.save(tmp_path / "model", params)
    one = run(1, tmp_path, tiny_reward_folder)
    eight = run(8, tmp_path, tiny_reward_folder, "--config.mesh.data=4", "--config.mesh.fsdp=2")
    assert len(one) == 11
    for a, b in zip(one[1:], eight[1:], strict=True):
        for name in ("refl/loss", "denoising/loss"):
            np.testing.assert_allclose(b[name], a[name], rtol=1e-5, err_msg=f"{name} at step {a['step']}")
