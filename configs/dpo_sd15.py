"""Diffusion-DPO for Stable Diffusion 1.5 at 512 px on Pick-a-Pic, by the paper's settings (arXiv 2311.12908).

    python -m imagereward_jax.train --config configs/dpo_sd15.py \\
        --config.model.path=/models/stable-diffusion-v1-5 --config.data.preferences=/data/pickapic_v2.parquet \\
        --config.eval.prompts=held_out.txt --config.reward.path=/models/PickScore_v1

Preferences are Parquet files or data sets of `datasets` with Pick-a-Pic's columns (jpg_0, jpg_1, label_0, label_1,
caption), ranked groups as the scorer's training reads them, or a folder of chosen/ and rejected/. The reward trains
nothing: it scores the evaluation's images, and may be left out. 2,000 updates of 2,048 pairs at 2.048e-5, which is what
the authors' command amounts to; their paper says 2000 / beta x 2.048e-8. --config.data.cache=FOLDER encodes all images
and captions once, with one crop and mirroring each; without it every step encodes them.

Hardware: the paper used 16 A100; pairs at a time are batch_size / accumulation (16), over all devices. All of the UNet
trains, beside a frozen copy of it. Result to expect: not measured yet; the paper's SDXL model wins 70 % of comparisons.
dpo/accuracy is the share of pairs that the model orders as people do; dpo/chosen_error should not rise.
"""

from imagereward_jax.recipes import default_config


def get_config():
    """The recipe."""
    config = default_config("dpo")
    config.steps = 2000
    config.batch_size = 2048
    config.accumulation = 128
    config.dtype = "bfloat16"
    config.model.path = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    config.method.beta = 5000.0  # the authors' command; the paper says 2000
    config.data.preferences = "yuvalkirstain/pickapic_v2"
    config.data.random_flip = True
    config.data.workers = 8
    config.optimizer.learning_rate = 2.048e-5
    config.optimizer.warmup_steps = 500
    config.eval.prompts = "held_out.txt"
    config.eval.every = 200
    config.checkpoint.every = 100
    return config
